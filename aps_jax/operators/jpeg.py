"""JPEG-like compression with a straight-through gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.expectation import straight_through
from aps_jax.operators._checks import channels
from aps_jax.operators.color import LUMA
from aps_jax.tasks import declared
from aps_jax.types import Array, Operator, bind

# Quantisation tables of Annex K of the JPEG standard (ITU-T T.81).
_LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCBCR = np.array([LUMA, (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411)])


@declared
def jpeg(*, quality: int) -> Operator:
    """Baseline JPEG quantisation of 8x8 DCT blocks, without chroma subsampling and entropy coding.

    Quality scales the standard tables as libjpeg does. Pixel values stay real numbers, clipped to
    [-1, 1]. The gradient passes straight through: it is that of the identity.

    Returns:
      Operator [B, H, W, C] -> [B, H, W, C] for C = 3 (RGB) or C = 1 (grey).
    """
    return Operator(apply=bind(_jpeg, quality=quality), name="jpeg", has_true_gradient=False)


def quantization_tables(quality: int) -> np.ndarray:
    """Tables [2, 8, 8] of luma and chroma steps on the 0 to 255 scale, by libjpeg's rule."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = (np.stack([_LUMA_TABLE, _CHROMA_TABLE]) * scale + 50) // 100
    return np.clip(tables, 1, 255)


def _dct_matrix() -> np.ndarray:
    frequency, position = np.mgrid[:8, :8]
    matrix = np.sqrt(2 / 8) * np.cos(np.pi * frequency * (2 * position + 1) / 16)
    matrix[0] /= np.sqrt(2)
    return matrix


def _jpeg(params: None, x: Array, *, quality: int) -> Array:
    del params
    channels("jpeg", x, 1, 3)
    return straight_through(x, _compress(jax.lax.stop_gradient(x), quality))


def _compress(x: Array, quality: int) -> Array:
    batch, height, width, num_channels = x.shape
    to_ycbcr = _TO_YCBCR if num_channels == 3 else np.ones((1, 1))
    tables = quantization_tables(quality)[[0, 1, 1][:num_channels]].transpose(1, 2, 0)
    steps = jnp.asarray(tables, "float32")[None, None, :, None]  # [1, 1, 8, 1, 8, C]
    # JPEG centres 0..255 at 128, half a step off our centre; it cancels out of chroma.
    offset = np.array([0.5, 0.0, 0.0][:num_channels], np.float32).reshape(1, 1, 1, num_channels)

    padded = jnp.pad(x, ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    pixels = _contract("bhwi,ci->bhwc", 127.5 * padded, to_ycbcr) - offset
    blocks = pixels.reshape(batch, pixels.shape[1] // 8, 8, pixels.shape[2] // 8, 8, num_channels)
    dct = _dct_matrix()
    coefficients = _contract("bmvnjc,uj->bmvnuc", _contract("bminjc,vi->bmvnjc", blocks, dct), dct)
    coefficients = jnp.round(coefficients / steps) * steps
    blocks = _contract("bmvnjc,vi->bminjc", _contract("bmvnuc,uj->bmvnjc", coefficients, dct), dct)
    pixels = blocks.reshape(pixels.shape) + offset
    y = _contract("bhwc,ic->bhwi", pixels, np.linalg.inv(to_ycbcr)) / 127.5
    return jnp.clip(y[:, :height, :width], -1.0, 1.0)


def _contract(equation: str, a: Array, matrix: np.ndarray) -> Array:
    weights = jnp.asarray(matrix, "float32")
    return jnp.einsum(equation, a, weights, precision=jax.lax.Precision.HIGHEST)
