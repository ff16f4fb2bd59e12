"""The two formats that converted weights are written in, filled slice by slice.

`safetensors` is one file behind a memory map. `orbax` is an Orbax checkpoint of zarr3 arrays in
chunks, which devices and hosts read separately. Either way nothing larger than one chunk is held
in memory, what was written survives the process, and a file or folder that was begun can be opened
again to go on.
"""

from __future__ import annotations

import logging
import math
import mmap
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from aps_jax.io.orbax_arrays import ArrayError, open_array, read
from aps_jax.io.tensors import TensorFileError, create_tensors, open_tensors

from .sources import ConversionError

Format = Literal["safetensors", "orbax"]
Specs = Mapping[str, jax.ShapeDtypeStruct]
Region = tuple[slice, ...]

#: Largest chunk of an array in an Orbax checkpoint.
CHUNK_BYTES = 2**24
#: Pieces of an axis that `aps_jax.sharding` splits: meshes of up to so many devices read whole
#: chunks.
_SPLITS = 8
#: Side of the square pieces that are written to a memory map.
_SIDE = 2048


class Slot(Protocol):
    """One array of a store, or one slice of it along the layers."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def regions(self) -> Iterator[Region]:
        """Pieces that cover the slot and are written or read at once."""
        ...

    def write(self, region: Region, values: np.ndarray) -> None:
        """Hands `values` over; they are stored after the next `Store.flush`."""
        ...

    def read(self, region: Region) -> np.ndarray:
        """What is stored."""
        ...


class Store(Protocol):
    """Weights on disk."""

    def slot(self, name: str, layer: int | None) -> Slot:
        """Array `name`, or its slice `layer`."""
        ...

    def flush(self) -> None:
        """Waits until everything written is on disk."""
        ...


def open_store(kind: Format, path: Path, specs: Specs) -> Store:
    """Opens what `create_store` made, for reading and writing.

    Raises:
      ConversionError: if it is not there, damaged or of other specs.
    """
    try:
        return _STORES[kind](path, specs)
    except (TensorFileError, OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read back: {error}") from None


def create_store(
    kind: Format,
    path: Path,
    specs: Specs,
    *,
    stacked: Collection[str],
    axes: Mapping[str, int | None],
) -> Store:
    """Creates the file or folder `path`.

    Args:
      kind: format.
      path: must not exist.
      specs: shape and dtype of every array.
      stacked: the arrays that are filled layer by layer.
      axes: which axis of each array a mesh may split, counted from the end.

    Raises:
      OSError: if it exists or there is no space.
    """
    if kind == "safetensors":
        create_tensors(path, specs)
    else:
        _create_orbax(path, specs, stacked, axes)
    return open_store(kind, path, specs)


def remove_store(path: Path) -> None:
    """Deletes a file or folder of weights, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def grid(shape: tuple[int, ...], sides: tuple[int, ...]) -> Iterator[Region]:
    """Pieces of `sides` that cover an array of `shape`."""
    sides = tuple(max(side, 1) for side in sides)
    counts = [math.ceil(size / side) for size, side in zip(shape, sides, strict=True)]
    for index in np.ndindex(*counts):
        yield tuple(slice(i * side, (i + 1) * side) for i, side in zip(index, sides, strict=True))


def squares(shape: tuple[int, ...], side: int) -> Iterator[Region]:
    """Pieces of at most `side` along the last two axes; those before are short (convolutions)."""
    return grid(shape, (*shape[:-2], *(side for _ in shape[-2:])))


class _MappedSlot:
    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def regions(self) -> Iterator[Region]:
        return squares(self.shape, _SIDE)

    def write(self, region: Region, values: np.ndarray) -> None:
        self._array[region] = values

    def read(self, region: Region) -> np.ndarray:
        return self._array[region]


class _SafetensorsStore:
    def __init__(self, path: Path, specs: Specs):
        self._arrays = open_tensors(path, writable=True)
        found = {name: (array.shape, array.dtype) for name, array in self._arrays.items()}
        if found != {name: (spec.shape, np.dtype(spec.dtype)) for name, spec in specs.items()}:
            raise ValueError("it holds other tensors")

    def slot(self, name: str, layer: int | None) -> Slot:
        array = self._arrays[name]
        return _MappedSlot(array if layer is None else array[layer])

    def flush(self) -> None:
        for file in {id(file): file for file in map(_file_of, self._arrays.values())}.values():
            if file is not None:
                file.flush()


def _file_of(array: np.ndarray) -> mmap.mmap | None:
    """The memory map behind an array; None for one without elements."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base


def chunk_shape(
    shape: tuple[int, ...], itemsize: int, *, is_stacked: bool, axis: int | None
) -> tuple[int, ...]:
    """Chunks of an array: one layer, cut along the axis that a mesh splits.

    The number of pieces is a multiple of the devices that a mesh may split that axis over, so that
    each device reads whole chunks.
    """
    sides = list(shape)
    if is_stacked:
        sides[0] = 1
    pieces = 1 if axis is None else _SPLITS
    axis = int(is_stacked) if axis is None else axis
    if math.prod(sides) == 0 or len(sides) == int(is_stacked):
        return tuple(max(side, 1) for side in sides)
    length = sides[axis]
    sides[axis] = math.ceil(length / pieces)
    while math.prod(sides) * itemsize > CHUNK_BYTES and sides[axis] > 1:
        pieces *= 2
        sides[axis] = math.ceil(length / pieces)
    return tuple(sides)


class _ChunkedSlot:
    def __init__(self, store: _OrbaxStore, name: str, layer: int | None):
        array = store.arrays[name]
        # A scalar has no shape of chunks.
        self._store, chunks = store, array.chunk_layout.read_chunk.shape or ()
        self._array = array if layer is None else array[layer]
        self._chunks = chunks if layer is None else chunks[1:]
        self.shape, self.dtype = tuple(self._array.shape), np.dtype(array.dtype.numpy_dtype)

    def regions(self) -> Iterator[Region]:
        return grid(self.shape, self._chunks)

    def write(self, region: Region, values: np.ndarray) -> None:
        self._store.submit(self._array[self._inside(region)].write(values))

    def read(self, region: Region) -> np.ndarray:
        try:
            return read(self._array, self._inside(region))
        except ArrayError as error:
            raise ConversionError(f"the weights cannot be read back: {error}") from None

    def _inside(self, region: Region) -> Region:
        """TensorStore does not clip slices as NumPy does."""
        limits = zip(region, self.shape, strict=True)
        return tuple(slice(piece.start, min(piece.stop, size)) for piece, size in limits)


class _OrbaxStore:
    #: Chunks on their way to the disk at once.
    _IN_FLIGHT = 4

    def __init__(self, path: Path, specs: Specs):
        self.arrays = {name: open_array(path, name) for name in specs}
        self._writes = []
        for name, spec in specs.items():
            if tuple(self.arrays[name].shape) != spec.shape:
                raise ValueError(f"array {name!r} has shape {self.arrays[name].shape}")

    def slot(self, name: str, layer: int | None) -> Slot:
        return _ChunkedSlot(self, name, layer)

    def submit(self, write) -> None:
        self._writes.append(write)
        while len(self._writes) > self._IN_FLIGHT:
            self._wait()

    def flush(self) -> None:
        while self._writes:
            self._wait()

    def _wait(self) -> None:
        try:
            self._writes.pop(0).result()
        except ValueError as error:  # TensorStore's name for a full or broken disk.
            reason = str(error).splitlines()[0]
            raise OSError(
                f"cannot write: {reason}; free some space or choose another disk"
            ) from None


def _create_orbax(
    path: Path, specs: Specs, stacked: Collection[str], axes: Mapping[str, int | None]
) -> None:
    """An Orbax checkpoint whose arrays have their shape and no contents yet.

    Orbax can only save arrays that are in memory whole, so it saves one number in place of each,
    with everything that makes the folder a checkpoint; the arrays then take their real shape.
    """
    import orbax.checkpoint as ocp
    from flax import traverse_util

    numbers = {name: np.zeros(1, spec.dtype) for name, spec in specs.items()}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # It warns of OCDBT, which is off.
    with ocp.Checkpointer(handler) as checkpointer:
        tree = traverse_util.unflatten_dict(numbers, sep="/")
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    for name, spec in specs.items():
        shutil.rmtree(path / name.replace("/", "."))
        dtype = np.dtype(spec.dtype)
        chunks = chunk_shape(
            spec.shape, dtype.itemsize, is_stacked=name in stacked, axis=axes[name]
        )
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ]
        metadata = {
            "shape": list(spec.shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "codecs": codecs,
        }
        open_array(path, name, metadata=metadata)


_STORES = {"safetensors": _SafetensorsStore, "orbax": _OrbaxStore}
