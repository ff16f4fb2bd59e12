"""Result rows as JSON lines that survive a kill, and a folder that belongs to one configuration.

Every writer has a file of its own, so that writers on many hosts never touch each other's lines; a
reader takes the files together. A line that a kill has cut off is dropped, never half-read.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aps_jax.io.files import write_atomically
from aps_jax.io.locks import held

Row = dict[str, Any]


class ForeignResults(ValueError):
    """A folder holds results of another configuration or version."""


def read(path: Path, needed: Iterable[str] = ()) -> list[Row]:
    """All whole rows of a log, none if there is no file; a last line cut off by a kill is left out.

    Raises:
      ValueError: if a line is not a row with the `needed` entries.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    rows = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            for name in needed:
                row[name]
            if not isinstance(row, dict):
                raise TypeError("no JSON object")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a row of this experiment ({error}); choose another "
                "folder, or remove that line to have its result computed again"
            ) from None
        rows.append(row)
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows, all or none of them; drops what a kill left of a line before.

    Raises:
      OSError: if they cannot be written; the file is then as it was.
    """
    data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free some space and run the same "
            "command again, finished rows are kept"
        ) from None


def alone(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from writing the log `path` meanwhile; see `aps_jax.io.locks.held`."""
    return held(
        path,
        "wait for it, choose another --out, or tell the processes of several hosts apart",
    )


def claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Marks a folder, by the file `path` in it, as that of `identity`; many hosts may race.

    Args:
      path: JSON file that the first claim writes.
      identity: JSON values that name everything a result depends on.

    Raises:
      ForeignResults: if it already is that of another identity.
    """
    identity = json.loads(json.dumps(identity))
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    write_atomically(draft, (json.dumps(identity, indent=2) + "\n").encode())
    try:
        os.link(draft, path)  # Atomic, and fails where the file exists.
    except OSError:  # It exists, or the file system has no links.
        if not path.exists():
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    try:
        then = json.loads(path.read_bytes())
    except ValueError as error:
        raise ForeignResults(f"{path} is damaged ({error}); choose another folder") from None
    difference = first_difference(then, identity)
    if difference:
        raise ForeignResults(
            f"{path.parent} holds results of another run: {difference}; use the same settings and "
            "versions, or choose another folder"
        )


def first_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says which entry of two nested mappings of JSON values differs first, or None if none."""
    then, now = _flat(then), _flat(now)
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            return f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
