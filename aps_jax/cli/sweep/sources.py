"""Where the images of a sweep come from: a folder, a list, or records such as those of Grain."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import importlib
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aps_jax.io import checkpoint
from aps_jax.io.files import list_images

#: MODULE:NAME, as entry points are written.
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a random-access source.

    Attributes:
      source: has `len` and integer indices: a Grain data source or `MapDataset`, a list, an array.
        A record is an array (uint8, or floats in [-1, 1]; any floats for a measurement), the bytes
        of an image file, or a mapping that has either as "image".
      index: which record.
    """

    source: Any
    index: int


#: An image that is a file, or can become one.
Item = Path | Record
_Result = TypeVar("_Result")


def sha256(image: Item) -> str:
    """Hash of the bytes of the file that an image is, or would be; OSError if it cannot be read."""
    with as_file(image) as path:
        return checkpoint.fingerprint(path)


def has_hash(image: Item, expected: str | None) -> bool:
    """Whether an image can be read and is the one with this hash."""
    try:
        return expected is not None and sha256(image) == expected
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def as_file(image: Item) -> Iterator[Path]:
    """The file of an image; a record becomes one for as long as the context lasts.

    Raises:
      ValueError: if a record cannot be read or holds no image.
    """
    if isinstance(image, Path):
        yield image
        return
    try:
        content = image.source[image.index]
    except Exception as error:  # It is the user's own code.
        raise ValueError(f"record {image.index} cannot be read: {error!r}") from error
    if isinstance(content, dict):
        if "image" not in content:
            raise ValueError(f"record {image.index} has no 'image', only {sorted(content)}")
        content = content["image"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"record {image.index}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            array = np.asarray(content)
            if array.dtype.kind not in "buif":
                raise ValueError(f"record {image.index} is no array of numbers: {content!r:.60}")
            path = path.with_name(f"{path.name}.npy")
            np.save(path, array, allow_pickle=False)
        yield path


def _records(place: str) -> dict[str, Item]:
    """All records of the source that MODULE:NAME is, or returns when it is called."""
    module, _, name = place.partition(":")
    sys.path.insert(0, os.getcwd())  # As `python -m` does; not everything that starts us does.
    try:
        source: Any = importlib.import_module(module)
        for part in name.split("."):
            source = getattr(source, part)
        if not hasattr(source, "__getitem__") and callable(source):
            source = source()
        count = len(source)
    except Exception as error:  # It is the user's own code.
        raise ValueError(f"{place} gives no source of images: {error!r}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(source, "__getitem__") or not 0 < count < sys.maxsize:
        raise ValueError(
            f"{place} must be a source of images with random access and an end (len and []), such "
            f"as a Grain MapDataset without repeat; it is {type(source).__name__}, length {count}"
        )
    digits = len(str(count - 1))
    return {f"{index:0{digits}}": Record(source, index) for index in range(count)}


def named_images(source: Path) -> dict[str, Item]:
    """Images by name.

    Args:
      source: a folder (names are paths below it), a text file with a path per line (paths below
        their common folder), or MODULE:NAME of a random-access source (numbers).

    Raises:
      ValueError: if there are none, a list names one twice, or a source has no random access.
    """
    if _PLACE.fullmatch(str(source)) and not source.exists():
        return _records(str(source))
    if source.is_dir():
        found = list_images([source])
        return {path.relative_to(source).as_posix(): path for path in found}
    if not source.is_file():
        raise ValueError(
            f"{source} is neither a folder of images nor a list of paths, nor MODULE:NAME"
        )
    paths = sorted(Path(os.path.abspath(source.parent / line)) for line in _lines(source))
    if not paths:
        raise ValueError(f"{source} names no images")
    for path, following in zip(paths, paths[1:], strict=False):
        if path == following:
            raise ValueError(f"{source} names {path} twice; delete one of the lines")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return {path.relative_to(root).as_posix(): path for path in paths}


def _lines(path: Path) -> list[str]:
    """Lines of a list of paths as file names, whatever bytes the names are of.

    Raises:
      ValueError: if it is not a text file.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Some Windows editors.
        with contextlib.suppress(UnicodeDecodeError):
            content = content.decode("utf-16").encode()
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise ValueError(f"{path} is not a text file; give a folder or a list")
    lines = (os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n"))
    # Spaces belong to a name only where there is such a file.
    return [
        line if os.path.exists(path.parent / line) else line.strip()
        for line in lines
        if line.strip()
    ]


def read_ahead(
    read: Callable[[str, Item], _Result], images: Mapping[str, Item], count: int
) -> Iterator[tuple[str, Future[_Result]]]:
    """Reads images while the caller is busy with earlier ones, in their order.

    One thread reads them all, so that a source never sees two readers at once.

    Args:
      read: called with name and image.
      images: by name.
      count: how many results may lie ready beyond the one that the caller has.

    Yields:
      Name and result, or error, of each image.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    ahead: deque[tuple[str, Future[_Result]]] = deque()
    try:
        for name, image in images.items():
            ahead.append((name, pool.submit(read, name, image)))
            if len(ahead) > count:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:  # Also where the caller stops early: what nobody will take is not read.
        pool.shutdown(cancel_futures=True)
