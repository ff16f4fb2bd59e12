"""Which proposed tokens become anchors and which are masked again; never calls a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aps_jax.types import Array, Key


def confidence(log_probs: Array, proposal: Array) -> Array:
    """Log-probability [B, L] of the proposed tokens int [B, L] under `log_probs` [B, L, K]."""
    return jnp.take_along_axis(log_probs, proposal[..., None], axis=-1)[..., 0]


def select_by_count(scores: Array, is_masked: Array, num_masked_after: Array) -> Array:
    """Keeps the highest scores of each image so that a given number of tokens stays masked.

    Args:
      scores: float [B, L]; only their order matters, ties go to the earlier position.
      is_masked: bool [B, L], positions still open; the others are left alone.
      num_masked_after: int scalar or [B], tokens to leave masked; at least one token is revealed
        wherever any is open, whatever this says.

    Returns:
      Bool [B, L], True where an open position becomes an anchor.
    """
    num_open = jnp.sum(is_masked, axis=-1)
    num_left = jnp.minimum(num_masked_after, jnp.maximum(num_open - 1, 0))
    num_kept = num_open - num_left
    # Two sort keys, so that impossible (-inf) proposals still come before the closed positions.
    order = jnp.lexsort((-scores, ~is_masked), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return is_masked & (rank < num_kept[:, None])


def select_by_threshold(scores: Array, is_masked: Array, threshold: Array) -> Array:
    """Keeps open positions with log-confidence of at least log(threshold), and always the best one.

    Args:
      scores: log-confidence [B, L].
      is_masked: bool [B, L], positions still open.
      threshold: scalar in [0, 1]; 0 keeps everything.

    Returns:
      Bool [B, L], True where an open position becomes an anchor.
    """
    limit = jnp.where(threshold > 0, jnp.log(jnp.maximum(threshold, 1e-38)), -jnp.inf)
    confident = ~(scores < limit)  # NaN is kept: a failed run must end without masks, too
    best = select_by_count(scores, is_masked, jnp.iinfo(jnp.int32).max)
    return is_masked & (confident | best)


def gumbel_scores(keys: Key, log_confidence: Array, temperature: Array) -> Array:
    """Adds `temperature` times Gumbel noise, drawn per image from `keys` [B], to scores [B, L]."""
    length = log_confidence.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(keys)
    return log_confidence + temperature * noise
