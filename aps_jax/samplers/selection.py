"""Choosing among candidates, or particles, of the same row by how well they fit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.sampling.target import Target
from aps_jax.types import Array, Key, PyTree

#: "argmax" takes the best; "sample" draws with weights exp(value / temperature); "standardized"
#: divides values by their spread over the candidates first, so no scale of energies saturates it.
RULES = ("argmax", "sample", "standardized")


def log_weights(values: Array, rule: str, temperature: float) -> Array:
    """Unnormalised log-weights [M, R] of `values` [M, R] for "sample" and "standardized".

    A value that is not finite gets no weight, unless no value of its row is finite.
    """
    values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
    values = jnp.where(jnp.all(jnp.isinf(values), axis=0, keepdims=True), 0.0, values)
    if rule == "standardized":
        is_finite = jnp.isfinite(values)
        mean = jnp.mean(values, axis=0, where=is_finite, keepdims=True)
        spread = jnp.std(values, axis=0, where=is_finite, keepdims=True)
        # Equal values differ by rounding only, which must not be blown up.
        spread = jnp.maximum(spread, 1e-6 * (1 + jnp.abs(mean)))
        values = (values - mean) / spread
    return values / temperature


def select(keys: Key, values: Array, rule: str, temperature: float) -> Array:
    """Index int32 [R] of one of the M candidates of each row.

    Args:
      keys: one per row [R].
      values: the larger the better [M, R]; a NaN is never taken if any is finite.
      rule: one of `RULES`; "argmax" takes the first on ties.
      temperature: of the weights.
    """
    if rule == "argmax":
        return jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values), axis=0)
    weights = log_weights(values, rule, temperature)
    return jax.vmap(jax.random.categorical, (0, 1))(keys, weights)


def take(candidates: PyTree, index: Array) -> PyTree:
    """Entry `index[r]` of each row: leaves [M, R, ...] become [R, ...]."""
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf[index, rows], candidates)


def effective_size(log_w: Array) -> Array:
    """(sum w)^2 / sum w^2 per row, of log-weights [K, R]."""
    w = jax.nn.softmax(log_w, axis=0)
    return 1 / jnp.sum(w**2, axis=0)


def systematic(keys: Key, log_w: Array) -> Array:
    """Ancestors int32 [K, R] of K particles per row, each floor or ceil of K w times.

    Args:
      keys: one per row [R].
      log_w: unnormalised log-weights [K, R].
    """
    num_particles = log_w.shape[0]
    edges = jnp.cumsum(jax.nn.softmax(log_w, axis=0), axis=0)
    offset = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    points = (jnp.arange(num_particles, dtype=jnp.float32)[:, None] + offset[None]) / num_particles
    index = jax.vmap(jnp.searchsorted, (1, 1), 1)(edges, points)
    # Rounding can leave the last edge short of the last point.
    return jnp.minimum(index, num_particles - 1)


class Best(NamedTuple):
    """The best of the runs that were weighed so far.

    Attributes:
      tokens: int32 [R, L].
      loss: their energy [R]; infinite before the first one.
    """

    tokens: Array
    loss: Array


def none_yet(tokens: Array) -> Best:
    """Before the first run, of tokens [R, L]."""
    return Best(tokens, jnp.full(tokens.shape[0], jnp.inf, jnp.float32))


def keep_better(target: Target, best: Best, tokens: Array, is_first: Array) -> Best:
    """Weighs clean tokens [R, L] by their energy; the earlier ones stay on ties.

    The first run stands even if its energy is NaN: a failed run has no masks.
    """
    loss = target.energy_of(tokens)
    is_better = (loss < best.loss) | is_first | jnp.isnan(best.loss)
    return Best(
        jnp.where(is_better[:, None], tokens, best.tokens), jnp.where(is_better, loss, best.loss)
    )
