"""Draws of tokens from their log-probabilities; exact, and cheap for thousands of codes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from aps_jax.types import Array, Key

#: Codes below which one draw per code costs no more than two of halves.
_FEW_CODES = 64


def draw_tokens(keys: Key, logits: Float[Array, "R L K"]) -> Int[Array, "R L"]:
    """One token per position, with the probabilities softmax(logits).

    Noise for every code is what such a draw costs, so a token is drawn in two parts: its block, one
    of about sqrt(K), from the blocks' sums, then its place inside. Codes of logit -inf never come.

    Args:
      keys: one per row [R].
      logits: float [R, L, K], normalised or not.

    Returns:
      int32 [R, L] in [0, K).
    """
    num_codes = logits.shape[-1]
    num_blocks = next(n for n in range(math.isqrt(num_codes), 0, -1) if num_codes % n == 0)
    if num_codes < _FEW_CODES or num_blocks == 1:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def draw(key: Key, logits: Array) -> Array:
        key_block, key_inside = jax.random.split(key)
        blocks = logits.reshape(-1, num_blocks, num_codes // num_blocks)
        block = jax.random.categorical(key_block, jax.nn.logsumexp(blocks, axis=-1))
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        place = jax.random.categorical(key_inside, inside)
        return (block * blocks.shape[-1] + place).astype(jnp.int32)

    return jax.vmap(draw)(keys, logits)


def top_p(log_probs: Float[Array, "*R K"], mass: float) -> Float[Array, "*R K"]:
    """Log-probabilities [..., K] without the tail beyond the likeliest tokens that hold `mass`.

    The likeliest token always stays, and so do all that are as likely as the last one kept; the
    rest of the mass is not put back.
    """
    if mass >= 1:
        return log_probs
    probs = jax.nn.softmax(jax.lax.stop_gradient(log_probs), axis=-1)
    # Floats that are not negative are in the order of their bits, so bisection over bits finds the
    # exact probability to cut at, without a sort.
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = jnp.sum(probs, axis=-1, keepdims=True, where=bits >= middle) >= mass
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    largest = jnp.max(bits, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(largest), largest + 1))
    return jnp.where(bits >= low, log_probs, -jnp.inf)
