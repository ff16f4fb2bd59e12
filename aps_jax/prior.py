"""Two ways to bundle the masked transformer as a `Prior` over grids of image tokens.

`make_prior` is for a model of image tokens alone, `make_prompted_prior` for a language model with a
joint vocabulary; vocabulary offsets, prompts and padding stay inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from aps_jax.attention import grid_positions
from aps_jax.transformer import Transformer, TransformerConfig
from aps_jax.types import Array, Prior, PyTree, bind


def grid_hidden(params: PyTree, tokens: Array, *, config: TransformerConfig) -> Array:
    """Final states [B, h * w, width] of a grid of tokens [B, h, w], for training and probing."""
    batch, height, width = tokens.shape
    positions = grid_positions(height, width) if config.rope_axes == 2 else None
    ids = tokens.reshape(batch, height * width)
    return Transformer(config).apply({"params": params}, ids, positions, method="hidden")


def _grid_logits(
    params: PyTree, tokens: Array, *, config: TransformerConfig, num_codes: int
) -> Array:
    hidden = grid_hidden(params, tokens, config=config)
    columns = (0, num_codes)
    logits = Transformer(config).apply({"params": params}, hidden, columns, method="logits")
    return logits.reshape(*tokens.shape, num_codes)


def make_prior(config: TransformerConfig, params: PyTree, *, window: int | None = None) -> Prior:
    """Bundles an unconditional image prior: ids are the K codes, then the mask.

    Args:
      config: `vocab_size` must be K + 1; the head has K columns, or K + 1 of which the mask's is
        never evaluated.
      params: weights as from `init_transformer_params`.
      window: largest grid side to run in one piece.

    Returns:
      A prior over grids [B, h, w], read in row-major order.
    """
    num_codes = config.vocab_size - 1
    if config.output_size not in (num_codes, num_codes + 1):
        raise ValueError(f"head has {config.output_size} columns; needs {num_codes} or one more")
    return Prior(
        params=params,
        apply=bind(_grid_logits, config=config, num_codes=num_codes),
        num_codes=num_codes,
        window=window,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Special ids of a masked language model and the frame of its prompts; every field is JSON.

    Attributes:
      num_codes: number K of image codes, or of text ids in a text model.
      image_offset: id of code 0.
      mask_token_id: id of the mask.
      begin_id: id that opens the image; None for none.
      end_id: id that closes the image; None for none.
      prefix: ids before the text of a prompt.
      suffix: ids after it.
      pad_token_id: id that takes no part in attention; None leaves pads visible.
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
    mask_uncond: bool = False


def frame_prompt(
    prompt: PromptConfig, text_ids: Array | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with and without the condition, int32 [..., P] each, of a prompt's text [..., L]."""
    text = np.asarray(text_ids, np.int32)

    def frame(text: np.ndarray) -> np.ndarray:
        parts = (np.asarray(ids, np.int32) for ids in (prompt.prefix, prompt.suffix))
        prefix, suffix = (np.broadcast_to(ids, (*text.shape[:-1], ids.size)) for ids in parts)
        return np.concatenate([prefix, text, suffix], axis=-1)

    whole = frame(text)
    if prompt.mask_uncond:
        return whole, np.full_like(whole, prompt.mask_token_id)
    return whole, frame(text[..., :0])


def _prompted_logits(
    params: PyTree,
    tokens: Array,
    *,
    config: TransformerConfig,
    prompt: str,
    num_codes: int,
    image_offset: int,
    mask_token_id: int,
    begin_id: int | None,
    end_id: int | None,
    pad_token_id: int | None,
) -> Array:
    batch, height, width = tokens.shape
    flat = tokens.reshape(batch, height * width)
    image_ids = jnp.where(flat == num_codes, mask_token_id, flat + image_offset)
    prompt_ids = params[prompt]
    prompt_ids = jnp.broadcast_to(jnp.atleast_2d(prompt_ids), (batch, prompt_ids.shape[-1]))
    begin, end = (
        jnp.full((batch, 0 if token is None else 1), token or 0, flat.dtype)
        for token in (begin_id, end_id)
    )
    ids = jnp.concatenate([prompt_ids.astype(flat.dtype), begin, image_ids, end], axis=1)
    first = ids.shape[1] - end.shape[1] - height * width
    mask = None
    if pad_token_id is not None:
        valid = ids != pad_token_id
        mask = valid[:, :, None] & valid[:, None, :]
    model = Transformer(config)
    weights = {"params": params["model"]}
    hidden = model.apply(weights, ids, None, mask, method="hidden")
    hidden = hidden[:, first : first + height * width]
    columns = (image_offset, image_offset + num_codes)
    logits = model.apply(weights, hidden, columns, method="logits")
    return logits.reshape(*tokens.shape, num_codes)


def make_prompted_prior(
    config: TransformerConfig,
    params: PyTree,
    *,
    num_codes: int,
    image_offset: int,
    mask_token_id: int,
    begin_id: int | None,
    end_id: int | None,
    prompt_ids: Array,
    uncond_prompt_ids: Array | None = None,
    pad_token_id: int | None = None,
    window: int | None = None,
) -> Prior:
    """Bundles a masked language model with a joint text and image vocabulary (MMaDA).

    The model reads `prompt | begin, image tokens, end`, and the head is evaluated at the image
    positions and for the image ids only. A text model (LLaDA) is the same without `begin` and
    `end`: its "image" is one row of text, whose codes are the ids themselves.

    Args:
      config: `rope_axes` must be 1.
      params: weights as from `init_transformer_params`.
      num_codes: K.
      image_offset: id of image code 0.
      mask_token_id: id of the mask.
      begin_id: id that opens the image; None for none.
      end_id: id that closes the image; None for none.
      prompt_ids: int [P], or [B, P] for one prompt per image.
      uncond_prompt_ids: the same for `apply_unconditional`, of any length of its own.
      pad_token_id: id that takes no part in attention; None leaves pads visible.
      window: largest grid side to run in one piece.

    Returns:
      A prior whose params are `{"model": params, "prompt": ids[, "uncond_prompt": ids]}`.
    """
    if config.rope_axes != 1:
        raise ValueError(f"a prompted prior reads a sequence: rope_axes is {config.rope_axes}")
    if image_offset + num_codes > config.output_size:
        raise ValueError(
            f"image ids end at {image_offset + num_codes}; head has {config.output_size} columns"
        )
    bundled = {"model": params, "prompt": jnp.asarray(prompt_ids, jnp.int32)}
    if uncond_prompt_ids is not None:
        bundled["uncond_prompt"] = jnp.asarray(uncond_prompt_ids, jnp.int32)
    settings = {
        "config": config,
        "num_codes": num_codes,
        "image_offset": image_offset,
        "mask_token_id": mask_token_id,
        "begin_id": begin_id,
        "end_id": end_id,
        "pad_token_id": pad_token_id,
    }
    unconditional = None
    if uncond_prompt_ids is not None:
        unconditional = bind(_prompted_logits, prompt="uncond_prompt", **settings)
    return Prior(
        params=bundled,
        apply=bind(_prompted_logits, prompt="prompt", **settings),
        num_codes=num_codes,
        window=window,
        apply_unconditional=unconditional,
    )
