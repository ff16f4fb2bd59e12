"""Arrays of an Orbax checkpoint of zarr3 arrays, opened one by one and read in parts.

Orbax reads such a folder too. Here each array is read on its own, so that what is in host memory on
the way to the devices is bounded, and a damaged one is a plain error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class ArrayError(ValueError):
    """An array is missing or damaged; the message says what is wrong with it."""


def describe_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of a checkpoint, by name with slashes.

    Raises:
      ArrayError: if `path` is no such checkpoint.
      OSError: if it cannot be read.
    """
    if not (path / "_METADATA").is_file():
        raise ArrayError("it has no _METADATA of Orbax")
    found = {}
    for file in sorted(path.glob("*/zarr.json")):
        try:
            header = json.loads(file.read_text("utf-8"))
            shape = tuple(int(size) for size in header["shape"])
            found[file.parent.name.replace(".", "/")] = (shape, str(header["data_type"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArrayError(f"{file.parent.name}/{file.name} is damaged: {error}") from None
    return found


def open_array(path: str | os.PathLike[str], name: str, **options: Any) -> Any:
    """Array `name` as a `tensorstore.TensorStore`; with `options`, such as metadata, a new one.

    Raises:
      ArrayError: if it is missing or damaged.
    """
    import tensorstore

    folder = Path(path).absolute() / name.replace("/", ".")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        # Zeros are written too: a chunk that is not there is one that got lost, here and for Orbax.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    try:
        return tensorstore.open(spec | options, open=not options, create=bool(options)).result()
    except ValueError as error:
        raise ArrayError(str(error).splitlines()[0]) from None


def read(array: Any, index: tuple[slice, ...]) -> Any:
    """The NumPy array of `array[index]`.

    Raises:
      ArrayError: if chunks of it are missing or damaged.
    """
    try:
        return array[index].read().result()
    except ValueError as error:
        raise ArrayError(str(error).splitlines()[0]) from None
