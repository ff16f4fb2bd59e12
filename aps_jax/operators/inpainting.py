"""Inpainting: some pixels are missing, in all channels at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.operators.svd import mask_svd
from aps_jax.tasks import declared
from aps_jax.types import Array, ImageShape, Key, Operator, bind


@declared
def inpainting_random(*, fraction: float) -> Operator:
    """Random pixels are missing: exactly int(H W fraction) of them, 0 in the measurement.

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C], its mask [H, W, 1] not drawn yet.
    """
    return _inpainting("inpainting_random", sample=bind(_random_mask, fraction=fraction))


@declared
def inpainting_box(*, box_size: tuple[int, int] | None, margin: int | None) -> Operator:
    """A box at a random place is missing, `margin` pixels or more away from every border.

    A box need not be square: (height, width). The defaults are half the sides and an eighth of the
    shorter one: 128-pixel boxes with margin 32 at 256 pixels, as in DAPS.

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C], its mask [H, W, 1] not drawn yet; drawing it is
      a ValueError if the box does not fit the image.
    """
    return _inpainting("inpainting_box", sample=bind(_box_mask, size=box_size, margin=margin))


@declared
def inpainting_mask(mask: Array | np.ndarray) -> Operator:
    """Your own mask of measured pixels; an array leaf, so a new mask compiles nothing.

    Returns:
      Linear operator [B, H, W, C] -> [B, H, W, C].

    Raises:
      ValueError: if `mask` has another shape or other values.
    """
    mask = np.asarray(mask)
    if mask.ndim == 2:
        mask = mask[:, :, None]
    if mask.ndim not in (3, 4) or mask.shape[-1] != 1 or mask.size == 0:
        raise ValueError(f"mask must be [H, W], [H, W, 1] or [B, H, W, 1], got shape {mask.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("mask must hold only 0 (missing) and 1 (measured)")
    return _inpainting("inpainting_mask", params=jnp.asarray(mask, "float32"))


def _inpainting(name: str, *, params: Array | None = None, sample=None) -> Operator:
    return Operator(
        apply=bind(_apply_mask, name=name),
        name=name,
        params=params,
        sample_params=sample,
        observed=bind(_observed),
        is_linear=True,
        svd=bind(mask_svd),
    )


def _apply_mask(params: Array, x: Array, *, name: str) -> Array:
    mask = params if params.ndim == 4 else params[None]
    fits = mask.shape[1:3] == x.shape[1:3] and mask.shape[0] in (1, x.shape[0])
    if x.ndim != 4 or not fits:
        raise ValueError(
            f"{name} has a mask of shape {params.shape}, got images of shape {x.shape}"
        )
    return mask * x


def _observed(params: Array, y_shape: tuple[int, ...]) -> Array:
    del y_shape
    return params if params.ndim == 4 else params[None]


def _random_mask(key: Key, image_shape: ImageShape, *, fraction: float) -> Array:
    height, width = image_shape
    order = jax.random.permutation(key, height * width)
    num_missing = int(height * width * fraction)
    return (order >= num_missing).astype("float32").reshape(height, width, 1)


def _box_mask(
    key: Key, image_shape: ImageShape, *, size: tuple[int, int] | None, margin: int | None
) -> Array:
    height, width = size or tuple(max(1, side // 2) for side in image_shape)
    margin = min(image_shape) // 8 if margin is None else margin
    if height + 2 * margin > image_shape[0] or width + 2 * margin > image_shape[1]:
        raise ValueError(
            f"inpainting_box: a {height}x{width} box with margin {margin} does not fit an image of "
            f"{image_shape[0]}x{image_shape[1]} pixels"
        )
    inside = []
    for axis_key, side, extent in zip(
        jax.random.split(key), image_shape, (height, width), strict=True
    ):
        # The upper end is exclusive, as in DAPS, unless only one place is left.
        end = max(side - margin - extent, margin + 1)
        start = jax.random.randint(axis_key, (), margin, end, jnp.int32)
        pixel = jnp.arange(side, dtype=jnp.int32)
        inside.append((pixel >= start) & (pixel < start + extent))
    box = inside[0][:, None] & inside[1][None, :]
    return 1.0 - box.astype("float32")[:, :, None]
