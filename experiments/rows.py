"""Result rows as JSON lines that survive a kill, and a folder that belongs to one configuration.

Every writer has a file of its own, so that writers on many hosts never touch each other's lines; a
reader takes the files together. A line that a kill has cut off is dropped, never half-read.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aps_jax.files import write_atomically
from aps_jax.restore import first_difference


class ForeignResults(ValueError):
    """A folder holds results of another configuration or version."""


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the file, on disk before this returns; first removes a cut-off last line."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            write_atomically(path, data[: data.rfind(b"\n") + 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All whole rows of the files, in their order; a missing file has none.

    Raises:
      ValueError: if a line that was finished is not a row.
    """
    rows = []
    for path in paths:
        if not path.exists():
            continue
        *lines, _ = path.read_text().split("\n")  # What follows the last line break was cut off.
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path} line {number} is not a row; delete the line, and its result is "
                    "computed again"
                )
            rows.append(row)
    return rows


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
        then = json.loads(path.read_text())
    except ValueError as error:
        raise ForeignResults(f"{path} is damaged ({error}); choose another folder") from None
    difference = first_difference(then, identity)
    if difference:
        raise ForeignResults(
            f"{path.parent} holds results of another run: {difference}; use the same settings and "
            "versions, or choose another folder"
        )
