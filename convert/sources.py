"""Opens published checkpoints: safetensors or `.bin`, one file or shards with an index.

Nothing is read before it is used: `Source.shapes` comes from headers, and `Source.tensors()` gives
one tensor after the other and hashes the files on the way. `.bin` files are pickles; they are
read only by `torch.load(weights_only=True)`, which builds tensors and runs nothing. Checkpoints of
a training, `{"model": {name: tensor}, "optimizer": ...}`, are such files too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from aps_jax.io.tensors import TensorFileError, open_tensors

_STEMS = ("model", "pytorch_model")
_ENDINGS = (".safetensors", ".bin")
#: Endings of files that torch reads; all but the first only where the file itself is named.
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
#: What wrappers of a model put before the name of every tensor: DistributedDataParallel and
#: `torch.compile`.
_WRAPPERS = ("module.", "_orig_mod.")
_FLOATS = ("float32", "float16", "bfloat16", "float64")


class ConversionError(ValueError):
    """The weights cannot be converted; the message is one line with the cause."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      file: name of its file.
      name: its name.
      array: its values, read when used.
      digest: SHA-256 of the file up to the end of this tensor, so that of the last tensor is that
        of the file; for a pickle, whose tensors are in no order, that of the file.
    """

    file: str
    name: str
    array: np.ndarray
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A published checkpoint on disk.

    Attributes:
      folder: where the configuration and the tokenizer lie, if there are any.
      files: weight files.
      shapes: shape of every tensor, by name.
      config: what config.json says; empty if there is none.
    """

    folder: Path
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, file after file; drop each before asking for the next."""
        for path in self.files:
            yield from _stream(path)

    def size(self, name: str, axis: int = 0) -> int:
        """Length of one axis of tensor `name`; ConversionError if there is no such tensor."""
        shape = self.shapes.get(name)
        if shape is None or axis >= len(shape):
            what = "no" if shape is None else f"a scalar or vector {shape} for"
            raise ConversionError(
                f"{self.folder} has {what} tensor {name!r}: it is another kind of model, "
                "or incomplete"
            )
        return shape[axis]

    def count(self, prefix: str) -> int:
        """How many numbers follow `prefix` in the names of tensors, 0 to the largest."""
        pieces = (
            name[len(prefix) :].split(".")[0] for name in self.shapes if name.startswith(prefix)
        )
        return 1 + max((int(piece) for piece in pieces if piece.isdecimal()), default=-1)

    def setting(self, name: str) -> Any:
        """A value of config.json that no tensor shows; ConversionError if it is not there."""
        value = self.config.get(name)
        if value is None:
            raise ConversionError(
                f"{self.folder / 'config.json'} must give {name}, which no tensor shows; "
                "fetch it from where the weights are from"
            )
        return value

    def num_heads(self, name: str, width: int) -> int:
        """Setting `name`, a number of heads of together `width`; ConversionError if it is none."""
        value = self.setting(name)
        if not isinstance(value, int) or value < 1 or width % value:
            raise ConversionError(
                f"config.json says {name} is {value!r}, which does not divide the width {width}"
            )
        return value

    def check_config(self, expected: Mapping[str, Any], reason: str) -> None:
        """ConversionError if config.json says anything else than `expected`; it may say nothing."""
        for name, needed in expected.items():
            value = self.config.get(name)
            if value is not None and value != needed:
                raise ConversionError(
                    f"config.json says {name} is {value!r}, but only {needed!r} {reason}"
                )


def open_source(path: Path) -> Source:
    """Finds the weights in a folder, or takes a single file.

    In a folder, `model` comes before `pytorch_model`, safetensors before `.bin`, and an index
    before a single file.

    Raises:
      ConversionError: nothing there, shards missing or damaged, or an index that is wrong.
    """
    if path.is_file():
        folder, files, index = path.parent, (path,), None
        if path.name.endswith(".index.json"):
            index = _read_index(path)
            files = _indexed_files(path, index)
    elif path.is_dir():
        folder = path
        files, index = _find(path)
    else:
        raise ConversionError(f"no such file or folder: {path}")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, array in read_file(file).items():
            if index is not None and index.get(name) != file.name:
                raise ConversionError(f"{file} has tensor {name!r}, unlike the index says")
            shapes[name] = array.shape
    for name, holder in (index or {}).items():
        if name not in shapes:
            raise ConversionError(f"{holder} lacks tensor {name!r}, which the index lists")
    config = folder / "config.json"
    return Source(
        folder=folder,
        files=files,
        shapes=shapes,
        config=read_json(config) if config.is_file() else {},
    )


def _find(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    for ending in _ENDINGS:
        for stem in _STEMS:
            path = folder / f"{stem}{ending}.index.json"
            if path.is_file():
                index = _read_index(path)
                return _indexed_files(path, index), index
            path = folder / f"{stem}{ending}"
            if path.is_file():
                return (path,), None
    wanted = ", ".join(f"{stem}{ending}" for ending in _ENDINGS for stem in _STEMS)
    raise ConversionError(
        f"{folder} has none of {wanted}, nor an index of one; name a file called otherwise itself"
    )


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise ConversionError(f"{path} has no weight_map of file names; fetch it again")
    return index


def _indexed_files(path: Path, index: Mapping[str, str]) -> tuple[Path, ...]:
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(_ENDINGS):
            raise ConversionError(f"{path} points at {name!r}, which is no weights file beside it")
        if not (path.parent / name).is_file():
            raise ConversionError(f"{path} names {name}, which is missing; fetch it too")
    return tuple(path.parent / name for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConversionError if the file is anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} is not a JSON object; fetch it again")
    return value


def read_file(path: Path) -> Mapping[str, np.ndarray]:
    """Arrays of one weights file; those of safetensors are read when used.

    Raises:
      ConversionError: damaged file, or `.bin` without torch or with anything but tensors in it.
    """
    if path.suffix in _PICKLES:
        return _read_bin(path)
    try:
        return open_tensors(path)
    except (TensorFileError, OSError) as error:
        raise ConversionError(
            f"{path} is damaged, truncated or no safetensors file ({error}); fetch it again"
        ) from None


def _read_bin(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise ConversionError(
            f"{path} is a PyTorch pickle and needs torch; pip install 'aps_jax[torch]', "
            "or fetch the safetensors form"
        ) from None
    try:
        # Only the zip form, which all recent versions write, can be mapped instead of read.
        mmap = zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({refused[1]})" if refused else ""
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors{what}, which could run code; fetch the "
            "safetensors form, or have its maker save model.state_dict() alone"
        ) from None
    except Exception as error:  # A broken pickle can raise almost anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{path} is damaged or truncated ({reason})") from None
    tensors = unwrap(path, loaded, torch.Tensor)
    return {name: _to_numpy(path, name, value) for name, value in tensors.items()}


def unwrap(path: Path, loaded: Any, tensor_type: type) -> dict[str, Any]:
    """The named tensors of what torch loaded, taken out of the checkpoint of a training.

    Trainings save their models beside the optimiser, counters and the like. Under which name is
    each code's own choice ("model" in Show-o's, "state_dict" in Lightning's), so it is the one
    entry that is all named tensors, with dots in names, as modules have them. Where several are,
    such as an average of the weights beside the weights, only a person can choose.

    Args:
      path: the file, for messages.
      loaded: its content.
      tensor_type: class of a tensor.

    Raises:
      ConversionError: no dictionary, or one with several sets of named tensors.
    """

    def is_state(value: Any) -> bool:
        is_named = isinstance(value, dict) and all(
            isinstance(name, str) and isinstance(tensor, tensor_type)
            for name, tensor in value.items()
        )
        return is_named and any("." in name for name in value)

    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    found = [name for name, value in loaded.items() if is_state(value)]
    if len(found) > 1:
        raise ConversionError(
            f"{path} holds several sets of weights, {', '.join(map(repr, found))}; save one of "
            f"them alone: torch.save(torch.load(FILE, weights_only=True)[{found[0]!r}], OTHER)"
        )
    tensors = loaded[found[0]] if found else loaded
    for wrapper in _WRAPPERS:
        if all(str(name).startswith(wrapper) for name in tensors):
            tensors = {str(name).removeprefix(wrapper): tensors[name] for name in tensors}
    return tensors


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports] - an extra

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ConversionError(f"{path}: {name!r} is a {type(value).__name__}, not a dense tensor")
    value = value.detach()
    if value.dtype == torch.bfloat16:  # Unknown to numpy by itself, so its bits pass as integers.
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def is_float(array: np.ndarray) -> bool:
    """Whether the array holds one of the floating types that checkpoints use."""
    return array.dtype.name in _FLOATS


def _stream(path: Path) -> Iterator[Tensor]:
    """Tensors of one file, hashed as they are read."""
    arrays = read_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix in _PICKLES:
            while piece := file.read(2**22):
                digest.update(piece)
        else:
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
    for name, array in arrays.items():
        if path.suffix not in _PICKLES:
            digest.update(array.reshape(-1).view(np.uint8).data)
        yield Tensor(path.name, name, array, digest.hexdigest())
