"""A small classifier of short texts that reads embeddings, so that it also reads mixtures of words.

convolution over the embeddings of five neighbouring tokens, GELU, attention pooling, linear

The rows of its table have one length: the row nearest to a mean of rows is then the one of largest
inner product with it, and not a word that happens to lie near the origin.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from aps_jax.codec.vq import VQ
from aps_jax.types import Array, Codec, Key, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes of the classifier; every field is a JSON value.

    Attributes:
      vocab_size: ids of the tokenizer.
      width: numbers per embedding.
      hidden: features of the convolution.
      reach: tokens to either side that it sees.
      labels: names of the classes.
      vocabulary: `TextTokenizer.fingerprint` of the tokenizer.
    """

    vocab_size: int
    width: int = 48
    hidden: int = 96
    reach: int = 2
    labels: tuple[str, ...] = ("negative", "positive")
    vocabulary: str = ""


class _Network(nn.Module):
    config: ClassifierConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.width)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape)
        self.mix = nn.Dense(config.hidden)
        self.score = nn.Dense(1)
        self.out = nn.Dense(len(config.labels))

    def table(self) -> Array:
        """Unit rows [K, d], times the root of d."""
        square = jnp.sum(self.embedding**2, axis=-1, keepdims=True)
        return self.embedding * jax.lax.rsqrt(square + 1e-12) * self.config.width**0.5

    def __call__(self, x: Array) -> Array:
        """Logits [B, labels] of embeddings [B, L, d]."""
        reach, length = self.config.reach, x.shape[1]
        wide = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
        near = [wide[:, shift : shift + length] for shift in range(2 * reach + 1)]
        hidden = nn.gelu(self.mix(jnp.concatenate(near, axis=-1)))
        shares = jax.nn.softmax(self.score(hidden)[..., 0], axis=-1)
        return self.out(jnp.einsum("bl,blh->bh", shares, hidden))

    def read(self, ids: Array) -> Array:
        """Logits of ids [B, L]."""
        return self(self.table()[ids])


def init_classifier_params(key: Key, config: ClassifierConfig) -> PyTree:
    """Random weights."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return _Network(config).init(key, ids, method="read")["params"]


def classifier_logits(params: PyTree, embeddings: Array, *, config: ClassifierConfig) -> Array:
    """Logits [B, labels] of embeddings [B, L, d]; also for training."""
    return _Network(config).apply({"params": params}, embeddings)  # pyright: ignore[reportReturnType]


def classifier_table(params: PyTree, config: ClassifierConfig) -> Array:
    """Embeddings of all ids [K, d]."""
    return _Network(config).apply({"params": params}, method="table")  # pyright: ignore[reportReturnType]


@flax.struct.dataclass
class TextReward:
    """A classifier of texts, for `energies.text_reward`.

    Attributes:
      params: weights.
      config: sizes, labels and vocabulary.
    """

    params: PyTree
    config: ClassifierConfig = flax.struct.field(pytree_node=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.config.labels

    @property
    def codec(self) -> Codec:
        """The embedding table as the codebook of a codec that decodes to embeddings."""
        table = classifier_table(self.params, self.config)
        return Codec(params=None, quantizer=VQ(table), decode=_as_they_are)

    def __call__(self, x: Float[Array, "B *grid d"]) -> Float[Array, "B A"]:
        """Logits of embeddings, in reading order over the grid, of words or of their mixtures."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return classifier_logits(self.params, x, config=self.config)

    def probabilities(self, ids: Array) -> Float[Array, "B A"]:
        """Probabilities of the classes for ids [B, L]."""
        return _probabilities(self, ids)


def _as_they_are(params: None, codes: Array) -> Array:
    return codes


@jax.jit
def _probabilities(reward: TextReward, ids: Array) -> Array:
    return jax.nn.softmax(reward(reward.codec.quantizer.lookup(ids)), axis=-1)
