"""The safetensors format on memory maps, bfloat16 included: models larger than the memory.

Reading touches only the pages that are used, and writing goes straight to the file, so neither
needs room for a whole model. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: The limit of the reference implementation.
_MAX_HEADER = 100_000_000


class TensorFileError(ValueError):
    """The file is not a whole safetensors file; the message says what is wrong with it."""


def open_tensors(path: str | os.PathLike[str], *, writable: bool = False) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, in the order of the file, read when used.

    Args:
      path: the file.
      writable: let what is written to the arrays go to the file; otherwise they are read-only.

    Raises:
      TensorFileError: if the file is damaged, truncated or of another kind.
      OSError: if the file cannot be opened.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise TensorFileError("its header does not fit its size")
        header = _parse_header(file.read(length))
    data = np.empty(0, np.uint8)
    if size > 8 + length:
        data = np.memmap(path, np.uint8, mode="r+" if writable else "r", offset=8 + length)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _span(*item)):
        dtype, shape, (start, stop) = _describe(name, entry)
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise TensorFileError(f"the bytes of tensor {name!r} do not fit its shape")
        if stop > data.size:
            raise TensorFileError(f"it ends before tensor {name!r} does")
        tensors[name] = np.asarray(data[start:stop]).view(dtype).reshape(shape)
        end = stop
    if end != data.size:
        raise TensorFileError(f"{data.size - end} bytes follow its last tensor")
    return tensors


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TensorFileError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise TensorFileError("its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and byte range of one entry of the header."""
    span, shape = _span(name, entry), entry.get("shape")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise TensorFileError(f"its header describes tensor {name!r} wrongly")
    if entry.get("dtype") not in list(_DTYPES):
        raise TensorFileError(f"tensor {name!r} has the unsupported dtype {entry.get('dtype')}")
    return _DTYPES[entry["dtype"]], tuple(shape), span


def _span(name: str, entry: Any) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        raise TensorFileError(f"its header describes tensor {name!r} wrongly")
    return tuple(span)


def create_tensors(
    path: str | os.PathLike[str], specs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Creates a safetensors file of zeros and gives its arrays for writing.

    What is written to the arrays is in the file once they are deleted; the disk space is reserved
    at once, so that a full disk is an error here and not a crash in the middle.

    Args:
      path: file to create; must not exist.
      specs: shape and dtype of every tensor.

    Raises:
      OSError: if the file exists or there is not enough space.
    """
    # Large elements first keeps every tensor aligned, as the format demands of writers.
    order = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header, end = {}, 0
    for name in order:
        dtype, shape = np.dtype(specs[name].dtype), specs[name].shape
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if end:
            _reserve(file.fileno(), 8 + len(text), end)
    return open_tensors(path, writable=True)


def _reserve(descriptor: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)
    else:  # macOS has no such call.
        os.truncate(descriptor, offset + size)
