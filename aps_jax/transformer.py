"""Masked transformer denoiser as Flax modules; `aps_jax.prior` bundles it as a `Prior`.

One set of classes covers the small embedded image prior and the public masked language models of
the LLaMA family (LLaDA, MMaDA, Dream): pre-norm, bidirectional, rotary positions, gated MLP. Layers
are scanned, so their weights are stacked on a leading axis and compile time does not grow with
depth. References: LLaDA arXiv:2502.09992, MMaDA arXiv:2505.15809, MaskGIT arXiv:2202.04200.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax import lfq
from aps_jax.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and switches of the transformer; every field is a JSON value.

    Attributes:
      vocab_size: number of input ids, special ids such as the mask included.
      num_outputs: columns of the head; None means `vocab_size`.
      width: residual width.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads;
        None means `num_heads`.
      head_dim: numbers per head; None means width / num_heads.
      mlp_width: hidden width of the gated MLP.
      qkv_bias: biases on the query, key and value projections (Dream).
      norm_eps: epsilon inside the square root of RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_axes: 1 for sequences; 2 for grids, where one half of the rotated pairs turns with the
        row and the other with the column.
      rope_in_float32: rotate in float32 (LLaDA) instead of the activation dtype (Dream).
      tie_embeddings: reuse the embedding matrix as the head.
      shift_logits: the backbone's output at position t predicts position t + 1 (Dream); outputs
        are shifted so that position t always predicts token t.
      code_bits: if set, ids below 2**code_bits are LFQ codes and are embedded by a linear map of
        their bits, plus the low-rank table if `code_rank` > 0; ids above have rows of their own.
      code_rank: rank of the free part of the code embedding.
      attention: "einsum" (plain, fastest on CPU), or an implementation of
        `jax.nn.dot_product_attention`: "xla", or "cudnn" (flash attention on NVIDIA GPUs in bf16).
      remat: recompute each block in the backward pass.
      unroll: blocks per iteration of the scan over layers; `num_layers` leaves no loop.
      dtype: activation dtype. Norm statistics, softmax and logits are float32 regardless.
      param_dtype: dtype of freshly initialised weights.
    """

    vocab_size: int
    num_outputs: int | None = None
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_axes: int = 1
    rope_in_float32: bool = True
    tie_embeddings: bool = False
    shift_logits: bool = False
    code_bits: int | None = None
    code_rank: int = 0
    attention: str = "einsum"
    remat: bool = False
    unroll: int = 1
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} does not divide {self.num_heads} heads")
        if self.rope_axes not in (1, 2):
            raise ValueError(f"rope_axes must be 1 or 2, got {self.rope_axes}")
        if self.head_size % (2 * self.rope_axes):
            raise ValueError(
                f"head dimension {self.head_size} is not a multiple of {2 * self.rope_axes}"
            )
        if self.attention not in ("einsum", "xla", "cudnn"):
            raise ValueError(f"attention must be einsum, xla or cudnn, got {self.attention!r}")
        if self.code_bits is not None and 2**self.code_bits > self.vocab_size:
            raise ValueError(f"2**{self.code_bits} codes exceed vocab_size={self.vocab_size}")
        if self.tie_embeddings and (self.code_bits is not None or self.num_outputs is not None):
            raise ValueError("tie_embeddings needs code_bits=None and num_outputs=None")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Numbers per head, default resolved."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def output_size(self) -> int:
        """Head columns, default resolved."""
        return self.vocab_size if self.num_outputs is None else self.num_outputs


def grid_positions(height: int, width: int) -> Array:
    """Row and column of every token of a grid in row-major order, int32 [height * width, 2]."""
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return jnp.stack([rows.ravel(), columns.ravel()], axis=-1).astype(jnp.int32)


def rotary_angles(positions: Array, config: TransformerConfig) -> Array:
    """Rotation angles, float32 [L, head_size / 2], of integer `positions` [L, rope_axes]."""
    pairs = config.head_size // 2 // config.rope_axes
    exponents = jnp.arange(pairs, dtype=jnp.float32) / pairs
    frequencies = jnp.power(jnp.float32(config.rope_theta), -exponents)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return angles.reshape(positions.shape[0], config.rope_axes * pairs)


def rotate(x: Array, angles: Array, *, in_float32: bool = True) -> Array:
    """Turns numbers i and i + D/2 of each head of `x` [B, L, heads, D] by `angles` [L, D/2]."""
    dtype = jnp.float32 if in_float32 else x.dtype
    cos = jnp.cos(angles)[None, :, None, :].astype(dtype)
    sin = jnp.sin(angles)[None, :, None, :].astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Softmax attention with float32 scores, as in `jax.nn.dot_product_attention`.

    Explicit transposes and a normalisation after the second product make it about three times as
    fast on CPU.

    Args:
      query: [B, L, heads, D].
      key: [B, L, kv_heads, D]; each of its heads serves heads / kv_heads consecutive query heads.
      value: like `key`.
      mask: bool [B, L, L] or None. Hidden scores get a finite minimum, so a query that sees nothing
        averages all values instead of giving NaN.

    Returns:
      [B, L, heads, D].
    """
    batch, length, heads, size = query.shape
    shared = key.shape[2]
    query = query.reshape(batch, length, shared, -1, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, shared, -1, size)  # query heads of one key are just more queries
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * size**-0.5
    if mask is not None:
        grouped = scores.reshape(batch, shared, -1, length, length)
        grouped = jnp.where(mask[:, None, None], grouped, 0.5 * jnp.finfo(jnp.float32).min)
        scores = grouped.reshape(scores.shape)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    mixed = (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(value.dtype)
    mixed = mixed.reshape(batch, shared, -1, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, size)


class Linear(nn.Module):
    """Dense layer whose kernel is `kernel` [in, out] and whose optional bias is `bias` [out].

    Leading axes are flattened for the product: XLA's CPU backend runs the gradients of a product
    of three-dimensional arrays at half the speed of flat ones.
    """

    config: TransformerConfig
    features: int
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., features]."""
        config = self.config
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, config.param_dtype)
        y = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], config.param_dtype)
            y = y + bias[None, :].astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 statistics, cast back, then the weight."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of `x` [B, L, width]."""
        config = self.config
        scale = self.param("scale", nn.initializers.ones, (config.width,), config.param_dtype)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
        return (x32 * inverse).astype(x.dtype) * scale[None, None, :].astype(x.dtype)


class Block(nn.Module):
    """Attention and gated MLP, each pre-normed and with a residual connection."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None) -> tuple[Array, None]:
        """Maps [B, L, width] to the same shape; the second output is unused by the scan."""
        config = self.config
        # Residual branches start small, so that depth does not blow up the stream.
        residual_init = nn.initializers.variance_scaling(
            0.5 / config.num_layers, "fan_in", "truncated_normal"
        )
        normed = RMSNorm(config, name="attn_norm")(x)
        query, key, value = (
            Linear(config, heads * config.head_size, config.qkv_bias, name=name)(normed).reshape(
                *x.shape[:2], heads, config.head_size
            )
            for name, heads in (
                ("q", config.num_heads),
                ("k", config.kv_heads),
                ("v", config.kv_heads),
            )
        )
        query = rotate(query, angles, in_float32=config.rope_in_float32)
        key = rotate(key, angles, in_float32=config.rope_in_float32)
        if config.attention == "einsum":
            mixed = attend(query, key, value, mask)
        else:
            heads_mask = None if mask is None else mask[:, None]
            mixed = jax.nn.dot_product_attention(
                query, key, value, mask=heads_mask, implementation=config.attention
            )
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * config.head_size)
        x = x + Linear(config, config.width, kernel_init=residual_init, name="attn_out")(mixed)

        normed = RMSNorm(config, name="ff_norm")(x)
        gate = nn.silu(Linear(config, config.mlp_width, name="ff_proj")(normed))
        hidden = gate * Linear(config, config.mlp_width, name="up_proj")(normed)
        x = x + Linear(config, config.width, kernel_init=residual_init, name="ff_out")(hidden)
        return x, None


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


class Head(nn.Module):
    """Linear map to float32 logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, columns: tuple[int, int] | None = None) -> Array:
        """Maps [B, L, width] to the logits of ids in [start, stop) = `columns`, or of all ids."""
        config = self.config
        shape = (config.width, config.output_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, config.param_dtype)
        return _project(x, kernel, columns)


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
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        self.embed = embedding(config)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.unroll,
        )(config)
        self.ln_f = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = Head(config)

    def hidden(
        self, ids: Array, positions: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Final normed states.

        Args:
          ids: int [B, L].
          positions: int [L, rope_axes]; None counts 0..L-1 along a sequence.
          mask: bool [B, L, L], True where the query (second axis) sees the key (third axis);
            None lets everything see everything.

        Returns:
          States [B, L, width] in the activation dtype; row t belongs to the prediction of token t.

        Raises:
          ValueError: if `positions` does not fit `rope_axes`.
        """
        config = self.config
        if positions is None and config.rope_axes == 1:
            positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[:, None]
        if positions is None or positions.shape != (ids.shape[1], config.rope_axes):
            got = None if positions is None else positions.shape
            raise ValueError(f"positions need shape {(ids.shape[1], config.rope_axes)}, got {got}")
        x, _ = self.blocks(self.embed(ids), rotary_angles(positions, config), mask)
        x = self.ln_f(x)
        if config.shift_logits:
            x = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
        return x

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
