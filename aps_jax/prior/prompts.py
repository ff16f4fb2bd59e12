"""Prompts of masked language models: special ids, frames, pads and what may see what.

A sequence is `pads, prefix, text, suffix | begin, image, end`; a text model has no `begin` and
`end`, and its "image" is the text to be written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from aps_jax.types import Array

#: Ids of one prompt, of B prompts in an array, or of B prompts of different lengths.
TextIds = Array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Special ids of a masked language model and the frame of its prompts; every field is JSON.

    Attributes:
      num_codes: number K of image codes, or of text ids in a text model.
      image_offset: id of code 0. With several tokens per place, code k of token g has the id
        image_offset + g K + k.
      mask_token_id: id of the mask.
      begin_id: id that opens the image; None for none.
      end_id: id that closes the image; None for none.
      prefix: ids before the text of a prompt.
      suffix: ids after it.
      pad_token_id: id that fills prompts up, on their left; None for a model without one.
      length: ids of a filled prompt in training, and the most that a prompt may have; None for any.
      is_causal: text sees only what is before it; the image, `begin` and `end` included, sees
        everything (Show-o). Otherwise everything sees everything (MMaDA, LLaDA).
      understanding_prefix: ids before an image that is to be described; empty for models that
        cannot.
      mask_uncond: without a condition the prompt is mask ids of the same length (LLaDA); otherwise
        it is a prompt without text (MMaDA).
    """

    num_codes: int
    image_offset: int = 0
    mask_token_id: int
    begin_id: int | None = None
    end_id: int | None = None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    pad_token_id: int | None = None
    length: int | None = None
    is_causal: bool = False
    understanding_prefix: tuple[int, ...] = ()
    mask_uncond: bool = False


def frame_prompt(
    prompt: PromptConfig, text_ids: TextIds, *, mask_padding: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with and without the condition.

    Pads that no other position sees change nothing, for rotary positions are relative, so prompts
    are filled up to the longest one only. Pads that are seen do: `prompt.length` then decides.

    Args:
      prompt: the model's frame.
      text_ids: text of one prompt, or of one prompt per image; the frame is added here.
      mask_padding: pads are hidden from everything else.

    Returns:
      Two int32 arrays [P] and [P'], or [B, P] and [B, P'], with pads on the left.

    Raises:
      ValueError: a prompt is too long, or prompts differ in length and the model has no pad.
    """
    is_batch = len(text_ids) > 0 and np.ndim(text_ids[0]) == 1
    texts = [np.asarray(row, np.int32) for row in (text_ids if is_batch else [text_ids])]
    rows = [np.concatenate([prompt.prefix, text, prompt.suffix]) for text in texts]
    longest = max(map(len, rows))
    if prompt.length is not None and longest > prompt.length:
        frame = len(prompt.prefix) + len(prompt.suffix)
        raise ValueError(
            f"the prompt has {longest - frame} text ids; this model takes at most "
            f"{prompt.length - frame}: shorten it"
        )
    if prompt.pad_token_id is None and min(map(len, rows)) < longest:
        raise ValueError(
            "prompts of different lengths need a pad id, which this model has not; "
            "give prompts of one length, or one at a time"
        )
    if prompt.mask_uncond:
        bare = [np.full(len(row), prompt.mask_token_id) for row in rows]
    else:
        bare = [np.concatenate([prompt.prefix, prompt.suffix])] * len(rows)
    both = []
    for ids in (rows, bare):
        size = max(map(len, ids)) if mask_padding or prompt.length is None else prompt.length
        filled = [_fill(row, size, prompt.pad_token_id) for row in ids]
        both.append(np.asarray(filled if is_batch else filled[0], np.int32))
    return both[0], both[1]


def _fill(row: np.ndarray, size: int, pad_token_id: int | None) -> np.ndarray:
    missing = size - len(row)
    return row if not missing else np.concatenate([np.full(missing, pad_token_id), row])


def frame_understanding(prompt: PromptConfig, tokens: Array, text_ids: TextIds) -> np.ndarray:
    """Ids of a question about an image, for the text prior of the same model.

    Args:
      prompt: frame of the image prior (MMaDA).
      tokens: image tokens int [h, w], or [B, h, w], in [0, K).
      text_ids: the question, as ids of a chat [L], or [B, L].

    Returns:
      Int32 [P] or [B, P]: `mmu, soi, image, eoi, chat`.

    Raises:
      ValueError: a model that does not describe images, or tokens that are no codes.
    """
    if not prompt.understanding_prefix:
        raise ValueError("this model does not take images as questions")
    codes = np.asarray(tokens)
    if codes.size and not 0 <= codes.min() <= codes.max() < prompt.num_codes:
        raise ValueError(f"image tokens must be in [0, {prompt.num_codes}), none masked")
    flat = codes.reshape(*codes.shape[:-2], -1)
    text = np.asarray(text_ids, np.int32)
    batch = np.broadcast_shapes(flat.shape[:-1], text.shape[:-1])
    parts = (
        (*prompt.understanding_prefix, prompt.begin_id),
        flat + prompt.image_offset,
        (prompt.end_id,),
        text,
    )
    parts = (np.asarray(part, np.int32) for part in parts)
    return np.concatenate([np.broadcast_to(p, (*batch, p.shape[-1])) for p in parts], axis=-1)


def image_ids(tokens: Array, num_codes: int, mask_token_id: int, offset: int = 0) -> Array:
    """Ids [R, h w], or [R, h w, n], of grids of tokens.

    Args:
      tokens: int [R, h, w], or [R, h, w, n] for n tokens per place, in [0, K], K for the mask.
      num_codes: number K of codes of one token.
      mask_token_id: id of the mask.
      offset: id of code 0; code k of token g has the id `offset` + g K + k.
    """
    axes = tokens.shape[3:]
    flat = tokens.reshape(tokens.shape[0], -1, *axes)
    own = flat + offset
    if axes:
        own += num_codes * jnp.arange(axes[0], dtype=tokens.dtype)[None, None]
    return jnp.where(flat == num_codes, mask_token_id, own)


def sequence_ids(prompt: PromptConfig, prompt_ids: Array, tokens: Array) -> tuple[Array, int]:
    """What the model reads: `prompt | begin, image, end`.

    Args:
      prompt: the model's frame.
      prompt_ids: framed prompt int [P], or [B, P]; B prompts serve a multiple of B images, the
        samples of one image being B rows apart.
      tokens: int [R, h, w], or [R, h, w, n] for n tokens per place, in [0, K], K for the mask; in
        row-major order.

    Returns:
      Ids [R, T], or [R, T, n] with what is no image repeated n times, and the position of the first
      image token.

    Raises:
      ValueError: prompts for another number of images.
    """
    rows = tokens.shape[0]
    prompt_ids = jnp.atleast_2d(prompt_ids).astype(tokens.dtype)
    if rows % prompt_ids.shape[0]:
        raise ValueError(
            f"the prior has {prompt_ids.shape[0]} prompts, which do not fit {rows} images"
        )
    prompt_ids = jnp.tile(prompt_ids, (rows // prompt_ids.shape[0], 1))
    image = image_ids(tokens, prompt.num_codes, prompt.mask_token_id, prompt.image_offset)
    begin, end = (
        jnp.full((rows, 0 if index is None else 1), index or 0, tokens.dtype)
        for index in (prompt.begin_id, prompt.end_id)
    )
    around = [jnp.concatenate([prompt_ids, begin], axis=1), end]
    if image.ndim == 3:
        around = [jnp.repeat(ids[:, :, None], image.shape[2], axis=2) for ids in around]
    before, after = around
    ids = jnp.concatenate([before, image, after], axis=1)
    return ids, before.shape[1]


def attention_mask(
    prompt: PromptConfig, ids: Array, num_prompt: int, *, mask_padding: bool = True
) -> Array | None:
    """Who sees whom, bool [B, T, T], True where the query (second axis) sees the key.

    Args:
      prompt: the model's frame.
      ids: whole sequences int [B, T], or [B, T, n] for n tokens per place.
      num_prompt: number of ids before `begin`.
      mask_padding: pads are hidden from everything else.

    Returns:
      None where everything sees everything.
    """
    is_masked = mask_padding and prompt.pad_token_id is not None
    if not is_masked and not prompt.is_causal:
        return None
    ids = ids.reshape(*ids.shape[:2], -1)[:, :, 0]
    is_pad = (ids == prompt.pad_token_id) if is_masked else jnp.zeros(ids.shape, bool)
    if not prompt.is_causal:
        return ~is_pad[:, :, None] & ~is_pad[:, None, :]
    position = jnp.arange(ids.shape[1], dtype=jnp.int32)
    is_seen = (position[None, :] <= position[:, None]) | (position >= num_prompt)[:, None]
    # Pads see pads, so that none of their rows is empty.
    return (is_pad[:, :, None] == is_pad[:, None, :]) & is_seen[None]
