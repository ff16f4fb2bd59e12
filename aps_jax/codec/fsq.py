"""Finite scalar quantisation (arXiv:2309.15505): each number of a code is one of a few levels."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.lfq import exact_matmul
from aps_jax.codec.vq import row_similarity
from aps_jax.types import Array


@flax.struct.dataclass
class FSQ:
    """Codes on a regular grid in [-1, 1]^d, as a `Quantizer`; it has no tables.

    The first number varies slowest with the token, as the first bit of LFQ does.

    Attributes:
      levels: values per number, each at least 2; K is their product.
    """

    levels: tuple[int, ...] = flax.struct.field(pytree_node=False)
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def num_codes(self) -> int:
        """K, the product of the levels."""
        return math.prod(self.levels)

    @property
    def num_features(self) -> int:
        """Numbers per code, d."""
        return len(self.levels)

    def _weights(self) -> list[int]:
        """What one level of each number adds to a token."""
        return [math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))]

    def lookup(self, tokens: Array) -> Array:
        """Codes [..., d] of tokens [...]."""
        steps = [
            tokens // weight % count
            for weight, count in zip(self._weights(), self.levels, strict=True)
        ]
        top = jnp.asarray(np.array(self.levels) - 1, jnp.float32)
        return 2 * jnp.stack(steps, axis=-1).astype(jnp.float32) / top - 1

    def nearest(self, features: Array) -> Array:
        """Tokens [...] of features [..., d], each number rounded to its nearest level."""
        top = jnp.asarray(np.array(self.levels) - 1, jnp.float32)
        steps = jnp.clip(jnp.round((features + 1) / 2 * top), 0, top).astype(jnp.int32)
        return jnp.sum(steps * jnp.asarray(self._weights(), jnp.int32), axis=-1, dtype=jnp.int32)

    def expect(self, logits: Array) -> Array:
        """Mean codes [..., d], number by number from its own marginal distribution."""
        probs = jax.nn.softmax(logits, axis=-1).reshape(*logits.shape[:-1], *self.levels)
        num_levels, means = len(self.levels), []
        for index, count in enumerate(self.levels):
            others = tuple(i - num_levels for i in range(num_levels) if i != index)
            values = jnp.linspace(-1.0, 1.0, count, dtype=jnp.float32)
            means.append(exact_matmul(jnp.sum(probs, axis=others), values))
        return jnp.stack(means, axis=-1)

    def similarity(self, tokens: Array) -> Array:
        """Minus half the squared distances to all codes, [..., K]."""
        return row_similarity(
            self.lookup(jnp.arange(self.num_codes, dtype=jnp.int32)), self.lookup(tokens)
        )
