"""Optimisers of optax that work under JAX's strict promotion of dtypes, too."""

from __future__ import annotations

import jax
import optax

from aps_jax.types import PyTree


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser; inside, Python numbers may meet integers.

    Optax raises decay rates to the power of an int32 count, which a program that has set
    `jax_numpy_dtype_promotion="strict"` may not. Nothing changes in the values.
    """

    def init(params: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(init, update)
