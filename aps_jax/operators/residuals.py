"""What a measurement leaves unexplained, over the entries that were measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aps_jax.types import Array, Operator, PyTree


def residuals(operator: Operator, prediction: PyTree, y: PyTree) -> list[tuple[Array, Array]]:
    """Pairs (residual, weight), both [B, n], one per array of the measurement.

    The weight is 1 for measured entries and 0 for the others (missing pixels).
    """
    if operator.observed is None:
        masks = jax.tree.map(jnp.ones_like, y)
    else:
        observed = operator.observed(operator.params, jax.tree.map(lambda leaf: leaf.shape, y))
        masks = jax.tree.map(lambda mask, leaf: jnp.broadcast_to(mask, leaf.shape), observed, y)
    difference = jax.tree.map(jnp.subtract, prediction, y)
    leaves = (jax.tree.leaves(tree) for tree in (difference, masks))
    return [(_per_image(r), _per_image(m)) for r, m in zip(*leaves, strict=True)]


def _per_image(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def absolute_error(operator: Operator, prediction: PyTree, y: PyTree) -> Array:
    """Mean |A(x) - y| over the measured entries, per image [B]; stacked measurements add up."""
    means = [
        jnp.sum(jnp.abs(r) * w, axis=1) / jnp.maximum(jnp.sum(w, axis=1), 1)
        for r, w in residuals(operator, prediction, y)
    ]
    return jnp.sum(jnp.stack(means), axis=0)


def squared_error(operator: Operator, prediction: PyTree, y: PyTree) -> Array:
    """||A(x) - y||^2 over the measured entries, per image [B]."""
    sums = [jnp.sum(r**2 * w, axis=1) for r, w in residuals(operator, prediction, y)]
    return jnp.sum(jnp.stack(sums), axis=0)
