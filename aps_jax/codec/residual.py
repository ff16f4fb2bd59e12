"""Residual and grouped quantisation: several codes per place, each from a table of its own.

With residual codes (RQ-VAE, arXiv:2203.01941) the decoder reads their sum, with grouped ones their
concatenation; that is the network's business. Here every level is a cell of the token grid.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from aps_jax.codec.lfq import exact_matmul
from aps_jax.codec.vq import nearest_row, row_similarity
from aps_jax.types import Array


@flax.struct.dataclass
class Residual:
    """Tables of n levels as a `Quantizer`; the last axis of the token grid is the level.

    Attributes:
      tables: float32 [n, K, d].
    """

    tables: Array

    @property
    def num_codes(self) -> int:
        """K, codes per level."""
        return self.tables.shape[1]

    @property
    def num_features(self) -> int:
        """Numbers per code, d."""
        return self.tables.shape[2]

    @property
    def axes(self) -> tuple[int, ...]:
        """The level's axis of the grid, (n,)."""
        return (self.tables.shape[0],)

    def lookup(self, tokens: Array) -> Array:
        """Codes [..., n, d] of tokens [..., n]; ValueError if the last axis is not the level."""
        if tokens.shape[-1:] != self.axes:
            raise ValueError(
                f"tokens have shape {tokens.shape}; their last axis must be the {self.axes[0]} "
                "levels of this codebook"
            )
        return jax.vmap(lambda table, t: table[t], (0, -1), -2)(self.tables, tokens)

    def nearest(self, features: Array) -> Array:
        """Tokens [..., n] of what each level has to explain, features [..., n, d]."""
        return jax.vmap(nearest_row, (0, -2), -1)(self.tables, features)

    def expect(self, logits: Array) -> Array:
        """Mean codes [..., n, d], level by level."""
        probs = jax.nn.softmax(logits, axis=-1)
        return jax.vmap(exact_matmul, (-2, 0), -2)(probs, self.tables)

    def similarity(self, tokens: Array) -> Array:
        """Minus half the squared distances to all codes of the same level, [..., n, K]."""
        codes = self.lookup(tokens)
        return jax.vmap(row_similarity, (0, -2), -2)(self.tables, codes)

    def residuals(self, features: Array) -> Array:
        """What the levels have to explain of features [..., d], one after another: [..., n, d]."""
        left, parts = features, []
        for table in self.tables:
            parts.append(left)
            left = left - table[nearest_row(table, left)]
        return jnp.stack(parts, axis=-2)
