"""Blurs with a fixed kernel: Gaussian, given by the user, or random motion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from aps_jax.operators._correlation import correlate_axis, correlate_reflected, pad_axis
from aps_jax.operators.motion import motion_kernel
from aps_jax.operators.svd import SVD, axis_matrix, separable_svd
from aps_jax.tasks import declared
from aps_jax.types import Array, ImageShape, Key, Operator, bind, same_shape

#: Image side for which the published blurs are meant.
_PAPER_SIDE = 256


def blur_sizes(image_shape: ImageShape) -> tuple[int, float]:
    """Kernel size and Gaussian std that blurs have by default, by the shorter image side.

    From 256 pixels on they are the published 61 and 3.0. Below they shrink with the side, to no
    less than 5 and 1.0: 15 and 1.0 at 64 pixels.
    """
    ratio = min(1.0, min(image_shape) / _PAPER_SIDE)
    return max(5, 2 * int(30 * ratio) + 1), max(1.0, 3.0 * ratio)


@declared
def gaussian_blur(*, kernel_size: int | None, std: float | None) -> Operator:
    """Gaussian blur with reflected borders (the edge pixel is not repeated).

    Weights beyond int(4 std + 0.5) pixels are zero, as in `scipy.ndimage.gaussian_filter`, and
    so are those beyond the kernel. A constant image stays constant. What is left out depends on the
    images (`blur_sizes`), but the kernel is never smaller than the Gaussian's own support.

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C].
    """
    apply = bind(_gaussian_blur, kernel_size=kernel_size, std=std)
    svd = bind(_gaussian_svd, kernel_size=kernel_size, std=std)
    return Operator(apply=apply, name="gaussian_blur", is_linear=True, svd=svd)


def _gaussian_taps(
    x_shape: tuple[int, ...], *, kernel_size: int | None, std: float | None
) -> np.ndarray:
    """Weights of one axis, an odd number."""
    default_size, default_std = blur_sizes(same_shape(x_shape))
    std = default_std if std is None else std
    if kernel_size is None:
        kernel_size = max(default_size, 2 * int(4 * std + 0.5) + 1)
    radius = min(int(4 * std + 0.5), kernel_size // 2)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    return taps / taps.sum()


def _gaussian_svd(
    params: None, x_shape: tuple[int, ...], *, kernel_size: int | None, std: float | None
) -> SVD:
    del params
    taps = _gaussian_taps(x_shape, kernel_size=kernel_size, std=std)
    return separable_svd(
        *(
            axis_matrix(taps, n, first=-(len(taps) // 2), stride=1, num_out=n, mode="reflect")
            for n in x_shape[1:3]
        )
    )


def _gaussian_blur(params: None, x: Array, *, kernel_size: int | None, std: float | None) -> Array:
    del params
    taps = _gaussian_taps(x.shape, kernel_size=kernel_size, std=std)
    radius = len(taps) // 2
    for axis in (1, 2):
        num_out = x.shape[axis]
        x = pad_axis(x, radius, radius, axis=axis, mode="reflect")
        x = correlate_axis(x, taps, axis=axis, stride=1, num_out=num_out)
    return x


@declared
def blur(kernel: Array | np.ndarray) -> Operator:
    """Correlation of every channel with your own kernel, with reflected borders.

    A true convolution needs `kernel[::-1, ::-1]`. The kernel is used as given, not normalised, and
    it is an array leaf: another kernel of the same shape compiles nothing. The centre of [kh, kw]
    is at (kh // 2, kw // 2).

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C].

    Raises:
      ValueError: if `kernel` is not a finite real matrix.
    """
    kernel = np.asarray(kernel)
    if kernel.ndim != 2 or kernel.size == 0 or kernel.dtype.kind not in "fiu":
        raise ValueError(
            f"kernel must be a real array [kh, kw], got shape {kernel.shape} of {kernel.dtype}"
        )
    if not np.isfinite(kernel).all():
        raise ValueError("kernel must be finite, got NaN or infinity")
    return Operator(
        apply=bind(_kernel_blur), name="blur", params=jnp.asarray(kernel, "float32"), is_linear=True
    )


@declared
def motion_blur(*, kernel_size: int | None, intensity: float) -> Operator:
    """Motion blur along a random path, straight to very shaky, reflected borders.

    `init` draws the kernel [kernel_size, kernel_size] with NumPy and Pillow on the host: call it
    outside of `jit` and `vmap`. The same key gives the same kernel.

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C], its kernel not drawn yet.
    """
    return Operator(
        apply=bind(_kernel_blur),
        name="motion_blur",
        sample_params=bind(_sample_motion, kernel_size=kernel_size, intensity=intensity),
        is_linear=True,
    )


def _sample_motion(
    key: Key, image_shape: ImageShape, *, kernel_size: int | None, intensity: float
) -> Array:
    if isinstance(key, Tracer):
        raise ValueError(
            "motion_blur draws its kernel on the host; call init outside of jit and vmap"
        )
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    size = blur_sizes(image_shape)[0] if kernel_size is None else kernel_size
    kernel = motion_kernel(np.random.default_rng(seed), size=size, intensity=intensity)
    return jnp.asarray(kernel, "float32")


def _kernel_blur(params: Array, x: Array) -> Array:
    return correlate_reflected(x, params)
