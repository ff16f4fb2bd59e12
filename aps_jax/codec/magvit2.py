"""MagVIT-v2 image tokenizer with look-up-free quantisation, as Flax modules.

One set of classes covers the public 95 M parameter model (`CodecConfig()`, 13 bits, stride 16) and
the small embedded one. Reference: arXiv:2310.05737, in the layout of the released PyTorch weights:
parameter names follow that checkpoint with dots turned into slashes.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.codec.config import CodecConfig, make_quantizer
from aps_jax.codec.convolution import conv_general_dilated, upsampled_conv
from aps_jax.codec.group_norm import GroupNorm
from aps_jax.types import Array, Codec, Key, PyTree, bind


def _conv(features: int, size: int, dtype: str, name: str, **settings: Any) -> nn.Conv:
    settings = {"conv_general_dilated": conv_general_dilated} | settings
    return nn.Conv(features, (size, size), dtype=dtype, name=name, **settings)


def _norm(config: CodecConfig, name: str) -> GroupNorm:
    return GroupNorm(config.num_groups, 1e-6, config.dtype, name=name)


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3 convolutions with a residual connection."""

    config: CodecConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to [B, h, w, features]."""
        dtype = self.config.dtype
        h = _conv(self.features, 3, dtype, "conv1")(nn.swish(_norm(self.config, "norm1")(x)))
        h = _conv(self.features, 3, dtype, "conv2")(nn.swish(_norm(self.config, "norm2")(h)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, dtype, "nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to the same shape."""
        batch, height, width, channels = x.shape
        normed = _norm(self.config, "norm")(x)
        query, key, value = (
            _conv(channels, 1, self.config.dtype, name)(normed).reshape(batch, -1, channels)
            for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bqc,bkc->bqk", query, key) * channels**-0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(x.shape)
        return x + _conv(channels, 1, self.config.dtype, "proj_out")(mixed)


class _Middle(nn.Module):
    """Residual block, attention, residual block at the token grid."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResidualBlock(self.config, x.shape[-1], name="block_1")(x)
        x = AttentionBlock(self.config, name="attn_1")(x)
        return ResidualBlock(self.config, x.shape[-1], name="block_2")(x)


class _Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on the right and at the bottom only."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = ((0, 1), (0, 1))
        conv = _conv(x.shape[-1], 3, self.config.dtype, "conv", strides=2, padding=padding)
        return conv(x)


class _Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.config.dtype
        return _conv(x.shape[-1], 3, dtype, "conv", conv_general_dilated=upsampled_conv)(x)


class _Level(nn.Module):
    """Residual blocks of one resolution, then an optional change of resolution."""

    config: CodecConfig
    features: int
    num_blocks: int
    resample: str | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index in range(self.num_blocks):
            x = ResidualBlock(self.config, self.features, name=f"block_{index}")(x)
        if self.resample == "down":
            x = _Downsample(self.config, name="downsample")(x)
        elif self.resample == "up":
            x = _Upsample(self.config, name="upsample")(x)
        return x


class _PatchBlock(nn.Module):
    """Pre-normalised two-layer perceptron with a residual connection, as a step of a scan."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        width, dtype = self.config.patch_width, self.config.dtype
        h = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name="norm")(x)
        h = nn.Dense(width, dtype=dtype, name="dense1")(h)
        h = nn.Dense(width, dtype=dtype, name="dense2")(nn.swish(h))
        return x + h, None


class PatchPath(nn.Module):
    """What one patch says alone: a perceptron on every vector of its input, without neighbours.

    In the encoder it maps the pixels of a token's patch to features, in the decoder a code to the
    pixels. Most of what a codebook of 13 bits on 4x4 pixels gains needs no context, and dense
    layers learn it in a tenth of the time that convolutions take.
    """

    config: CodecConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., C] to [..., features]."""
        config = self.config
        x = nn.Dense(config.patch_width, dtype=config.dtype, name="dense_in")(x)
        blocks = nn.scan(
            _PatchBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.patch_blocks,
            unroll=config.patch_blocks,
        )
        x, _ = blocks(config, name="blocks")(x, None)
        x = nn.swish(nn.LayerNorm(epsilon=1e-6, dtype=config.dtype, name="norm_out")(x))
        return nn.Dense(self.features, dtype=config.dtype, name="dense_out")(x)


def space_to_depth(x: Array, side: int) -> Array:
    """Pixels [B, H, W, C] as patches [B, H / side, W / side, side * side * C], rows first."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, height // side, width // side, -1)


def depth_to_space(patches: Array, side: int) -> Array:
    """Inverse of `space_to_depth`."""
    batch, height, width, depth = patches.shape
    x = patches.reshape(batch, height, width, side, side, depth // side**2).swapaxes(2, 3)
    return x.reshape(batch, height * side, width * side, -1)


class Encoder(nn.Module):
    """Image to pre-quantisation features."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images [B, H, W, 3] in [-1, 1] to numbers [B, h, w, num_features]."""
        config, pixels = self.config, x
        last = len(config.encoder_channels) - 1
        x = _conv(config.encoder_channels[0], 3, config.dtype, "conv_in")(x)
        for level, features in enumerate(config.encoder_channels):
            resample = "down" if level < last else None
            blocks = config.encoder_blocks[level]
            x = _Level(config, features, blocks, resample, name=f"down_{level}")(x)
        x = _Middle(config, name="mid")(x)
        x = nn.swish(_norm(config, "norm_out")(x))
        x = _conv(config.num_features, 3, config.dtype, "conv_out")(x)
        x = _conv(config.num_features, 1, config.dtype, "quant_conv")(x)
        if config.patch_width:
            patches = space_to_depth(pixels, config.stride)
            x = x + PatchPath(config, config.num_features, name="patch")(patches)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Codes to image."""

    config: CodecConfig

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        """Maps numbers [B, h, w, num_features] to images [B, H, W, 3], nominally in [-1, 1]."""
        config = self.config
        last = len(config.decoder_channels) - 1
        x = _conv(config.num_features, 1, config.dtype, "post_quant_conv")(codes)
        x = _conv(config.decoder_channels[last], 3, config.dtype, "conv_in")(x)
        x = _Middle(config, name="mid")(x)
        for level in range(last, -1, -1):
            resample = "up" if level > 0 else None
            blocks = config.decoder_blocks[level]
            features = config.decoder_channels[level]
            x = _Level(config, features, blocks, resample, name=f"up_{level}")(x)
        x = nn.swish(_norm(config, "norm_out")(x))
        x = _conv(3, 3, config.dtype, "conv_out")(x)
        if config.patch_width:
            patches = PatchPath(config, 3 * config.stride**2, name="patch")(codes)
            x = x + depth_to_space(patches, config.stride)
        return x.astype(jnp.float32)


def _encode(params: PyTree, x: Array, *, config: CodecConfig) -> Array:
    found = Encoder(config).apply({"params": params["encoder"]}, x)
    return config.features(cast(Array, found))


def _decode(params: PyTree, codes: Array, *, config: CodecConfig) -> Array:
    numbers = config.numbers(codes)
    return cast(Array, Decoder(config).apply({"params": params["decoder"]}, numbers))


def init_codec_params(key: Key, config: CodecConfig) -> PyTree:
    """Random weights `{"encoder": ..., "decoder": ...}` of a codec, and the table of "vq"."""
    key_encoder, key_decoder = jax.random.split(key)
    grid = 2
    image = jnp.zeros((1, grid * config.stride, grid * config.stride, 3), jnp.float32)
    codes = jnp.zeros((1, grid, grid, config.num_features), jnp.float32)
    params = {
        "encoder": Encoder(config).init(key_encoder, image)["params"],
        "decoder": Decoder(config).init(key_decoder, codes)["params"],
    }
    if config.quantizer == "vq":
        shape = (2**config.num_bits, config.code_width)
        table = jax.random.normal(jax.random.fold_in(key, 2), shape, jnp.float32)
        params["quantizer"] = {"table": table}
    return params


def make_codec(config: CodecConfig, params: PyTree) -> Codec:
    """Bundles weights with the functions that use them.

    Args:
      config: sizes that the weights were built with.
      params: weights as from `init_codec_params`.

    Returns:
      A codec for images whose height and width are multiples of `config.stride`.
    """
    return Codec(
        params=params,
        quantizer=make_quantizer(config, params),
        encode=bind(_encode, config=config),
        decode=bind(_decode, config=config),
        stride=config.stride,
    )


def encode_tokens(codec: Codec, x: Array) -> Array:
    """Tokens int32 [B, *grid] of images [B, H, W, 3].

    Raises:
      ValueError: if H or W is not a multiple of the codec's stride, or it cannot encode.
    """
    if codec.encode is None:
        raise ValueError("this codec only decodes; it has no encoder")
    if x.ndim != 4 or x.shape[1] % codec.stride or x.shape[2] % codec.stride:
        raise ValueError(
            f"images have shape {x.shape}; need [B, H, W, 3], H and W multiples of {codec.stride}"
        )
    return codec.quantizer.nearest(codec.encode(codec.params, x))


def decode_tokens(codec: Codec, tokens: Array) -> Array:
    """Images [B, H, W, 3] of tokens int [B, *grid] in [0, K)."""
    return codec.decode(codec.params, codec.quantizer.lookup(tokens))


def reconstruct(codec: Codec, x: Array) -> Array:
    """Encodes and decodes images of any size: pads by edge replication, crops back."""
    height, width = x.shape[1:3]
    pad_rows, pad_columns = -height % codec.stride, -width % codec.stride
    padded = jnp.pad(x, ((0, 0), (0, pad_rows), (0, pad_columns), (0, 0)), mode="edge")
    return decode_tokens(codec, encode_tokens(codec, padded))[:, :height, :width]
