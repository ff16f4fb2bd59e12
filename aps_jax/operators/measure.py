"""The one place that adds noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer

from aps_jax.types import Array, Key, Operator, PyTree, Scalar, image_keys


def measure(
    key: Key, x: Array, *, operator: Operator, sigma: Scalar, masked_noise: bool = False
) -> PyTree:
    """Measures images: y = A(x) + sigma n with n ~ N(0, I).

    The noise of image i depends on its own key only, not on the batch around it. `y` is not
    clipped.

    Args:
      key: one typed key, folded with the position in the batch, or one key per image [B].
      x: images, floating point [B, H, W, C] in [-1, 1].
      operator: A, its random state already drawn.
      sigma: noise standard deviation on the scale of A(x), a number >= 0.
      masked_noise: adds noise also where nothing was observed, as the public DAPS code does; by
        default those entries stay exactly A(x), which is 0 for missing pixels.

    Returns:
      The measurement, shaped like A(x); a tuple for stacked operators.

    Raises:
      ValueError: if an argument is out of range or the operator's random state was not drawn.
    """
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating-point images [B, H, W, C] in [-1, 1], got shape {x.shape} of "
            f"{x.dtype}"
        )
    if not isinstance(sigma, Tracer):
        if jnp.ndim(sigma) != 0 or not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be one finite number >= 0, got {sigma!r}")
    keys = image_keys(key, x.shape[0])
    clean = operator(x.astype("float32"))
    noise = jax.vmap(_unit_noise)(keys, clean)
    if operator.observed is not None and not masked_noise:
        mask = operator.observed(operator.params, jax.tree.map(jnp.shape, clean))
        noise = jax.tree.map(jnp.multiply, noise, mask)
    sigma = jnp.asarray(sigma, "float32")
    return jax.tree.map(lambda a, n: a + sigma * n, clean, noise)


def _unit_noise(key: Key, clean: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(clean)
    noise = [
        jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noise)
