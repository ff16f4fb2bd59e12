"""Look-up-free quantisation: tokens <-> codes in {-1, +1}^d, exact and free of parameters.

Channel 0 of a code is the most significant bit of its token (MagVIT-v2, arXiv:2310.05737).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.types import Array

#: Some devices round the factors of float32 products unless they are told not to.
exact_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _bit_weights(num_bits: int) -> np.ndarray:
    return 2 ** np.arange(num_bits - 1, -1, -1, dtype=np.int32)


def codebook(num_bits: int) -> Array:
    """All codes C, float32 [2**num_bits, num_bits]; row k is the code of token k."""
    if not 1 <= num_bits <= 20:
        raise ValueError(f"num_bits must be between 1 and 20, got {num_bits}")
    return tokens_to_codes(jnp.arange(2**num_bits, dtype=jnp.int32), num_bits)


def tokens_to_codes(tokens: Array, num_bits: int) -> Array:
    """Codes [..., num_bits] in {-1, +1} of int tokens [...] in [0, 2**num_bits)."""
    shifts = _bit_weights(num_bits).reshape(*(1,) * tokens.ndim, -1)
    bits = (tokens[..., None].astype(jnp.int32) // shifts) % 2
    return bits.astype(jnp.float32) * 2 - 1


def codes_to_tokens(codes: Array) -> Array:
    """Tokens int32 [...] of codes [..., d]; only the sign counts and 0 counts as -1."""
    weights = _bit_weights(codes.shape[-1]).reshape(*(1,) * (codes.ndim - 1), -1)
    # The dtype of a sum of int32 is int64 where JAX has 64-bit numbers.
    return jnp.sum((codes > 0).astype(jnp.int32) * weights, axis=-1, dtype=jnp.int32)


@jax.custom_vjp
def mean_code(logits: Array) -> Array:
    """Mean code sum_k softmax(logits)_k C_k [..., d] of logits [..., 2**d], exact.

    A token is its high bits and its low bits, so the mean of each half needs the probabilities
    summed over the other half alone: 2 K additions per token in place of K d multiplications, and
    a gradient that is one pass over the logits with nothing of their size kept. The gradient is
    that of the product with the codebook; there is no forward mode (`jax.jvp`).
    """
    return _mean_code_fwd(logits)[0]


def _halves(logits: Array, largest: Array) -> tuple[Array, Array, Array]:
    """exp(logits - largest) [..., 2**high, 2**low], and the codes of the high and the low bits."""
    num_bits = logits.shape[-1].bit_length() - 1
    high, low = num_bits // 2, num_bits - num_bits // 2
    weights = jnp.exp(logits - largest).reshape(*logits.shape[:-1], 2**high, 2**low)
    return weights, *(
        tokens_to_codes(jnp.arange(2**bits, dtype=jnp.int32), bits) for bits in (high, low)
    )


def _mean_code_fwd(logits: Array) -> tuple[Array, tuple[Array, ...]]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights, high_codes, low_codes = _halves(logits, largest)
    high, low = jnp.sum(weights, axis=-1), jnp.sum(weights, axis=-2)
    total = jnp.sum(high, axis=-1, keepdims=True)
    mean = (
        jnp.concatenate([exact_matmul(high, high_codes), exact_matmul(low, low_codes)], axis=-1)
        / total
    )
    return mean, (logits, largest, total, mean)


def _mean_code_bwd(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array]:
    logits, largest, total, mean = residuals
    weights, high_codes, low_codes = _halves(logits, largest)
    split = high_codes.shape[-1]
    high = exact_matmul(cotangent[..., :split], high_codes.T)
    low = exact_matmul(cotangent[..., split:], low_codes.T)
    low = low - jnp.sum(cotangent * mean, axis=-1, keepdims=True)
    slope = (high / total)[..., :, None] + (low / total)[..., None, :]
    return ((weights * slope).reshape(logits.shape),)


mean_code.defvjp(_mean_code_fwd, _mean_code_bwd)


def quantize(codebook: Array, features: Array) -> tuple[Array, Array]:
    """Nearest code of `features` [..., d]: their sign, with 0 counting as -1.

    Args:
      codebook: unused, LFQ needs none; kept so that all quantisers share one signature.
      features: encoder outputs or expected codes [..., d].

    Returns:
      Codes [..., d] in {-1, +1} and their tokens int32 [...].
    """
    del codebook
    one = jnp.ones((), features.dtype)
    codes = jnp.where(features > 0, one, -one)
    return codes, codes_to_tokens(codes)


def quantize_nearest(codebook: Array, features: Array) -> tuple[Array, Array]:
    """Nearest row of an arbitrary `codebook` [K, d] to `features` [..., d], in Euclidean distance.

    Returns:
      Codes [..., d] and tokens int32 [...]; ties go to the smaller token. For the LFQ codebook it
      equals `quantize` wherever no feature is exactly 0.
    """
    scores = exact_matmul(features, codebook.T)
    scores = scores - 0.5 * jnp.sum(codebook**2, axis=-1).reshape(*(1,) * (scores.ndim - 1), -1)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return codebook[tokens], tokens


def straight_through(features: Array, codes: Array) -> Array:
    """Value of `codes`, gradient of `features`."""
    return features + jax.lax.stop_gradient(codes - features)
