"""The objective of test-time logits phi: what their codes explain, and what the prior says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from aps_jax.codec.expectation import quantized_expectation
from aps_jax.sampling.target import Target
from aps_jax.types import Array, Scalar


def measurement_term(
    target: Target, phi: Float[Array, "R L K"], tokens: Int[Array, "R L"]
) -> Float[Array, " R"]:
    """N(y, A(D(x~))) per row [R], for the quantized expectation x~ of phi.

    Args:
      target: what is sampled.
      phi: logits [R, L, K].
      tokens: z int32 [R, L]; clean positions feed their own code.
    """
    with jax.named_scope("expectation"):
        codes, _ = quantized_expectation(target.codec, phi, target.grid)
        codes = target.known_codes(codes, tokens)
    return target.objective_of(codes)


def prior_term(
    phi: Float[Array, "R L K"], log_prior: Float[Array, "R L K"], is_masked: Bool[Array, "R L"]
) -> Float[Array, " R"]:
    """Sum over masked tokens of -log <softmax(phi_l), x_theta_l> per row [R] (Theorem 3.3).

    It is least where phi_l is sure of the prior's mode.

    Args:
      phi: logits [R, L, K].
      log_prior: log x_theta [R, L, K].
      is_masked: bool [R, L].
    """
    log_probs = jax.nn.log_softmax(phi, axis=-1)
    values = -jax.nn.logsumexp(log_probs + log_prior, axis=-1)
    return jnp.sum(jnp.where(is_masked, values, 0.0), axis=-1)


def kl_term(
    phi: Float[Array, "R L K"], log_prior: Float[Array, "R L K"], *, is_exact: bool
) -> Float[Array, "R L"]:
    """sum_k softmax(phi)_k (phi_k - log_prior_k) per token [R, L]; phi normalised if `is_exact`."""
    inside = jax.nn.log_softmax(phi, axis=-1) if is_exact else phi
    return jnp.sum(jax.nn.softmax(phi, axis=-1) * (inside - log_prior), axis=-1)


def loss(
    target: Target,
    phi: Float[Array, "R L K"],
    log_prior: Float[Array, "R L K"],
    tokens: Int[Array, "R L"],
    prior_weight: Scalar | None = None,
) -> Float[Array, " R"]:
    """Measurement term + prior_weight * prior term, per row [R]; None leaves the latter out."""
    value = measurement_term(target, phi, tokens)
    if prior_weight is None:
        return value
    return value + prior_weight * prior_term(phi, log_prior, tokens == target.mask)
