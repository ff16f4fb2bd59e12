"""Unfinished conversions, kept beside the target so that the same command goes on with them.

The folder `.TARGET.SECTION.partial` holds the weights written so far and a journal. The journal's
first line says what is being converted to what; every further line says that one tensor is on disk,
with the hash of its source file up to the end of that tensor. A tensor is skipped only if the
source still has that hash, so a checkpoint that was replaced in between is converted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aps_jax.io import locks
from aps_jax.io.files import write_atomically

from .sources import ConversionError

_JOURNAL, _LOCK = "journal.jsonl", ".lock"
_KIND = "aps_jax unfinished conversion"


class Staging:
    """The folder of one unfinished conversion, held by this process.

    Attributes:
      model: folder that becomes the target, or whose weights move to it.
      done: hash by name of each tensor that is on disk.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.model = folder / "model"
        self.done: dict[str, str] = {}

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forgets what was there and begins anew."""
        self.done = {}
        (self._folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()
        self._append({"kind": _KIND, **identity})

    def record(self, digests: Mapping[str, str]) -> None:
        """Notes that tensors are on disk, with the hash of each."""
        self._append(*({"tensor": name, "sha256": digest} for name, digest in digests.items()))
        self.done |= digests

    def remove(self) -> None:
        """Deletes everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _append(self, *lines: Mapping[str, Any]) -> None:
        with open(self._folder / _JOURNAL, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def staging_folder(target: Path, section: str) -> Path:
    """Where an unfinished conversion of one half of `target` is kept."""
    target = target.absolute()
    return target.with_name(f".{target.name}.{section}.partial")


@contextlib.contextmanager
def open_staging(
    folder: Path, identity: Mapping[str, Any], notify: Callable[[str], None]
) -> Iterator[Staging]:
    """Takes up an unfinished conversion of the same kind, or begins one.

    A conversion that fails because of its source leaves nothing; one that is interrupted, or that
    runs out of disk, stays as soon as a tensor is done.

    Args:
      folder: as from `staging_folder`.
      identity: what is converted to what, of JSON values; another one begins anew.
      notify: takes one line about what was found.

    Raises:
      ConversionError: the folder is something else, or another process holds it.
    """
    staging = Staging(folder)
    if folder.exists():
        _read_journal(folder)  # Before anything is written to a folder of somebody else.
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        lines = _read_journal(folder)
        if lines and lines[0] == json.loads(json.dumps({"kind": _KIND, **identity})):
            staging.done = {line["tensor"]: line["sha256"] for line in lines[1:]}
        elif lines:
            notify(f"{folder} is of another checkpoint, format or version; starting again")
        try:
            # Without weights it was killed after they had gone to the target.
            if not (staging.done and staging.model.is_dir() and any(staging.model.iterdir())):
                staging.begin(identity)
            yield staging
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, ConversionError) or not staging.done:
                staging.remove()
            raise
        staging.remove()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder; ConversionError if one is in it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(folder, "wait for it or stop it"))
        except locks.InUseError as error:
            raise ConversionError(str(error)) from None
        yield


def _read_journal(folder: Path) -> list[dict[str, Any]]:
    """Lines of the journal, without a last one that was cut off; empty if there is none yet."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names <= {_LOCK, "model"}:
        return []
    try:
        text = (folder / _JOURNAL).read_text()
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0]["kind"] != _KIND:
            raise ValueError
        if whole != text:
            write_atomically(folder / _JOURNAL, whole.encode())
        return lines
    except (OSError, ValueError, KeyError, TypeError):
        raise ConversionError(
            f"{folder} is in the way and no unfinished conversion; move or delete it"
        ) from None
