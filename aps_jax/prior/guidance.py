"""The prior's opinion of partly masked tokens, guided and tempered."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aps_jax.prior.windows import prior_logits
from aps_jax.types import Array, Prior, Scalar

#: Logits of codes that a prior excludes, in place of -inf, whose differences are NaN.
LEAST_LOGIT = -1e4

#: Log-probability of what carry-over excludes at clean positions: exp(-70) is 0 next to 1.
LEAST_LOG_PROB = -70.0


def log_prior(
    prior: Prior,
    tokens: Array,
    grid: tuple[int, ...],
    *,
    guidance_scale: Scalar | None = None,
    prior_temperature: Scalar | None = None,
) -> Array:
    """Log x_theta [R, L, K] at tokens [R, L]: one call of the denoiser, without gradient.

    Args:
      prior: masked transformer.
      tokens: int [R, L] in [0, K], K for the mask.
      grid: sizes of the token grid, of product L.
      guidance_scale: g of (1 + g) cond - g uncond; None saves the second call.
      prior_temperature: divides the logits; None is 1.
    """

    def bounded(**options: bool) -> Array:
        logits = prior_logits(prior, tokens.reshape(-1, *grid), **options)
        return jnp.maximum(logits.reshape(*tokens.shape, -1).astype(jnp.float32), LEAST_LOGIT)

    with jax.named_scope("denoiser"):
        logits = bounded()
        if guidance_scale is not None:
            plain = bounded(is_unconditional=True)
            logits = (1 + guidance_scale) * logits - guidance_scale * plain
        if prior_temperature is not None:
            logits = logits / prior_temperature
        return jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)


def carry_over(log_probs: Array, tokens: Array) -> Array:
    """Log-probabilities [R, L, K] that are one-hot, with a floor, where tokens [R, L] are clean."""
    num_codes = log_probs.shape[-1]
    is_own = tokens[..., None] == jnp.arange(num_codes, dtype=jnp.int32)[None, None]
    carried = jnp.where(is_own, jnp.float32(0), LEAST_LOG_PROB)
    is_masked = (tokens == num_codes)[..., None]
    return jnp.where(is_masked, jnp.maximum(log_probs, LEAST_LOG_PROB), carried)
