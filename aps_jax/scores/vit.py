"""Vision transformers and the plain blocks that they share with the text tower of CLIP.

Pure functions over nested dicts of weights: attention and MLP with biases, each after a LayerNorm
and with a residual connection; positions are learned and added once. Layers are scanned, so their
weights are stacked on a leading axis. References: ViT arXiv:2010.11929, CLIP arXiv:2103.00020.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.prior.attention import attend
from aps_jax.sampling.checks import channels_last
from aps_jax.types import Array, Key, PyTree

#: What the hidden numbers of an MLP go through, by the names that config.json uses.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Sizes of a stack of plain blocks; every field is a JSON value.

    Attributes:
      width: residual width.
      num_layers: number of blocks.
      num_heads: heads of the attention.
      mlp_width: hidden width of the MLP.
      activation: of the MLP, "quick_gelu" (CLIP as OpenAI published it) or "gelu".
      norm_eps: epsilon inside the square root of the norms.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be {' or '.join(ACTIVATIONS)}, got {self.activation!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(BlocksConfig):
    """Sizes of a vision transformer.

    Attributes:
      patch_size: pixels per patch along each axis.
      side: patches along each axis of the square image.
      pre_norm: a LayerNorm before the first block (CLIP).
      patch_bias: a bias on the embedding of patches (DINO).
    """

    patch_size: int
    side: int
    pre_norm: bool = False
    patch_bias: bool = False

    @property
    def image_size(self) -> int:
        """Pixels along each axis of the square image."""
        return self.patch_size * self.side


def blocks_shapes(config: BlocksConfig) -> dict[str, Any]:
    """Shapes of the weights of the blocks, stacked."""
    layers, width, hidden = config.num_layers, config.width, config.mlp_width

    def norm() -> dict[str, Any]:
        return {"scale": (layers, width), "bias": (layers, width)}

    def linear(size: int, features: int) -> dict[str, Any]:
        return {"kernel": (layers, size, features), "bias": (layers, features)}

    return {
        "attn_norm": norm(),
        **{name: linear(width, width) for name in ("q", "k", "v", "attn_out")},
        "ff_norm": norm(),
        "ff_in": linear(width, hidden),
        "ff_out": linear(hidden, width),
    }


def vit_shapes(config: VitConfig) -> dict[str, Any]:
    """Shapes of the weights of a vision transformer."""
    width, patch = config.width, config.patch_size
    norm = {"scale": (width,), "bias": (width,)}
    bias = {"bias": (width,)} if config.patch_bias else {}
    return {
        "patch": {"kernel": (patch, patch, 3, width), **bias},
        "class": (width,),
        "positions": (config.side**2 + 1, width),
        **({"pre_norm": norm} if config.pre_norm else {}),
        "blocks": blocks_shapes(config),
        "post_norm": norm,
    }


def draw_params(key: Key, shapes: PyTree) -> PyTree:
    """Random weights in nested dicts of shapes: kernels by fan-in, norms that change nothing."""
    paths, structure = jax.tree_util.tree_flatten_with_path(
        shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    keys = jax.random.split(key, len(paths))

    def draw(key: Key, name: str, shape: tuple[int, ...]) -> Array:
        if name in ("scale", "bias"):
            return jnp.full(shape, float(name == "scale"))
        fan_in = math.prod(shape[-4:-1] if len(shape) == 4 else shape[-2:-1])
        size = fan_in**-0.5 if name == "kernel" else 0.02
        return size * jax.random.normal(key, shape, jnp.float32)

    leaves = [draw(k, path[-1].key, shape) for k, (path, shape) in zip(keys, paths, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def layer_norm(params: PyTree, x: Array, eps: float) -> Array:
    """Norm of mean and variance over the last axis of `x` [B, L, width]."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * params["scale"][None, None, :] + params["bias"][None, None, :]


def _linear(params: PyTree, x: Array) -> Array:
    # Flat, for the gradients of a product of three-dimensional arrays are slow on CPU.
    y = x.reshape(-1, x.shape[-1]) @ params["kernel"] + params["bias"][None, :]
    return y.reshape(*x.shape[:-1], -1)


def run_blocks(
    params: PyTree, x: Array, *, config: BlocksConfig, mask: Array | None = None
) -> Array:
    """The stream `x` [B, L, width] after all blocks.

    Args:
      params: weights in `blocks_shapes`.
      x: embedded tokens.
      config: sizes.
      mask: bool [1, L, L], True where the query (second axis) sees the key; None for everywhere.
    """
    activation = ACTIVATIONS[config.activation]

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], config.num_heads, -1)

    def block(x: Array, layer: PyTree) -> tuple[Array, None]:
        normed = layer_norm(layer["attn_norm"], x, config.norm_eps)
        query, key, value = (heads(_linear(layer[name], normed)) for name in "qkv")
        mixed = attend(query, key, value, mask).reshape(x.shape)
        x = x + _linear(layer["attn_out"], mixed)
        normed = layer_norm(layer["ff_norm"], x, config.norm_eps)
        return x + _linear(layer["ff_out"], activation(_linear(layer["ff_in"], normed))), None

    return jax.lax.scan(block, x, params)[0]


def run_vit(params: PyTree, pixels: Array, *, config: VitConfig) -> Array:
    """Normed states [B, 1 + side * side, width], that of the class token first.

    Args:
      params: weights in `vit_shapes`.
      pixels: normalised images float32 [B, image_size, image_size, 3].
      config: sizes.
    """
    batch, side, patch = pixels.shape[0], config.side, config.patch_size
    x = pixels.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patch"]["kernel"].reshape(-1, config.width)
    x = (x.reshape(-1, kernel.shape[0]) @ kernel).reshape(batch, side * side, config.width)
    if config.patch_bias:
        x = x + params["patch"]["bias"][None, None, :]
    first = jnp.broadcast_to(params["class"][None, None, :], (batch, 1, config.width))
    x = jnp.concatenate([first, x], axis=1) + params["positions"][None]
    if config.pre_norm:
        x = layer_norm(params["pre_norm"], x, config.norm_eps)
    x = run_blocks(params["blocks"], x, config=config)
    return layer_norm(params["post_norm"], x, config.norm_eps)


def square_pixels(x: Array, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """What the published models are shown: the middle square of an image, resized, normalised.

    The shorter side becomes `size` pixels by the antialiased bicubic filter of Pillow (a = -0.5),
    and the middle is cut out. Values stay real numbers, where Pillow's are rounded to 8 bits.

    Args:
      x: images float32 [B, H, W, 3] in [-1, 1].
      size: side of the result in pixels.
      mean: of each channel of pixels in [0, 1].
      std: of the same.

    Returns:
      Float32 [B, size, size, 3], differentiable in `x`.

    Raises:
      ValueError: no colour images.
    """
    if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 1:
        raise ValueError(f"images must be [B, H, W, 3], got {x.shape}{channels_last(x.shape)}")
    x = (x.astype(jnp.float32) + 1) / 2
    short = min(x.shape[1:3])
    # As in the published preprocessing, the longer side is rounded down.
    height, width = (size * side // short for side in x.shape[1:3])
    if (height, width) != x.shape[1:3]:
        x = jax.image.resize(x, (x.shape[0], height, width, 3), "cubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    x = x[:, top : top + size, left : left + size]
    shift, scale = (np.asarray(v, np.float32)[None, None, None] for v in (mean, std))
    return (x - shift) / scale


def unit(x: Array) -> Array:
    """Vectors [B, D] of length 1, with a finite gradient where they vanish."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
