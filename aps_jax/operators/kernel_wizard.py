"""Nonlinear blur: the KernelWizard network of BKSE as a measurement operator.

Reference: "Exploring Image Deblurring via Encoded Blur Kernel Space", arXiv:2104.00317. Weights
are not part of this package: `aps-jax convert kernel_wizard` converts `GOPRO_wVAE.pth`, see the
README of github.com/VinAIResearch/blur-kernel-space-exploring. Parameter names follow that file:
`feature_extractor.6.conv1` is `feature_extractor_6/conv1` here, and level i of the nested
`adapter.model.submodule...` is `down_i` and `up_i`. Kernels go from OIHW to HWIO, those of `up_i`
from (in, out, h, w) to (h, w, in, out) with both spatial axes flipped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.convolution import conv_general_dilated
from aps_jax.operators._checks import channels
from aps_jax.operators._correlation import pad_axis
from aps_jax.tasks import declared
from aps_jax.types import Array, Key, Operator, PyTree, bind

#: Image sides are padded to a multiple of this: 4 for the features, 32 for the five U-Net levels.
STRIDE = 128
NUM_LEVELS = 5
#: Number of the first residual block in each part of the network.
BLOCKS_FROM = {"feature_extractor": 6, "recon_trunk": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelWizardConfig:
    """Sizes of the network; the defaults are the released weights.

    Attributes:
      num_features: channels at full resolution; the U-Net has 1, 2, 4, 8, 8 times as many.
      num_front_blocks: residual blocks before the U-Net.
      num_back_blocks: residual blocks after it.
      kernel_dim: channels of the blur code.
    """

    num_features: int = 64
    num_front_blocks: int = 10
    num_back_blocks: int = 20
    kernel_dim: int = 512


@declared
def nonlinear_blur(params: PyTree, *, config: KernelWizardConfig | None = None) -> Operator:
    """Nonlinear blur by a network with one fixed blur code, as in DAPS.

    A(x) = clip(2 W((x + 1) / 2, k) - 1, -1, 1) with k from NumPy's RandomState(0). Images whose
    sides are no multiples of 128 are reflected to the next multiple and the result is cropped.

    The sizes of the network are those that `params` have, unless a `config` says so.

    Returns:
      Operator [B, H, W, 3] -> [B, H, W, 3].

    Raises:
      ValueError: if `params` does not belong to `config`.
    """
    config = config or config_of(params)
    _require_same_shapes(params, param_shapes(config))
    return Operator(apply=bind(_blur, config=config), name="nonlinear_blur", params=params)


def init_params(key: Key, *, config: KernelWizardConfig | None = None) -> PyTree:
    """Draws random weights for tests, small enough for the network to stay near the identity.

    Args:
      key: typed PRNG key.
      config: sizes of the network; None for those of the released weights.

    Returns:
      Parameter tree of `KernelWizard`: kernels of variance 0.2 / fan-in, biases 0.
    """
    shapes, structure = jax.tree.flatten(param_shapes(config or KernelWizardConfig()))
    sizes = [math.prod(leaf.shape) for leaf in shapes]
    # One long draw instead of one per leaf, which would compile for every shape.
    draws = np.split(
        np.asarray(jax.random.normal(key, (sum(sizes),), jnp.float32)), np.cumsum(sizes)[:-1]
    )
    leaves = []
    for leaf, draw in zip(shapes, draws, strict=True):
        fan_in = math.prod(leaf.shape[:-1])
        scale = math.sqrt(0.2 / fan_in) if len(leaf.shape) == 4 else 0.0
        leaves.append(jnp.asarray(np.float32(scale) * draw.reshape(leaf.shape)))
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def param_shapes(config: KernelWizardConfig) -> PyTree:
    """Shapes and dtypes of the parameters of `KernelWizard`, without computing anything."""
    return jax.eval_shape(
        lambda key: init_network_params(key, config), jax.eval_shape(jax.random.key, 0)
    )


def config_of(params: PyTree) -> KernelWizardConfig:
    """Sizes of the network that `params` belong to.

    Raises:
      ValueError: these are no weights of `KernelWizard`.
    """

    def count(part: str) -> int:
        names = (name for name in params if name.startswith(f"{part}_"))
        return sum("conv1" in params[name] for name in names)

    try:
        num_features = params["feature_extractor_0"]["kernel"].shape[-1]
        deepest = NUM_LEVELS - 1
        joined = params[f"up_{deepest}"]["kernel"].shape[2]
        return KernelWizardConfig(
            num_features=num_features,
            num_front_blocks=count("feature_extractor"),
            num_back_blocks=count("recon_trunk"),
            kernel_dim=joined - params[f"down_{deepest}"]["kernel"].shape[-1],
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("params are no weights of the KernelWizard network") from None


def blur_code(height: int, width: int, kernel_dim: int = 512) -> np.ndarray:
    """The fixed blur code k, float32 [1, height / 128, width / 128, kernel_dim].

    At 256x256 pixels it is the one of DAPS; other sizes draw their numbers in the same order.
    """
    shape = (1, kernel_dim, height // STRIDE, width // STRIDE)
    code = np.random.RandomState(0).randn(*shape).astype(np.float32) * np.float32(1.2)
    return code.transpose(0, 2, 3, 1)


def init_network_params(key: Key, config: KernelWizardConfig) -> PyTree:
    """Weights as Flax initialises them; mostly for their shapes."""
    image = jnp.zeros((1, STRIDE, STRIDE, 3), "float32")
    code = jnp.zeros((1, 1, 1, config.kernel_dim), "float32")
    return KernelWizard(config).init(key, image, code)["params"]


def _require_same_shapes(params: PyTree, required: PyTree) -> None:
    got, want = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, required)
    )
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            raise ValueError(
                f"nonlinear_blur: parameter {name} has shape {got.get(name, 'missing')}, required "
                f"{want.get(name, 'none of that name')}"
            )


def _blur(params: PyTree, x: Array, *, config: KernelWizardConfig) -> Array:
    channels("nonlinear_blur", x, 3)
    height, width = x.shape[1:3]
    u = (x + 1.0) / 2.0
    for axis in (1, 2):
        missing = -u.shape[axis] % STRIDE
        if missing:
            u = pad_axis(u, missing // 2, missing - missing // 2, axis=axis, mode="reflect")
    code = jnp.asarray(blur_code(u.shape[1], u.shape[2], config.kernel_dim))
    blurred = cast(Array, KernelWizard(config).apply({"params": params}, u, code))
    top, left = -height % STRIDE // 2, -width % STRIDE // 2
    blurred = blurred[:, top : top + height, left : left + width]
    return jnp.clip(2.0 * blurred - 1.0, -1.0, 1.0)


def _conv(features: int, size: int, name: str, *, stride: int = 1, use_bias: bool = True):
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class _ResidualBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.relu(_conv(self.features, 3, "conv1")(x))
        return x + _conv(self.features, 3, "conv2")(h)


class KernelWizard(nn.Module):
    """Blurs images in [0, 1] with an encoded blur kernel (`adaptKernel` of BKSE)."""

    config: KernelWizardConfig

    @nn.compact
    def __call__(self, x: Array, code: Array) -> Array:
        """Maps images [B, H, W, 3] and a code [1, H/128, W/128, kernel_dim] to [B, H, W, 3]."""
        config = self.config
        nf = config.num_features
        h = x
        for index, stride in ((0, 1), (2, 2), (4, 2)):
            h = nn.leaky_relu(_conv(nf, 3, f"feature_extractor_{index}", stride=stride)(h), 0.1)
        for index in range(config.num_front_blocks):
            h = _ResidualBlock(nf, name=f"feature_extractor_{6 + index}")(h)
        h = self._adapt(h, code)
        for index in range(config.num_back_blocks):
            h = _ResidualBlock(nf, name=f"recon_trunk_{index}")(h)
        last = config.num_back_blocks
        for index in (last, last + 3):
            h = pixel_shuffle(_conv(4 * nf, 3, f"recon_trunk_{index}")(h))
            h = nn.leaky_relu(h, 0.1)
        h = nn.leaky_relu(_conv(nf, 3, f"recon_trunk_{last + 6}")(h), 0.1)
        return x + _conv(3, 3, f"recon_trunk_{last + 8}")(h)

    def _adapt(self, h: Array, code: Array) -> Array:
        """U-Net of five levels that meets the blur code at its bottom."""
        nf = self.config.num_features
        features = [nf * min(2**level, 8) for level in range(NUM_LEVELS)]
        skips = []
        for level, count in enumerate(features):
            if level > 0:
                h = nn.leaky_relu(h, 0.2)
            h = _conv(count, 4, f"down_{level}", stride=2, use_bias=False)(h)
            skips.append(h)
        h = jnp.broadcast_to(code, (h.shape[0], *code.shape[1:]))
        for level in reversed(range(NUM_LEVELS)):
            # The code comes after the deepest features, skips come after what rises from below.
            pair = (skips[level], h) if level == NUM_LEVELS - 1 else (h, skips[level])
            h = nn.ConvTranspose(
                features[max(level - 1, 0)],
                (4, 4),
                strides=(2, 2),
                padding="SAME",
                use_bias=level == 0,
                name=f"up_{level}",
            )(nn.relu(jnp.concatenate(pair, axis=-1)))
        return nn.tanh(h)


def pixel_shuffle(x: Array) -> Array:
    """Moves groups of 4 channels to 2x2 pixels: [B, H, W, 4 C] -> [B, 2 H, 2 W, C]."""
    batch, height, width, num_channels = x.shape
    x = x.reshape(batch, height, width, num_channels // 4, 2, 2)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * height, 2 * width, num_channels // 4)
