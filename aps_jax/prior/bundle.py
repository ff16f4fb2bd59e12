"""Two ways to bundle the masked transformer as a `Prior` over grids of image tokens.

`make_prior` is for a model of image tokens alone, `make_prompted_prior` for a language model with a
joint vocabulary; vocabulary offsets, prompts (`aps_jax.prior.prompts`) and padding stay inside.
"""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
import numpy as np

from aps_jax.prior.attention import grid_positions, sequence_positions
from aps_jax.prior.prompts import PromptConfig, attention_mask, image_ids, sequence_ids
from aps_jax.prior.transformer import Transformer, TransformerConfig
from aps_jax.types import Array, Prior, PyTree, bind


def grid_hidden(params: PyTree, tokens: Array, *, config: TransformerConfig) -> Array:
    """Final states [B, h * w, width] of a grid of tokens [B, h, w], for training and probing.

    With `config.token_groups` n above 1 the tokens are [B, h, w, n]. The mask is the last id.
    """
    height, width = tokens.shape[1:3]
    _check_grid(config, height, width)
    positions = grid_positions(height, width) if config.rope_axes == 2 else None
    mask_token_id = config.vocab_size - 1
    ids = image_ids(tokens, mask_token_id // config.token_groups, mask_token_id)
    hidden = Transformer(config).apply({"params": params}, ids, positions, method="hidden")
    return cast(Array, hidden)


def prompted_hidden(
    params: PyTree,
    prompt_ids: Array,
    tokens: Array,
    *,
    config: TransformerConfig,
    prompt: PromptConfig,
    mask_padding: bool = True,
) -> Array:
    """Final states [B, h * w, width] of a grid of tokens [B, h, w(, n)] behind framed prompts.

    Arguments as for `make_prompted_prior`; also for training.
    """
    height, width = tokens.shape[1:3]
    _check_grid(config, height, width)
    ids, first = sequence_ids(prompt, prompt_ids, tokens)
    mask = attention_mask(prompt, ids, jnp.shape(prompt_ids)[-1], mask_padding=mask_padding)
    end = first + height * width
    positions = None
    if config.rope_axes == 2:
        positions = sequence_positions(first, height, width, ids.shape[1] - end)
    hidden = Transformer(config).apply({"params": params}, ids, positions, mask, method="hidden")
    return cast(Array, hidden)[:, first:end]


def _check_grid(config: TransformerConfig, height: int, width: int) -> None:
    """ValueError for a grid whose cells the model has no positions of."""
    side = config.absolute_side
    if side is not None and (height, width) != (side, side):
        raise ValueError(
            f"this prior knows whole pictures of {side}x{side} tokens only, for it has learned "
            f"what belongs where in them; got {height}x{width} tokens: resize the picture (at "
            "decode_scale 1), or choose another model"
        )


def _grid_logits(
    params: PyTree, tokens: Array, *, config: TransformerConfig, num_codes: int
) -> Array:
    hidden = grid_hidden(params, tokens, config=config)
    columns = (0, num_codes * config.token_groups)
    logits = Transformer(config).apply({"params": params}, hidden, columns, method="logits")
    return cast(Array, logits).reshape(*tokens.shape, num_codes)


def make_prior(config: TransformerConfig, params: PyTree, *, window: int | None = None) -> Prior:
    """Bundles an unconditional image prior: ids are the K codes, then the mask.

    Args:
      config: `vocab_size` must be K + 1; the head has K columns, or K + 1 of which the mask's is
        never evaluated. With `token_groups` n, n K stands for K in both.
      params: weights as from `init_transformer_params`.
      window: largest grid side to run in one piece.

    Returns:
      A prior over grids [B, h, w], or [B, h, w, n], read in row-major order.
    """
    num_ids = config.vocab_size - 1
    if config.output_size not in (num_ids, num_ids + 1):
        raise ValueError(f"head has {config.output_size} columns; needs {num_ids} or one more")
    num_codes = num_ids // config.token_groups
    return Prior(
        params=params,
        apply=bind(_grid_logits, config=config, num_codes=num_codes),
        num_codes=num_codes,
        window=window,
    )


def _prompted_logits(
    params: PyTree,
    tokens: Array,
    *,
    config: TransformerConfig,
    prompt: PromptConfig,
    mask_padding: bool,
    name: str,
) -> Array:
    num_codes, offset = prompt.num_codes, prompt.image_offset
    hidden = prompted_hidden(
        params["model"],
        params[name],
        tokens,
        config=config,
        prompt=prompt,
        mask_padding=mask_padding,
    )
    columns = (offset, offset + num_codes * config.token_groups)
    weights = {"params": params["model"]}
    logits = cast(Array, Transformer(config).apply(weights, hidden, columns, method="logits"))
    if 0 <= prompt.mask_token_id - offset < num_codes:  # A text model: the mask is no text.
        logits = logits.at[:, :, prompt.mask_token_id - offset].set(-jnp.inf)
    return logits.reshape(*tokens.shape, num_codes)


def make_prompted_prior(
    config: TransformerConfig,
    params: PyTree,
    *,
    prompt: PromptConfig,
    prompt_ids: Array | np.ndarray,
    uncond_prompt_ids: Array | np.ndarray | None = None,
    mask_padding: bool = True,
    window: int | None = None,
) -> Prior:
    """Bundles a masked language model with a joint text and image vocabulary (MMaDA, Show-o).

    The model reads `prompt | begin, image tokens, end`, and the head is evaluated at the image
    positions and for the image ids only. A text model (LLaDA) is the same without `begin` and
    `end`: its "image" is one row of text, whose codes are the ids themselves, and the mask's own id
    has a logit of minus infinity.

    Args:
      config: sizes; with `rope_axes` 2 the image's tokens have rows and columns, and what is
        around them lies above and below. With `token_groups` n a grid is [B, h, w, n], and what is
        around it counts n times, as the mask of a whole place does.
      params: weights as from `init_transformer_params`.
      prompt: special ids, and what sees what.
      prompt_ids: int [P], or [B, P] for one prompt per image, framed as by
        `aps_jax.prior.prompts.frame_prompt`.
      uncond_prompt_ids: the same for `apply_unconditional`, of any length of its own.
      mask_padding: hide pads from everything else; False leaves them visible.
      window: largest grid side to run in one piece.

    Returns:
      A prior whose params are `{"model": params, "prompt": ids[, "uncond_prompt": ids]}`.

    Raises:
      ValueError: ids that the model does not have.
    """
    last = prompt.image_offset + prompt.num_codes * config.token_groups
    if last > config.output_size:
        raise ValueError(f"image ids end at {last}; head has {config.output_size} columns")
    bundled = {"model": params, "prompt": jnp.asarray(prompt_ids, jnp.int32)}
    if uncond_prompt_ids is not None:
        bundled["uncond_prompt"] = jnp.asarray(uncond_prompt_ids, jnp.int32)
    settings = {"config": config, "prompt": prompt, "mask_padding": mask_padding}
    unconditional = None
    if uncond_prompt_ids is not None:
        unconditional = bind(_prompted_logits, name="uncond_prompt", **settings)
    return Prior(
        params=bundled,
        apply=bind(_prompted_logits, name="prompt", **settings),
        num_codes=prompt.num_codes,
        window=window,
        apply_unconditional=unconditional,
    )
