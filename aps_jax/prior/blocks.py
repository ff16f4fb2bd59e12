"""Layers of the masked transformer: linear maps, norms and the two kinds of block.

References: LLaDA arXiv:2502.09992, phi-1.5 arXiv:2309.05463, QK norm arXiv:2302.05442, Qwen3
arXiv:2505.09388.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.prior.attention import mix, rotate
from aps_jax.prior.config import TransformerConfig
from aps_jax.types import Array


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
        """Normalises the last axis of `x` [B, L, width], or of heads [B, L, heads, D]."""
        config = self.config
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], config.param_dtype)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(config: TransformerConfig, name: str | None = None) -> nn.LayerNorm:
    """Norm of mean and variance over the last axis, float32 inside, with scale and bias."""
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def _residual_init(config: TransformerConfig) -> nn.initializers.Initializer:
    """Residual branches start small, so that depth does not blow up the stream."""
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")


def _project_heads(config: TransformerConfig, x: Array, *, use_bias: bool) -> list[Array]:
    """Queries, keys and values [B, L, heads, D] of `x` [B, L, width], inside a block."""
    return [
        Linear(config, heads * config.head_size, use_bias, name=name)(x).reshape(
            *x.shape[:2], heads, config.head_size
        )
        for name, heads in (
            ("q", config.num_heads),
            ("k", config.kv_heads),
            ("v", config.kv_heads),
        )
    ]


def _attend(
    config: TransformerConfig,
    query: Array,
    key: Array,
    value: Array,
    angles: Array,
    mask: Array | None,
) -> Array:
    """Attention of rotated queries and keys, heads joined: [B, L, heads * D]."""
    query = rotate(query, angles, in_float32=config.rope_in_float32)
    key = rotate(key, angles, in_float32=config.rope_in_float32)
    mixed = mix(config, query, key, value, mask)
    return mixed.reshape(*mixed.shape[:2], -1)


class Block(nn.Module):
    """Attention and gated MLP, each pre-normed and with a residual connection (LLaMA)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None) -> tuple[Array, None]:
        """Maps [B, L, width] to the same shape; the second output is unused by the scan."""
        config = self.config
        init = _residual_init(config)
        normed = RMSNorm(config, name="attn_norm")(x)
        query, key, value = _project_heads(config, normed, use_bias=config.qkv_bias)
        if config.qk_norm:
            query = RMSNorm(config, name="q_norm")(query)
            key = RMSNorm(config, name="k_norm")(key)
        mixed = _attend(config, query, key, value, angles, mask)
        x = x + Linear(config, config.width, kernel_init=init, name="attn_out")(mixed)

        normed = RMSNorm(config, name="ff_norm")(x)
        gate = nn.silu(Linear(config, config.mlp_width, name="ff_proj")(normed))
        hidden = gate * Linear(config, config.mlp_width, name="up_proj")(normed)
        x = x + Linear(config, config.width, kernel_init=init, name="ff_out")(hidden)
        return x, None


class ParallelBlock(nn.Module):
    """Attention and MLP side by side after one norm, added to the stream together (phi)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None) -> tuple[Array, None]:
        """Maps [B, L, width] to the same shape; the second output is unused by the scan."""
        config = self.config
        init = _residual_init(config)
        normed = layer_norm(config, "attn_norm")(x)
        query, key, value = _project_heads(config, normed, use_bias=True)
        query, key = layer_norm(config, "q_norm")(query), layer_norm(config, "k_norm")(key)
        mixed = _attend(config, query, key, value, angles, mask)
        attended = Linear(config, config.width, True, init, name="attn_out")(mixed)

        hidden = nn.gelu(Linear(config, config.mlp_width, True, name="ff_in")(normed))
        return x + attended + Linear(config, config.width, True, init, name="ff_out")(hidden), None
