"""What a restored photo is compared with, and how a measurement is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import metrics
from aps_jax.codec.magvit2 import reconstruct
from aps_jax.operators.residuals import residuals
from aps_jax.scores import lpips as perceptual
from aps_jax.types import Array, Codec, ImageShape, Operator, Perceptual, PyTree


def scores(
    images: Mapping[str, Array], photo: Array, distance: Perceptual | None
) -> dict[str, dict[str, float | None]]:
    """PSNR, SSIM and LPIPS of each image [H, W, 3] by name, against `photo` [H, W, 3].

    A score that the image is too small for, or that has no `distance`, is None.
    """
    batch = jnp.stack([jnp.asarray(image) for image in images.values()])
    table = jax.device_get(_scores(batch, jnp.asarray(photo), distance))
    rows = zip(*(table[name] for name in ("psnr", "ssim", "lpips")), strict=True)
    return {
        name: {
            score: None if math.isnan(value) else float(value)
            for score, value in zip(("psnr", "ssim", "lpips"), row, strict=True)
        }
        for name, row in zip(images, rows, strict=True)
    }


@jax.jit
def _scores(images: Array, photo: Array, distance: Perceptual | None) -> dict[str, Array]:
    photos = jnp.broadcast_to(photo[None], images.shape)
    side = min(photo.shape[:2])
    missing = jnp.full(images.shape[0], jnp.nan, jnp.float32)
    lpips = missing
    if distance is not None and side >= perceptual.MIN_SIDE:
        lpips = distance(jnp.clip(images, -1, 1), photos)
    return {
        "psnr": metrics.psnr(images, photos),
        "ssim": metrics.ssim(images, photos) if side >= metrics.SSIM_WINDOW else missing,
        "lpips": lpips,
    }


def baseline(y: PyTree, operator: Operator, image_shape: ImageShape) -> tuple[str, Array] | None:
    """The trivial restoration of `y` [1, ...]: a name and an image [H, W, 3], or None.

    "measurement" is y itself where it has the image's height and width, grey repeated to three
    channels; "bicubic" is the enlargement of a smaller image, centred as `super_resolution` is.
    """
    if not isinstance(y, jax.Array) or y.ndim != 4 or y.shape[-1] not in (1, 3):
        return None
    height, width = image_shape
    image = jnp.broadcast_to(y[0], (*y.shape[1:3], 3))
    if y.shape[1:3] == (height, width):
        return ("measurement", image)
    scale = math.ceil(max(height / y.shape[1], width / y.shape[2]))
    if not operator.is_image or scale <= 1:
        return None
    large = _resize(image, (scale * y.shape[1], scale * y.shape[2], 3), "cubic")
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return ("bicubic", large[top : top + height, left : left + width])


def codec_reconstruction(codec: Codec, photo: Array, decode_scale: int) -> Array:
    """`photo` [H, W, 3] through the codec, `decode_scale` times as large and averaged back.

    What the codec keeps of the photo: a yardstick, not a bound, since codes fitted to a measurement
    may decode to a better image than the encoder's.
    """
    height, width = photo.shape[:2]
    large = (1, height * decode_scale, width * decode_scale, 3)
    x = photo[None] if decode_scale == 1 else _resize(photo[None], large, "cubic")
    x = _reconstruct(codec, x)
    return x.reshape(height, decode_scale, width, decode_scale, 3).mean(axis=(1, 3))


# Compiled whole: one by one, their operations would compile many times over.
_reconstruct = jax.jit(reconstruct)
_resize = jax.jit(jax.image.resize, static_argnums=(1, 2))


#: What a restoration that follows its measurement still misses, root mean square on the scale
#: [-1, 1]: the codec has no image for every y. In the rows of `experiments/results/benchmark`, 228
#: restorations by APS and 228 reconstructions by the codec alone at sigma 0.05, over eight tasks,
#: miss y by 0.05 and 0.07 on average in the median and by 0.22 at most; the root mean square of
#: errors with the tails of a Laplace law is sqrt(2) times their mean.
MODEL_ERROR = 0.31
#: Standard normal quantile of one in a million.
_RARE = 4.75


def data_residual(
    operator: Operator, image: Array, y: PyTree, *, sigma: float, decoded: Array | None = None
) -> dict[str, float | bool]:
    """A(image) - y over the measured entries of one image, and whether noise explains it.

    Args:
      operator: A.
      image: [H, W, 3].
      y: measurement of one image.
      sigma: std of the noise.
      decoded: `image` before data consistency, which would explain a wrong operator, too; the image
        itself if left out.

    Returns:
      "mean_absolute", "root_mean_square", that of the decoded image "decoded_root_mean_square",
      "at_most" (`largest_residual`), and "is_far": the decoded image's is beyond that.
    """
    absolute, square, count = jax.device_get(_residual(operator, image, y))
    own = square if decoded is None else jax.device_get(_residual(operator, decoded, y))[1]
    size, limit = math.sqrt(own), largest_residual(sigma, float(count))
    return {
        "mean_absolute": float(absolute),
        "root_mean_square": math.sqrt(square),
        "decoded_root_mean_square": size,
        "at_most": limit,
        "is_far": not size <= limit,
    }


def largest_residual(sigma: float, count: float) -> float:
    """Root mean square that `count` entries of a fitting measurement exceed once in a million.

    The sum of squares of the noise is sigma^2 times a chi-square of `count` degrees of freedom,
    whose quantile is that of Wilson and Hilferty (1931); `MODEL_ERROR` comes on top.
    """
    spread = 2 / (9 * max(count, 1))
    quantile = (1 - spread + _RARE * math.sqrt(spread)) ** 3
    return math.sqrt(sigma**2 * quantile + MODEL_ERROR**2)


def residual_notes(residual: Mapping[str, Any], sigma: float) -> list[str]:
    """One line if the residual of `data_residual` is far from the noise, else nothing."""
    if not residual["is_far"]:
        return []
    size, limit = residual["decoded_root_mean_square"], residual["at_most"]
    return [
        "what the model restores does not explain the measurement: its residual "
        f"{size:.3g} is beyond {limit:.3g}, which noise of {sigma:g} and the model explain; check "
        "the task and its options (kernel, mask, scale), or give the sampler more steps "
        "(--num-steps)"
    ]


@jax.jit
def _residual(operator: Operator, image: Array, y: PyTree) -> tuple[Array, Array, Array]:
    pairs = residuals(operator, operator(image[None]), y)
    total = jnp.maximum(sum(jnp.sum(weight) for _, weight in pairs), 1)
    absolute = sum(jnp.sum(jnp.abs(r) * weight) for r, weight in pairs)
    return absolute / total, sum(jnp.sum(r**2 * weight) for r, weight in pairs) / total, total


def paste_known(operator: Operator, image: Array, y: Array) -> Array:
    """`image` [H, W, 3] with the measured pixels of `y` [1, H, W, 3] put back, noise and all.

    Raises:
      ValueError: if `y` does not consist of some of the image's own pixels.
    """
    if operator.observed is None or not operator.is_image or y.shape[1:] != image.shape:
        raise ValueError(
            f"operator {operator.name!r} does not measure single pixels, so there are none to paste"
        )
    mask = operator.observed(operator.params, y.shape)
    return jnp.where(mask[0] > 0, jnp.clip(y[0], -1, 1), image)


def measurement_view(y: Any, operator: Operator, image_shape: ImageShape) -> np.ndarray:
    """A picture [h, w, 1 or 3] in [-1, 1] of a measurement [1, ...], for people.

    Images are clipped. Other values are stretched to the full range, amplitudes on a logarithmic
    scale; what has no two dimensions is folded into a near-square.
    """
    y = np.asarray(y, np.float32)[0]
    is_picture = y.ndim == 3 and y.shape[-1] in (1, 3)
    if is_picture and (operator.is_image or y.shape[:2] == tuple(image_shape)):
        return np.clip(y, -1, 1)
    if y.min() >= 0:
        y = np.log1p(100 * y / max(float(y.max()), 1e-12))
    if not is_picture:
        y = y.reshape(y.shape[0], -1)
        y = y if y.shape[1] in (1, 3) else y.reshape(-1, 1)
        side = math.ceil(math.sqrt(len(y)))
        y = np.pad(y, ((0, side * side - len(y)), (0, 0))).reshape(side, side, -1)
    low, high = float(y.min()), float(y.max())
    return 2 * (y - low) / max(high - low, 1e-12) - 1


def spread_view(std: Any) -> tuple[np.ndarray, float]:
    """Grey picture [H, W, 1] of a standard deviation [H, W, 3], and the value that is white."""
    grey = np.mean(np.asarray(std, np.float32), axis=-1, keepdims=True)
    white = max(float(grey.max()), 1e-12)
    return 2 * grey / white - 1, white
