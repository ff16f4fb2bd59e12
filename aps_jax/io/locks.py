"""One process at a time writes a folder or a log; the system frees the lock when it ends.

The lock is on an open file, not the file's existence: a killed process leaves a file that blocks
nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import filelock


class InUseError(ValueError):
    """Another process is writing there now."""


def _lock_path(path: Path) -> Path:
    name = f".{path.name}.lock"
    if len(name.encode("utf-8", "surrogateescape")) > 255:  # No file system takes a longer name.
        name = f".{hashlib.sha256(path.name.encode('utf-8', 'surrogateescape')).hexdigest()}.lock"
    return path.with_name(name)


@contextlib.contextmanager
def held(path: Path, cure: str = "wait for it or choose another --out") -> Iterator[None]:
    """Keeps other processes out of `path` for as long as the context lasts.

    A file system without locks lets everybody in.

    Args:
      path: the folder or file to be written; the lock is a hidden file beside it, or in it if it is
        a folder.
      cure: what the user should do instead.

    Raises:
      InUseError: at once, if another process holds it.
      OSError: if the lock's file cannot be made.
    """
    file = path / ".lock" if path.is_dir() else _lock_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InUseError(f"another process is writing {path}; {cure}") from None
    except NotImplementedError:  # A file system without locks.
        yield
        return
    try:
        yield
    finally:
        # Before the release: who waits with the old file open finds it gone, and makes another.
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
