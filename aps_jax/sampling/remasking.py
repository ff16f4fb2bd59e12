"""Which proposed tokens become anchors and which are masked again; never calls a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from aps_jax.types import Array, Key, Scalar


def confidence(
    log_probs: Float[Array, "B L K"], proposal: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Log-probability [B, L] of the proposed tokens int [B, L] under `log_probs` [B, L, K]."""
    return jnp.take_along_axis(log_probs, proposal[..., None], axis=-1)[..., 0]


def select_by_count(
    scores: Float[Array, "B L"], is_masked: Bool[Array, "B L"], num_masked_after: Array | int
) -> Bool[Array, "B L"]:
    """Keeps the highest scores of each image so that a given number of tokens stays masked.

    Args:
      scores: float [B, L]; only their order matters, ties go to the earlier position.
      is_masked: bool [B, L], positions still open; the others are left alone.
      num_masked_after: int scalar or [B], tokens to leave masked; at least one token is revealed
        wherever any is open, whatever this says.

    Returns:
      Bool [B, L], True where an open position becomes an anchor.
    """
    num_open = jnp.sum(is_masked, axis=-1, dtype=jnp.int32)
    num_left = jnp.minimum(num_masked_after, jnp.maximum(num_open - 1, 0))
    num_kept = num_open - num_left
    # Two sort keys, so that impossible (-inf) proposals still come before the closed positions.
    order = jnp.lexsort((-scores, ~is_masked), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return is_masked & (rank.astype(jnp.int32) < num_kept[:, None])


def select_by_threshold(
    scores: Float[Array, "B L"], is_masked: Bool[Array, "B L"], threshold: Array | float
) -> Bool[Array, "B L"]:
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


#: Strengths of ReMDM's own runs (arXiv:2503.00307), of about a thousand steps over text; fewer
#: steps want more. Its "conf" has none.
REMDM_STRENGTHS = {"cap": 0.008, "rescale": 0.015, "conf": 1.0}


def remdm_chance(
    rule: str, strength: Scalar | None, gamma_t: Array | float, gamma_s: Array | float
) -> Float[Array, ""]:
    """Probability s that ReMDM masks a clean token again in a step from gamma_t to gamma_s masked.

    At most s_max = min(1, gamma_s / (1 - gamma_t)), the share that would mask as many as may be
    masked; so no token is lost in the last step.

    Args:
      rule: "cap" is min(strength, s_max), "rescale" (and "conf", which shares it out by confidence)
        strength * s_max.
      strength: in [0, 1]; None takes that of `REMDM_STRENGTHS`.
      gamma_t: share of masked tokens before the step.
      gamma_s: the same after it.
    """
    strength = REMDM_STRENGTHS[rule] if strength is None else strength
    most = jnp.minimum(1.0, gamma_s / jnp.maximum(1 - gamma_t, 1e-6))
    return jnp.minimum(strength, most) if rule == "cap" else strength * most


def pick(keys: Key, chance: Array, is_open: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    """Bool [B, L]: the open tokens that independent draws with probability `chance` pick."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, is_open.shape[1:], jnp.float32))(keys)
    return is_open & (draws < chance)


def gumbel_scores(
    keys: Key, log_confidence: Float[Array, "B L"], temperature: Array | float
) -> Float[Array, "B L"]:
    """Adds `temperature` times Gumbel noise, drawn per image from `keys` [B], to scores [B, L]."""
    length = log_confidence.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,), jnp.float32))(keys)
    return log_confidence + temperature * noise


def random_scores(keys: Key, shape: tuple[int, ...]) -> Float[Array, "B L"]:
    """Scores [B, L] whose order is any with equal probability, from `keys` [B]."""
    return gumbel_scores(keys, jnp.zeros(shape, jnp.float32), 1.0)
