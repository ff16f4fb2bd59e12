"""Targets that change a given picture: a part of it, or all of it a little.

Of a part, the tokens that lie wholly outside are given, so no sampler can touch them. Of the whole
picture, all tokens are drawn, and what holds them back is an energy.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from aps_jax import energies
from aps_jax.codec.magvit2 import space_to_depth
from aps_jax.operators import denoising, inpainting_mask
from aps_jax.prior.windows import cover_field
from aps_jax.sampling.starts import encoder_tokens
from aps_jax.sampling.target import Measurement, Target, make_target
from aps_jax.types import Array, Codec, Energy, Prior

#: How far a pixel outside the mask may move, where its token reaches into the mask.
KNOWN_SIGMA = 0.1


def part_target(
    prior: Prior,
    codec: Codec,
    image: Float[Array, "B H W 3"],
    mask: Any,
    *,
    reward: Energy | None = None,
    sigma: float = KNOWN_SIGMA,
    consistency: float | None = None,
    **fields: Any,
) -> Target:
    """Draws the pixels where the mask is 0; whatever else their tokens cover should stay.

    The energy is that of the kept pixels, ||x - image||^2 / (2 sigma^2), plus the reward's. Only
    tokens that reach into the mask are drawn, the others are the encoder's.

    Args:
      prior: masked transformer.
      codec: with an encoder.
      image: in [-1, 1].
      mask: [H, W], 1 where a pixel stays and 0 where it may change.
      reward: what the whole picture should fulfil.
      sigma: as above.
      consistency: how smooth the change must be that brings back at the end what stays and the
        codec has lost, and continues into what is drawn, so that there is no rim
        (`sampling.smooth`); None leaves the decoder's picture.
      **fields: others of `make_target`, such as `guidance_scale` and `num_samples`.

    Raises:
      ValueError: the mask has another size, other values than 0 and 1, or frees no pixel or all.
    """
    mask = np.asarray(mask)
    if mask.shape != image.shape[1:3]:
        raise ValueError(f"the mask has shape {mask.shape}, the image {image.shape[1:3]}")
    if mask.all() or not mask.any():
        raise ValueError("the mask must free some pixels (0) and keep others (1)")
    scale = fields.get("decode_scale", 1)
    tokens = kept_tokens(codec, image, mask, decode_scale=scale)
    tokens = jnp.where(tokens < 0, prior.num_codes, tokens)
    energy = energies.known(image, mask, sigma)
    operator = inpainting_mask(mask)
    measurement = Measurement(operator, operator(image), jnp.float32(sigma), consistency)
    return make_target(
        prior, codec, energy if reward is None else energies.total(energy, reward),
        image_shape=(image.shape[1], image.shape[2]), batch=image.shape[0], known_tokens=tokens,
        measurement=measurement, **fields,
    )  # fmt: skip


def kept_tokens(
    codec: Codec, image: Float[Array, "B H W 3"], mask: Any, *, decode_scale: int = 1
) -> Int[Array, "B L"]:
    """The encoder's tokens int32 [B, L] where all pixels have a mask of 1, -1 elsewhere.

    Past the image's edges there is nothing to keep.
    """
    height, width = (side * decode_scale for side in image.shape[1:3])
    grid = codec.grid((height, width))
    tokens = encoder_tokens(codec, image, grid=grid, decode_scale=decode_scale)
    place = (grid[0], grid[1])
    free = 1 - jnp.asarray(mask, jnp.float32)[None, :, :, None]
    free = cover_field(
        free, grid=place, stride=codec.stride, decode_scale=decode_scale, mode="constant"
    )
    is_free = jnp.any(space_to_depth(free, codec.stride) > 0, axis=-1).reshape(1, -1)
    is_free = jnp.repeat(is_free, tokens.shape[1] // is_free.shape[1], axis=1)
    return jnp.where(is_free, -1, tokens)


def whole_target(
    prior: Prior,
    codec: Codec,
    image: Float[Array, "B H W 3"],
    energy: Energy,
    *,
    sigma: float = KNOWN_SIGMA,
    **fields: Any,
) -> Target:
    """Draws all tokens; samplers that start from a measurement start from the picture itself.

    Args:
      prior: masked transformer.
      codec: with an encoder.
      image: in [-1, 1].
      energy: per token, so that what a weight means does not depend on the size of the image: it
        is multiplied by their number L.
      sigma: of the picture as a measurement, which only such a start reads.
      **fields: others of `make_target`.
    """
    scale = fields.get("decode_scale", 1)
    height, width = (side * scale for side in image.shape[1:3])
    count = math.prod(codec.grid((height, width)))
    return make_target(
        prior, codec, energies.scaled(energy, count),
        image_shape=(image.shape[1], image.shape[2]), batch=image.shape[0],
        measurement=Measurement(denoising(), image, jnp.float32(sigma)), **fields,
    )  # fmt: skip
