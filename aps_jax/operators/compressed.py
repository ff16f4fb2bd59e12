"""Compressed sensing with a dense random matrix."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aps_jax.operators._checks import real, whole
from aps_jax.types import Array, ImageShape, Key, Operator, bind

_ENSEMBLES = ("signs", "gaussian")


def compressed_sensing(
    *,
    num_measurements: int | None = None,
    fraction: float | None = None,
    ensemble: str = "signs",
) -> Operator:
    """Random projections of each channel: y = M x, with one matrix M [m, H W] for all channels.

    `init` draws M and remembers the image size, which `y` does not show. The matrix has m H W
    entries (64 MB for a quarter of the pixels of a 64x64 image is the practical end): use it for
    small images.

    Args:
      num_measurements: rows m of the matrix, >= 1; give this or `fraction`.
      fraction: m as a share of the pixels, in (0, 1]; m = max(1, int(H W fraction)).
      ensemble: "signs" for entries +-1/sqrt(m), "gaussian" for normal entries of variance 1/m.

    Returns:
      Linear operator [B, H, W, C] -> [B, m, C], its matrix not drawn yet.

    Raises:
      ValueError: if an argument is out of range, or not exactly one of the two sizes is given.
    """
    if (num_measurements is None) == (fraction is None):
        raise ValueError(
            "compressed_sensing needs either num_measurements or fraction, got "
            f"num_measurements={num_measurements!r}, fraction={fraction!r}"
        )
    if num_measurements is not None:
        num_measurements = whole("num_measurements", num_measurements, low=1)
    if fraction is not None:
        fraction = real("fraction", fraction, high=1.0, open_low=True)
    if ensemble not in _ENSEMBLES:
        raise ValueError(f"ensemble must be one of {', '.join(_ENSEMBLES)}, got {ensemble!r}")
    return Operator(
        apply=bind(_project),
        name="compressed_sensing",
        sample_params=bind(
            _sample_matrix,
            num_measurements=num_measurements,
            fraction=fraction,
            ensemble=ensemble,
        ),
        image_shape=bind(_stored_shape, shape=None),
        is_linear=True,
        is_image=False,
        draw=bind(_draw),
    )


def _draw(operator: Operator, key: Key, image_shape: ImageShape) -> Operator:
    return operator.replace(
        params=operator.sample_params(key, image_shape),
        image_shape=bind(_stored_shape, shape=image_shape),
    )


def _stored_shape(y_shape: tuple[int, ...], *, shape: ImageShape | None) -> ImageShape:
    del y_shape
    if shape is None:
        raise ValueError(
            "operator 'compressed_sensing' knows its image size only after "
            "operator.init(key, image_shape)"
        )
    return shape


def _sample_matrix(
    key: Key,
    image_shape: ImageShape,
    *,
    num_measurements: int | None,
    fraction: float | None,
    ensemble: str,
) -> Array:
    num_pixels = math.prod(image_shape)
    rows = num_measurements or max(1, int(num_pixels * fraction))
    sample = jax.random.rademacher if ensemble == "signs" else jax.random.normal
    return sample(key, (rows, num_pixels), "float32") / math.sqrt(rows)


def _project(params: Array, x: Array) -> Array:
    batch, height, width, num_channels = x.shape
    if height * width != params.shape[1]:
        raise ValueError(
            f"compressed_sensing was drawn for images of {params.shape[1]} pixels, got images of "
            f"shape {x.shape}"
        )
    pixels = x.reshape(batch, height * width, num_channels)
    return jnp.einsum("mn,bnc->bmc", params, pixels, precision=jax.lax.Precision.HIGHEST)
