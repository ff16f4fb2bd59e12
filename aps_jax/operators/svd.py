"""Singular value decompositions A = U S V^T of operators that have one in closed form.

An `Operator.svd` is a function `(params, x_shape) -> SVD`; samplers that work in the singular basis
(`aps_jax.samplers.ddrm`) read it. Those of this package are of masks, of filters that act on rows
and columns one after the other, and, for an operator of your own, of circular convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.types import Array

#: Singular values below this share of the largest one are zero: float32 knows no better.
LEAST_SHARE = 1e-5


@dataclasses.dataclass(frozen=True)
class SVD:
    """A decomposition, in terms of coefficients that are laid out as the images [B, H, W, C].

    Attributes:
      values: singular values, not negative, broadcastable to the coefficients; 0 for what is not
        measured.
      forward: x -> V^T x, an isometry of images.
      backward: coefficients -> V of them, its inverse.
      measured: y -> U^T y, each number in the place of its singular value, 0 elsewhere.
    """

    values: Array
    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    measured: Callable[[Array], Array]


def _same(x: Array) -> Array:
    return x


def identity_svd(params: None, x_shape: tuple[int, ...]) -> SVD:
    """Of the identity."""
    del params, x_shape
    return SVD(jnp.ones((1, 1, 1, 1), jnp.float32), _same, _same, _same)


def mask_svd(params: Array, x_shape: tuple[int, ...]) -> SVD:
    """Of x -> mask x, for a mask of zeros and ones [H, W, 1] or [B, H, W, 1]."""
    del x_shape
    mask = params if params.ndim == 4 else params[None]
    return SVD(mask, _same, _same, lambda y: mask * y)


def channel_svd(weights: Sequence[float]) -> SVD:
    """Of a weighted sum of the channels, [B, H, W, C] -> [B, H, W, 1]."""
    left, values, right = np.linalg.svd(np.asarray([weights], np.float64))
    padded = np.append(values, np.zeros(len(weights) - 1))
    basis = jnp.asarray(right.T, jnp.float32)
    place = jnp.asarray(left[0, 0] * np.eye(len(weights))[:1], jnp.float32)
    return SVD(
        values=jnp.asarray(padded, jnp.float32).reshape(1, 1, 1, -1),
        forward=lambda x: _mix(x, basis),
        backward=lambda c: _mix(c, basis.T),
        measured=lambda y: _mix(y, place),
    )


def _mix(x: Array, matrix: Array) -> Array:
    return jnp.einsum("bhwc,cd->bhwd", x, matrix, precision=jax.lax.Precision.HIGHEST)


def axis_matrix(
    taps: np.ndarray, size: int, *, first: int, stride: int, num_out: int, mode: str
) -> np.ndarray:
    """The filter of one axis as a float64 matrix [num_out, size].

    Args:
      taps: weights.
      size: pixels along the axis.
      first: input pixel that meets the first tap of output 0; negative ones are in the border.
      stride: input pixels per output.
      num_out: outputs.
      mode: of `numpy.pad`, how the border is filled.
    """
    last = first + stride * (num_out - 1) + len(taps) - 1
    low, high = max(0, -first), max(0, last - size + 1)
    padded = np.pad(np.eye(size), ((low, high), (0, 0)), mode=mode)[max(0, first) :]  # pyright: ignore[reportCallIssue, reportArgumentType]
    return np.stack([taps @ padded[stride * j : stride * j + len(taps)] for j in range(num_out)])


def separable_svd(rows: np.ndarray, columns: np.ndarray) -> SVD:
    """Of images X to `rows @ X @ columns.T`, channel by channel.

    Args:
      rows: float64 [h, H], what happens along the height.
      columns: float64 [w, W].
    """
    left_r, values_r, right_r = np.linalg.svd(rows)
    left_c, values_c, right_c = np.linalg.svd(columns)
    shape = (rows.shape[1], columns.shape[1])
    values = np.zeros(shape)
    values[: len(values_r), : len(values_c)] = np.outer(values_r, values_c)
    values[values < LEAST_SHARE * values.max()] = 0
    f32 = lambda matrix: jnp.asarray(matrix, jnp.float32)  # noqa: E731 - one conversion
    is_measured = f32(values > 0)[None, ..., None]

    def both(x: Array, first: np.ndarray, second: np.ndarray) -> Array:
        return jnp.einsum(
            "ih,bhwc,jw->bijc", f32(first), x, f32(second), precision=jax.lax.Precision.HIGHEST
        )

    def measured(y: Array) -> Array:
        found = both(y, left_r.T, left_c.T)
        missing = [(0, whole - own) for whole, own in zip(shape, found.shape[1:3], strict=True)]
        return is_measured * jnp.pad(found, [(0, 0), *missing, (0, 0)])

    return SVD(
        values=f32(values)[None, ..., None],
        forward=lambda x: both(x, right_r, right_c),
        backward=lambda c: both(c, right_r.T, right_c.T),
        measured=measured,
    )


def circular_svd(kernel: Array, x_shape: tuple[int, ...]) -> SVD:
    """Of the circular convolution of every channel with one kernel, by FFT.

    y[i, j] = sum_{a, b} kernel[a, b] x[i - a + kh // 2, j - b + kw // 2], indices modulo the size
    of the image. The coefficients are complex.

    Args:
      kernel: weights [kh, kw], no larger than the image.
      x_shape: (B, H, W, C).
    """
    height, width = kernel.shape
    placed = jnp.zeros(x_shape[1:3], jnp.float32).at[:height, :width].set(kernel)
    transfer = jnp.fft.fft2(jnp.roll(placed, (-(height // 2), -(width // 2)), (0, 1)))
    transfer = transfer[None, ..., None]
    size = jnp.abs(transfer)
    is_measured = size >= LEAST_SHARE * jnp.max(size)
    phase = jnp.where(is_measured, transfer / jnp.where(is_measured, size, 1.0), 0.0)

    def forward(x: Array) -> Array:
        return jnp.fft.fft2(x, axes=(1, 2), norm="ortho")

    return SVD(
        values=jnp.where(is_measured, size, 0.0),
        forward=forward,
        backward=lambda c: jnp.real(jnp.fft.ifft2(c, axes=(1, 2), norm="ortho")),
        measured=lambda y: jnp.conj(phase) * forward(y),
    )
