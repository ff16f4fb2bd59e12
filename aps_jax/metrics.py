"""PSNR and SSIM on the image convention of this library: float32 [B, H, W, C] in [-1, 1].

Both agree with scikit-image to 1e-4 (tested); the settings are in the docstrings, because scores
computed with other settings cannot be compared. Values are clipped to [-1, 1] first, never
rescaled: a saved image is clipped too, so the score is that of the picture a reader sees.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from aps_jax.sampling.checks import channels_last, check_image
from aps_jax.types import Array

#: Width of the range [-1, 1].
_DATA_RANGE = 2.0
_SSIM_STD = 1.5
#: Taps of the SSIM window: 3.5 standard deviations to each side, as in scikit-image.
SSIM_WINDOW = 11


def _scored_pair(a: Array, b: Array, clip: bool) -> tuple[Array, Array]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"images to compare must share one shape [B, H, W, C]; received {a.shape} and {b.shape}"
        )
    if hint := channels_last(a.shape):
        raise ValueError(f"images to compare have shape {a.shape}{hint}")
    for x in (a, b):
        check_image("images to compare", x)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return (jnp.clip(a, -1.0, 1.0), jnp.clip(b, -1.0, 1.0)) if clip else (a, b)


def psnr(a: Array, b: Array, *, clip: bool = True) -> Array:
    """Peak signal-to-noise ratio in dB, over all pixels and channels of each image.

    Equals `skimage.metrics.peak_signal_noise_ratio(a, b, data_range=2)`.

    Args:
      a: images [B, H, W, C] in [-1, 1].
      b: images of the same shape; the order of the two does not matter.
      clip: clip both to [-1, 1] before scoring, the convention of the field.

    Returns:
      float32 [B]; infinity where the two images are equal.

    Raises:
      ValueError: if the shapes differ or are not [B, H, W, C], or the values are not floating-point
        numbers on the scale [-1, 1].
    """
    a, b = _scored_pair(a, b, clip)
    error = jnp.mean((a - b) ** 2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(_DATA_RANGE**2 / error)


def _window_mean(x: Array) -> Array:
    """Gaussian mean around every pixel whose window lies inside the image, [B, H-10, W-10, C]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / _SSIM_STD) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = x.shape[1] - SSIM_WINDOW + 1, x.shape[2] - SSIM_WINDOW + 1
    # Sums of shifted images, not a convolution: those run at reduced precision on some devices.
    x = jnp.asarray(sum(float(w) * x[:, i : i + height] for i, w in enumerate(weights)))
    return jnp.asarray(sum(float(w) * x[:, :, i : i + width] for i, w in enumerate(weights)))


def ssim(a: Array, b: Array, *, clip: bool = True) -> Array:
    """Structural similarity of Wang et al. (2004), per image.

    Equals `skimage.metrics.structural_similarity(a, b, data_range=2, channel_axis=-1,
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`: an 11-tap Gaussian window,
    K1 = 0.01, K2 = 0.03, averaged over windows that lie inside the image and over channels.

    Args:
      a: images [B, H, W, C] in [-1, 1], both sides at least 11 pixels.
      b: images of the same shape; the order of the two does not matter.
      clip: clip both to [-1, 1] before scoring, the convention of the field.

    Returns:
      float32 [B], at most 1 and equal to 1 for equal images.

    Raises:
      ValueError: as `psnr`, or if they are smaller than the window.
    """
    a, b = _scored_pair(a, b, clip)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels; received {a.shape}"
        )
    c1, c2 = (0.01 * _DATA_RANGE) ** 2, (0.03 * _DATA_RANGE) ** 2
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a * mean_a
    var_b = _window_mean(b * b) - mean_b * mean_b
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))
