"""Masked transformer denoiser as Flax modules; `aps_jax.prior.bundle` bundles it as a `Prior`.

One set of classes covers the small embedded image prior, the public masked language models of the
LLaMA family (LLaDA, MMaDA, Dream: pre-norm, gated MLP) and Show-o (phi: parallel blocks); all have
rotary positions. Layers are scanned, so their weights are stacked on a leading axis and compile
time does not grow with depth. References: LLaDA arXiv:2502.09992, MMaDA arXiv:2505.15809, Show-o
arXiv:2408.12528, MaskGIT arXiv:2202.04200.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.codec import lfq
from aps_jax.prior.attention import rotary_angles
from aps_jax.prior.blocks import Block, Linear, ParallelBlock, RMSNorm, layer_norm
from aps_jax.prior.config import TransformerConfig
from aps_jax.types import Array, Key, PyTree


class Embedding(nn.Module):
    """One row per id."""

    config: TransformerConfig

    def setup(self) -> None:  # noqa: D102 (a Flax hook)
        config = self.config
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(0.02),
            (config.vocab_size, config.width),
            config.param_dtype,
        )

    def __call__(self, ids: Array) -> Array:
        """Maps ids int [B, L] to [B, L, width]."""
        return self.embedding[ids].astype(self.config.dtype)


class CodeEmbedding(nn.Module):
    """Embeds LFQ codes through their bits and a low-rank table, and other ids by rows.

    The bits carry the geometry of the codebook with `code_bits` rows of weights, so a rare code is
    placed near its neighbours from the start; the table adds what is particular to a code.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps ids int [B, L] to [B, L, width]."""
        config = self.config
        assert config.code_bits is not None  # Or the model would have an `Embedding`.
        num_codes = 2**config.code_bits
        num_special = config.vocab_size - num_codes
        dtype, param_dtype = config.dtype, config.param_dtype
        code_ids = jnp.minimum(ids, num_codes - 1)

        features = [lfq.tokens_to_codes(code_ids, config.code_bits).astype(dtype)]
        if config.code_rank:
            shape = (num_codes, config.code_rank)
            table = self.param("table", nn.initializers.normal(1.0), shape, param_dtype)
            features.append(table[code_ids].astype(dtype))
        x = Linear(config, config.width, name="project")(jnp.concatenate(features, axis=-1))
        if not num_special:
            return x
        shape = (num_special, config.width)
        special = self.param("special", nn.initializers.normal(1.0), shape, param_dtype)
        rows = special[jnp.maximum(ids - num_codes, 0)].astype(dtype)
        return jnp.where((ids >= num_codes)[:, :, None], rows, x)


class CellEmbedding(nn.Module):
    """One learned row per cell of a square grid; nothing for what lies outside it, as prompts."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        """Maps rows and columns int [L, 2] to [L, width]."""
        config = self.config
        side = config.absolute_side or 0
        shape = (side * side, config.width)
        table = self.param("table", nn.initializers.normal(0.02), shape, config.param_dtype)
        is_cell = jnp.all((positions >= 0) & (positions < side), axis=-1)
        index = jnp.where(is_cell, positions[:, 0] * side + positions[:, 1], 0)
        return jnp.where(is_cell[:, None], table[index], 0.0).astype(config.dtype)


class Head(nn.Module):
    """Linear map to float32 logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, columns: tuple[int, int] | None = None) -> Array:
        """Maps [B, L, width] to the logits of ids in [start, stop) = `columns`, or of all ids."""
        config = self.config
        shape = (config.width, config.output_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, config.param_dtype)
        logits = _project(x, kernel, columns)
        if config.block != "phi":
            return logits
        bias = self.param("bias", nn.initializers.zeros, shape[1:], config.param_dtype)
        start, stop = columns or (0, config.output_size)
        return logits + bias[None, None, start:stop].astype(jnp.float32)


def _project(x: Array, kernel: Array, columns: tuple[int, int] | None) -> Array:
    start, stop = columns or (0, kernel.shape[1])
    kernel = kernel[:, start:stop].astype(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(flat, kernel, preferred_element_type=jnp.float32)
    return logits.reshape(*x.shape[:-1], stop - start)


class Transformer(nn.Module):
    """Bidirectional transformer over ids; logits at position t are about the token at t."""

    config: TransformerConfig

    def setup(self) -> None:  # noqa: D102 (a Flax hook)
        config = self.config
        embedding = Embedding if config.code_bits is None else CodeEmbedding
        is_phi = config.block == "phi"
        block = ParallelBlock if is_phi else Block
        block = nn.remat(block, prevent_cse=False) if config.remat else block
        self.embed = embedding(config)
        if config.absolute_side is not None:
            self.cells = CellEmbedding(config)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            # Flax's annotation forgets that there may be one per argument.
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
            unroll=config.unroll,
        )(config)
        self.ln_f = layer_norm(config) if is_phi else RMSNorm(config)
        if not config.tie_embeddings:
            self.head = Head(config)

    def hidden(
        self, ids: Array, positions: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Final normed states.

        Args:
          ids: int [B, L], or [B, L, n] with the embeddings of a place summed.
          positions: int [L, rope_axes]; None counts 0..L-1 along a sequence.
          mask: bool [B, L, L], or [1, L, L] for all rows, True where the query (second axis) sees
            the key (third axis); None lets everything see everything.

        Returns:
          States [B, L, width] in the activation dtype; row t belongs to the prediction of token t.

        Raises:
          ValueError: if `positions` does not fit `rope_axes`.
        """
        positions = self._checked(ids.shape[1], positions)
        x = self.embed(ids)
        return self.hidden_of(x if ids.ndim == 2 else jnp.sum(x, axis=2), positions, mask)

    def hidden_of(
        self, x: Array, positions: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Final normed states of embeddings `x` [B, L, width]; the rest as for `hidden`.

        Embeddings may be mixtures of rows of the table, so that gradients reach what mixes them.
        """
        config = self.config
        positions = self._checked(x.shape[1], positions)
        if config.absolute_side is not None:
            x = x + self.cells(positions)[None]
        x, _ = self.blocks(x, rotary_angles(positions, config), mask)
        x = self.ln_f(x)
        if config.shift_logits:
            x = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
        return x

    def _checked(self, length: int, positions: Array | None) -> Array:
        axes = self.config.rope_axes
        if positions is None and axes == 1:
            positions = jnp.arange(length, dtype=jnp.int32)[:, None]
        if positions is None or positions.shape != (length, axes):
            got = None if positions is None else positions.shape
            raise ValueError(f"positions need shape {(length, axes)}, got {got}")
        return positions

    def logits(self, hidden: Array, columns: tuple[int, int] | None = None) -> Array:
        """Float32 logits [B, L, stop - start] of ids in [start, stop) = `columns`, or of all."""
        if self.config.tie_embeddings:
            return _project(hidden, self.embed.embedding.T, columns)
        return self.head(hidden, columns)

    def __call__(
        self, ids: Array, positions: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Float32 logits [B, L, output_size]; arguments as for `hidden`."""
        return self.logits(self.hidden(ids, positions, mask))


def init_transformer_params(key: Key, config: TransformerConfig) -> PyTree:
    """Random weights."""
    ids = jnp.zeros((1, 1), jnp.int32)
    positions = jnp.zeros((1, config.rope_axes), jnp.int32)
    return Transformer(config).init(key, ids, positions)["params"]


def num_params(params: PyTree) -> int:
    """Number of weights; takes arrays or their shapes from `jax.eval_shape`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
