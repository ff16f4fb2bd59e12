"""Look-up-free quantisation: tokens <-> codes in {-1, +1}^d, exact and free of parameters.

Channel 0 of a code is the most significant bit of its token (MagVIT-v2, arXiv:2310.05737).
"""

from __future__ import annotations

from functools import partial

import flax.struct
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
    weights = _bit_weights(num_bits).reshape(*(1,) * tokens.ndim, -1)
    bits = (tokens[..., None].astype(jnp.int32) // weights) % 2
    return bits.astype(jnp.float32) * 2 - 1


def codes_to_tokens(codes: Array) -> Array:
    """Tokens int32 [...] of codes [..., d]; only the sign counts and 0 counts as -1."""
    weights = _bit_weights(codes.shape[-1]).reshape(*(1,) * (codes.ndim - 1), -1)
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
    high_codes, low_codes = (
        tokens_to_codes(jnp.arange(2**bits, dtype=jnp.int32), bits) for bits in (high, low)
    )
    return weights, high_codes, low_codes


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


def quantize(features: Array) -> tuple[Array, Array]:
    """Nearest codes of `features` [..., d], their signs with 0 counting as -1, and their tokens."""
    codes = jnp.where(features > 0, jnp.ones((), features.dtype), -1.0)
    return codes, codes_to_tokens(codes)


@flax.struct.dataclass
class LFQ:
    """The codebook {-1, +1}^d as a `Quantizer`; it has no tables.

    Attributes:
      num_bits: d.
    """

    num_bits: int = flax.struct.field(pytree_node=False)
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def num_codes(self) -> int:
        """K = 2^d."""
        return 2**self.num_bits

    @property
    def num_features(self) -> int:
        """Numbers per code, d."""
        return self.num_bits

    def lookup(self, tokens: Array) -> Array:
        """Codes [..., d] of tokens [...]."""
        return tokens_to_codes(tokens, self.num_bits)

    def nearest(self, features: Array) -> Array:
        """Tokens [...] of the signs of features [..., d]."""
        return codes_to_tokens(features)

    def expect(self, logits: Array) -> Array:
        """Mean codes [..., d] by `mean_code`."""
        return mean_code(logits)

    def similarity(self, tokens: Array) -> Array:
        """-2 per bit that differs, [..., K]."""
        return exact_matmul(self.lookup(tokens), codebook(self.num_bits).T) - self.num_bits
