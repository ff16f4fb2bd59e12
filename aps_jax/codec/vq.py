"""Vector quantisation over a learned table (VQ-VAE, arXiv:1711.00937), or any other one."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from aps_jax.codec.lfq import exact_matmul
from aps_jax.types import Array

#: Rows of a table whose largest score is found together.
_BLOCK = 64


def nearest_row(table: Array, features: Array) -> Array:
    """Tokens int32 [...] of the rows of `table` [K, d] nearest to `features` [..., d].

    In Euclidean distance; ties go to the smaller token.
    """
    halves = -0.5 * jnp.sum(table**2, axis=-1, keepdims=True)
    wide = jnp.concatenate([table, halves], axis=-1)
    # Copies of the last row lose their ties against it.
    wide = jnp.pad(wide, ((0, -table.shape[0] % _BLOCK), (0, 0)), mode="edge")
    ones = jnp.ones((*features.shape[:-1], 1), features.dtype)
    scores = exact_matmul(jnp.concatenate([features, ones], axis=-1), wide.T)
    # An argmax over all rows takes three times as long on CPU.
    blocks = scores.reshape(*features.shape[:-1], -1, _BLOCK)
    best = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    own = jnp.take_along_axis(blocks, best[..., None, None], axis=-2)[..., 0, :]
    return (best * _BLOCK + jnp.argmax(own, axis=-1)).astype(jnp.int32)


def row_similarity(table: Array, codes: Array) -> Array:
    """Minus half the squared distances [..., K] of the rows of `table` [K, d] to codes [..., d]."""
    squares = jnp.sum(table**2, axis=-1)
    own = jnp.sum(codes**2, axis=-1, keepdims=True)
    return exact_matmul(codes, table.T) - (squares + own) / 2


@flax.struct.dataclass
class VQ:
    """One table of codes for all cells, as a `Quantizer`; also an embedding table of words.

    Attributes:
      table: float32 [K, d].
    """

    table: Array
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def num_codes(self) -> int:
        """Rows of the table, K."""
        return self.table.shape[0]

    @property
    def num_features(self) -> int:
        """Numbers per code, d."""
        return self.table.shape[1]

    def lookup(self, tokens: Array) -> Array:
        """Codes [..., d] of tokens [...]."""
        return self.table[tokens]

    def nearest(self, features: Array) -> Array:
        """Tokens [...] of the rows nearest to features [..., d]."""
        return nearest_row(self.table, features)

    def expect(self, logits: Array) -> Array:
        """Mean codes softmax(logits) C [..., d]."""
        return exact_matmul(jax.nn.softmax(logits, axis=-1), self.table)

    def similarity(self, tokens: Array) -> Array:
        """Minus half the squared distances to all rows, [..., K]."""
        return row_similarity(self.table, self.lookup(tokens))
