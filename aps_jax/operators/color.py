"""Operators on colours: grey images and Bayer mosaics."""

from __future__ import annotations

import jax.numpy as jnp

from aps_jax.operators._checks import channels
from aps_jax.operators.svd import SVD, channel_svd
from aps_jax.tasks import declared
from aps_jax.types import Array, Operator, bind

#: Rec. 601 luma weights of red, green and blue.
LUMA = (0.299, 0.587, 0.114)


@declared
def colorization() -> Operator:
    """Only the Rec. 601 luma of each pixel is measured.

    Returns:
      Linear operator [B, H, W, 3] -> [B, H, W, 1].
    """
    return Operator(apply=bind(_luma), name="colorization", is_linear=True, svd=bind(_luma_svd))


def _luma(params: None, x: Array) -> Array:
    del params
    channels("colorization", x, 3)
    red, green, blue = (weight * x[..., i : i + 1] for i, weight in enumerate(LUMA))
    return red + green + blue


def _luma_svd(params: None, x_shape: tuple[int, ...]) -> SVD:
    del params, x_shape
    return channel_svd(LUMA)


@declared
def demosaicing(*, pattern: str) -> Operator:
    """One colour per pixel is measured, in a Bayer pattern; any image size.

    The mosaic is not marked as an image: perceptual distances mean nothing on it.

    Returns:
      Linear operator [B, H, W, 3] -> [B, H, W, 1].
    """
    return Operator(
        apply=bind(_mosaic, pattern=pattern), name="demosaicing", is_linear=True, is_image=False
    )


def _mosaic(params: None, x: Array, *, pattern: str) -> Array:
    del params
    channels("demosaicing", x, 3)
    even_row = (jnp.arange(x.shape[1], dtype=jnp.int32) % 2 == 0)[None, :, None]
    even_column = (jnp.arange(x.shape[2], dtype=jnp.int32) % 2 == 0)[None, None, :]
    top_left, top_right, low_left, low_right = (x[..., "rgb".index(colour)] for colour in pattern)
    top = jnp.where(even_column, top_left, top_right)
    low = jnp.where(even_column, low_left, low_right)
    return jnp.where(even_row, top, low)[..., None]
