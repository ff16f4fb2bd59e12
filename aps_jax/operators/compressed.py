"""Compressed sensing with a dense random matrix."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from aps_jax.tasks import declared
from aps_jax.types import Array, ImageShape, Key, Operator, bind

#: Measurements per pixel if nothing is said of their number.
_FRACTION = 0.25


@declared
def compressed_sensing(
    *, num_measurements: int | None, fraction: float | None, ensemble: str
) -> Operator:
    """Random projections of each channel: y = M x, with one matrix M [m, H W] for all channels.

    `init` draws M and remembers the image size, which `y` does not show. The matrix has m H W
    entries (64 MB for a quarter of the pixels of a 64x64 image is the practical end): use it for
    small images. As a share, m = max(1, int(H W fraction)). Entries are +-1/sqrt(m) ("signs") or
    normal, of variance 1/m ("gaussian").

    Returns:
      Linear operator [B, H, W, C] -> [B, m, C], its matrix not drawn yet.

    Raises:
      ValueError: if both sizes are given.
    """
    if num_measurements is not None and fraction is not None:
        raise ValueError(
            "compressed_sensing takes either num_measurements or fraction, got "
            f"num_measurements={num_measurements!r}, fraction={fraction!r}"
        )
    if fraction is None:
        fraction = _FRACTION
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
    assert operator.sample_params is not None  # Of `compressed_sensing`.
    return dataclasses.replace(
        operator,
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
    fraction: float,
    ensemble: str,
) -> Array:
    num_pixels = math.prod(image_shape)
    rows = num_measurements or max(1, int(num_pixels * fraction))
    if ensemble == "signs":  # A draw of 64 bits, where JAX has them, would be another.
        heads = jax.random.bernoulli(key, jnp.float32(0.5), (rows, num_pixels))
        matrix = 2 * heads.astype("float32") - 1
    else:
        matrix = jax.random.normal(key, (rows, num_pixels), "float32")
    return matrix / math.sqrt(rows)


def _project(params: Array, x: Array) -> Array:
    batch, height, width, num_channels = x.shape
    if height * width != params.shape[1]:
        raise ValueError(
            f"compressed_sensing was drawn for images of {params.shape[1]} pixels, got images of "
            f"shape {x.shape}"
        )
    pixels = x.reshape(batch, height * width, num_channels)
    return jnp.einsum("mn,bnc->bmc", params, pixels, precision=jax.lax.Precision.HIGHEST)
