"""Pointwise and Fourier operators: denoising, HDR, quantisation, phase retrieval."""

from __future__ import annotations

import jax.numpy as jnp

from aps_jax.codec.expectation import straight_through
from aps_jax.operators.svd import identity_svd
from aps_jax.tasks import declared
from aps_jax.types import Array, ImageShape, Operator, bind


@declared
def denoising() -> Operator:
    """The identity: only the noise is to be removed."""
    return Operator(apply=bind(_identity), name="denoising", is_linear=True, svd=bind(identity_svd))


def _identity(params: None, x: Array) -> Array:
    del params
    return x


@declared
def hdr(*, gain: float) -> Operator:
    """Overexposure: clip(gain x, -1, 1). Saturated pixels have zero gradient.

    Returns:
      Operator [B, H, W, C] -> [B, H, W, C].
    """
    return Operator(apply=bind(_hdr, gain=gain), name="hdr")


def _hdr(params: None, x: Array, *, gain: float) -> Array:
    del params
    return jnp.clip(gain * x, -1.0, 1.0)


@declared
def quantization(*, bits: int) -> Operator:
    """Rounding to 2**bits equally spaced levels from -1 to 1.

    The gradient passes straight through: it is that of the identity.

    Returns:
      Operator [B, H, W, C] -> [B, H, W, C].
    """
    return Operator(
        apply=bind(_quantize, num_levels=2**bits), name="quantization", has_true_gradient=False
    )


def _quantize(params: None, x: Array, *, num_levels: int) -> Array:
    del params
    steps = (num_levels - 1) / 2
    rounded = jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * steps) / steps - 1.0
    return straight_through(x, rounded)


@declared
def phase_retrieval(*, oversample: float) -> Operator:
    """Fourier amplitudes of the zero-padded image; the phase is lost.

    The image, mapped to [0, 1], gets int(oversample / 8 * side) zeros on every side; `y` is the
    amplitude of its orthonormal 2-D transform per channel, zero frequency in the centre. The
    measurement does not change when the image is rotated by 180 degrees.

    Returns:
      Operator [B, H, W, C] -> [B, H + 2 pad, W + 2 pad', C]; `y` is not an image.
    """
    return Operator(
        apply=bind(_amplitude, oversample=oversample),
        name="phase_retrieval",
        image_shape=bind(_unpadded_shape, oversample=oversample),
        is_image=False,
    )


def _padding(side: int, oversample: float) -> int:
    return int(oversample / 8 * side)


def _amplitude(params: None, x: Array, *, oversample: float) -> Array:
    del params
    rows, columns = (_padding(side, oversample) for side in x.shape[1:3])
    padded = jnp.pad((x + 1.0) / 2.0, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    # Channels first: FFT libraries want the transformed axes last.
    spectrum = jnp.fft.fft2(jnp.moveaxis(padded, -1, 1), norm="ortho")
    amplitude = jnp.abs(jnp.fft.fftshift(spectrum, axes=(2, 3)))
    return jnp.moveaxis(amplitude, 1, -1)


def _unpadded_shape(y_shape: tuple[int, ...], *, oversample: float) -> ImageShape:
    height, width = (_unpadded(side, oversample) for side in y_shape[1:3])
    return (height, width)


def _unpadded(padded: int, oversample: float) -> int:
    for side in range(1, padded + 1):
        if side + 2 * _padding(side, oversample) == padded:
            return side
    raise ValueError(
        f"phase_retrieval: no image side gives {padded} amplitudes at oversample {oversample}"
    )
