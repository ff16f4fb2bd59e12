"""Super-resolution: antialiased bicubic downsampling."""

from __future__ import annotations

import math

import numpy as np

from aps_jax.operators._correlation import correlate_axis, pad_axis
from aps_jax.operators.svd import SVD, axis_matrix, separable_svd
from aps_jax.tasks import declared
from aps_jax.types import Array, ImageShape, Operator, bind


@declared
def super_resolution(*, scale: int) -> Operator:
    """Downsampling by a whole factor with the antialiased bicubic filter of MATLAB's `imresize`.

    The cubic (a = -0.5) is stretched by `scale`; borders mirror with the edge pixel repeated, which
    `jax.image.resize` does not do. A side that `scale` does not divide gives ceil(side / scale)
    pixels, centred on the image; `image_shape` then answers `scale` times the measurement, so crop
    or pad such images first to get the same size back. A constant image stays constant.

    Returns:
      Linear operator [B, H, W, C] -> [B, ceil(H / scale), ceil(W / scale), C].
    """
    return Operator(
        apply=bind(_downsample, scale=scale),
        name="super_resolution",
        image_shape=bind(_upsampled_shape, scale=scale),
        is_linear=True,
        svd=bind(_svd, scale=scale),
    )


def _downsample(params: None, x: Array, *, scale: int) -> Array:
    del params
    for axis in (1, 2):
        size = x.shape[axis]
        num_out = math.ceil(size / scale)
        first, taps = bicubic_taps(scale, size)
        last = first + scale * (num_out - 1) + len(taps) - 1
        x = pad_axis(x, max(0, -first), max(0, last - size + 1), axis=axis, mode="symmetric")
        if first > 0:  # Only for scales far beyond the image size.
            x = x[:, first:] if axis == 1 else x[:, :, first:]
        x = correlate_axis(x, taps, axis=axis, stride=scale, num_out=num_out)
    return x


def _svd(params: None, x_shape: tuple[int, ...], *, scale: int) -> SVD:
    del params

    def matrix(size: int) -> np.ndarray:
        first, taps = bicubic_taps(scale, size)
        return axis_matrix(
            taps, size, first=first, stride=scale, num_out=math.ceil(size / scale), mode="symmetric"
        )

    return separable_svd(matrix(x_shape[1]), matrix(x_shape[2]))


def bicubic_taps(scale: int, size: int) -> tuple[int, np.ndarray]:
    """Filter of one axis of `size` pixels, the same for every output pixel.

    Args:
      scale: downsampling factor.
      size: pixels along the axis.

    Returns:
      Index of the input pixel that meets the first tap of output 0 (usually negative), and the taps
      in float64, which sum to 1.
    """
    # Centre of output 0 in input pixels; output j lies `scale * j` further on.
    centre = (scale - 1) / 2 - (scale * math.ceil(size / scale) - size) / 2
    positions = np.arange(math.ceil(centre - 2 * scale), math.floor(centre + 2 * scale) + 1)
    weights = _cubic((positions - centre) / scale)
    kept = np.flatnonzero(np.abs(weights) > 1e-12)
    positions, weights = positions[kept[0] : kept[-1] + 1], weights[kept[0] : kept[-1] + 1]
    return int(positions[0]), weights / weights.sum()


def _cubic(u: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    inner = 1.5 * u**3 - 2.5 * u**2 + 1
    outer = -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2
    return np.where(u <= 1, inner, np.where(u <= 2, outer, 0.0))


def _upsampled_shape(y_shape: tuple[int, ...], *, scale: int) -> ImageShape:
    return (scale * y_shape[1], scale * y_shape[2])
