"""Latents of a codec: its features, not quantised, as continuous priors know them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.types import Array, Codec, ImageShape


def encode(codec: Codec, x: Float[Array, "B H W C"]) -> Float[Array, "B h w d"]:
    """Features of images, clipped to [-1, 1].

    Codes of look-up-free quantisation are at -1 and 1, and beyond them a decoder has never been.

    Args:
      codec: with an encoder, for a grid over pixels with one code per place.
      x: images in [-1, 1] of any size; the last row and column are repeated up to a whole grid.

    Raises:
      ValueError: the codec only decodes.
    """
    if codec.encode is None:
        raise ValueError("this codec only decodes; it has no encoder")
    rows, columns = (-side % codec.stride for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge")
    with jax.named_scope("encoder"):
        return jnp.clip(codec.encode(codec.params, x), -1, 1)


def decode(
    codec: Codec, latents: Float[Array, "B h w d"], image_shape: ImageShape
) -> Float[Array, "B H W C"]:
    """Images of any vectors on the grid, cropped to their size (H, W) and not clipped."""
    with jax.named_scope("decoder"):
        x = codec.decode(codec.params, latents)
    return x[:, : image_shape[0], : image_shape[1]]
