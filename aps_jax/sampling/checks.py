"""What images and measurements must be before anything is computed from them.

Shapes and dtypes are known while JAX traces; values only of arrays that hold some, so ranges are
checked where those come in: the command line, `restore`, and scores outside `jit`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from aps_jax.types import Array, ImageShape, Operator, PyTree

#: Root mean square that no picture on the scale [-1, 1] reaches, with some room for values beyond.
_LARGEST_MEAN = 2.0


def check_dtype(name: str, x: Array) -> None:
    """ValueError unless `x` holds floating-point numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating-point numbers on the scale [-1, 1], got {x.dtype}; "
            "x / 127.5 - 1 maps 0..255 to that"
        )


def channels_last(shape: tuple[int, ...]) -> str:
    """A sentence for a shape that looks like [B, C, H, W], else nothing."""
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[3] in (1, 3):
        return ""
    return "; channels come last here: move them with jnp.moveaxis(x, 1, -1)"


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` are known now, and not traced."""
    return not isinstance(x, Tracer)


def check_image(name: str, x: Array) -> None:
    """Checks images [B, H, W, C] for scores.

    Single values may lie outside [-1, 1], as those of noisy or enlarged pictures do; their root
    mean square, which is at most 1 in a picture, tells another scale.

    Raises:
      ValueError: not floating-point, or, where values are known, on another scale.
    """
    check_dtype(name, x)
    if is_concrete(x):
        _check_scale(name, x, _LARGEST_MEAN)


def check_measurement(operator: Operator, y: PyTree) -> None:
    """ValueError unless every array of `y` holds floating-point numbers, channels last."""
    for leaf in jax.tree.leaves(y):
        check_dtype("y", leaf)
        hint = channels_last(leaf.shape) if operator.is_image else ""
        if hint:
            raise ValueError(f"y has shape {leaf.shape}{hint}")


def fit_shape(
    operator: Operator, y: PyTree, *, image_shape: ImageShape | None, num_channels: int = 3
) -> ImageShape:
    """Size (H, W) of the images behind a measurement of B images.

    Args:
      operator: A.
      y: measurement.
      image_shape: (H, W), or None to infer it from the operator.
      num_channels: of the images.

    Raises:
      ValueError: the shape of y is not one that the operator gives.
    """
    y_shape = jax.tree.map(lambda leaf: leaf.shape, y)
    check_measurement(operator, y)
    for leaf in jax.tree.leaves(y):
        if leaf.ndim < 2:
            raise ValueError(f"y has shape {y_shape}; its first axis must be the batch: y[None]")
    image_shape = image_shape or operator.image_shape(y_shape)
    batch = jax.tree.leaves(y)[0].shape[0]
    expected = operator.output_shape((batch, *image_shape, num_channels))
    if expected != y_shape:
        raise ValueError(
            f"y has shape {y_shape}; operator {operator.name!r} gives {expected} "
            f"for images of {image_shape}"
        )
    return image_shape


def check_known_tokens(tokens: Array | None, num_codes: int) -> None:
    """ValueError unless tokens are integers, of known values from 0 to K, which is unknown."""
    if tokens is None:
        return
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"known_tokens must be integers, got {tokens.dtype}")
    if not is_concrete(tokens) or not tokens.size:
        return
    least, most = int(np.min(tokens)), int(np.max(tokens))
    if least < 0 or most > num_codes:
        raise ValueError(
            f"known_tokens go from {least} to {most}; they must be from 0 to {num_codes - 1}, and "
            f"{num_codes} where a token is unknown"
        )


def check_measured_values(operator: Operator, y: PyTree, sigma: float) -> None:
    """Checks the values of a measurement that is at hand.

    Noise pushes values out of [-1, 1], without a limit. But where A gives images, the mean square
    of y is at most 1 + sigma^2, and twice the root of that leaves room for a wrong sigma; 0..255 is
    far beyond. What other operators give has no scale of its own, so nothing is said of it.

    Raises:
      ValueError: a value is not finite, or y is an image on another scale.
    """
    for leaf in jax.tree.leaves(y):
        if not is_concrete(leaf):
            continue
        values = np.asarray(leaf, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("y contains NaN or infinity; every value must be a finite number")
        if operator.is_image and is_concrete(sigma):
            _check_scale("y", values, _LARGEST_MEAN * math.sqrt(1 + sigma**2))


def _check_scale(name: str, x: Any, limit: float) -> None:
    size = math.sqrt(np.mean(np.square(np.asarray(x, np.float64)))) if np.size(x) else 0.0
    if size > limit:
        raise ValueError(
            f"{name} has a root mean square of {size:.3g}, so it is not on the scale [-1, 1]; "
            "x / 127.5 - 1 maps 0..255 to that"
        )
