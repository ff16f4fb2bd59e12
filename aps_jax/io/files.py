"""Files appear whole or not at all.

Every write goes to a temporary file beside the target, which then replaces it: an interrupted run
leaves the old file or the new, never half.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]
#: Endings of the files that are taken for images.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def write_atomically(path: PathLike, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all; makes missing folders.

    Raises:
      OSError: if the file cannot be written.
    """
    path = Path(path)
    # Not made of the name, which may be as long as names can be.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write {path}: {reason}; free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Reduces NumPy and JAX values, paths and tuples to what JSON knows."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: PathLike, value: Any) -> None:
    """Writes `value` as indented JSON; makes missing folders.

    Arrays become lists, paths become strings; NaN and infinity, which JSON lacks, become null. The
    bytes of file names that are no UTF-8 can be had back: `os.fsencode(json.loads(...)["path"])`.

    Raises:
      TypeError: if `value` holds something JSON cannot express.
      OSError: if the file cannot be written.
    """
    value = _plain(value)
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    if not _is_unicode(text):  # Bytes of a file name that are no UTF-8: "\\udce9" for 0xe9.
        text = json.dumps(value, indent=2, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def disk_size(path: PathLike) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it is not there."""
    path = Path(path)
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def list_images(folders: Sequence[Path]) -> list[Path]:
    """All image files below `folders`, sorted; ValueError if a folder is missing or has none.

    Linked folders are followed, each real folder once, so that cycles end. Left out are the `._`
    companions of files copied from macOS and what is no file, such as a folder called `set.png`.
    """
    paths: list[Path] = []
    for folder in folders:
        found = sorted(path for path in _walk(Path(folder)) if _is_image(path))
        if not found:
            raise ValueError(
                f"no images below {folder}; expected files ending in {sorted(IMAGE_SUFFIXES)}"
            )
        paths += found
    return paths


def _is_image(path: Path) -> bool:
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("._"):
        return False
    # A link to nothing is a photo that is missing, which its reader will say.
    return os.path.isfile(path) or not os.path.exists(path)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder; real folders come before links, which may lead to them."""
    visited: set[str] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        links: list[str] = []
        for place, names, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(place)
            if real in visited:
                names.clear()
                continue
            visited.add(real)
            paths = {name: os.path.join(place, name) for name in sorted(names)}
            links += [path for path in paths.values() if os.path.islink(path)]
            names[:] = [name for name, path in paths.items() if not os.path.islink(path)]
            yield from (Path(place, name) for name in files)
        waiting += sorted(links)
