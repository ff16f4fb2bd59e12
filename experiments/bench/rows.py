"""The log of a benchmark: one JSON line per photo, written so that a kill loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aps_jax

Row = dict[str, Any]


class Cell(NamedTuple):
    """A task restored by a method under a budget (None without budgets), for one seed."""

    task: str
    method: str
    budget: str | None
    seed: int


def cell_of(row: Row) -> Cell:
    """The cell that a row belongs to."""
    return Cell(*(row[name] for name in Cell._fields))


def read_lines(path: Path, needed: Iterable[str] = ("fingerprint", "version")) -> list[Row]:
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
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a row of this experiment ({error}); choose another "
                "folder or remove that line"
            ) from None
        rows.append(row)
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a benchmark, as `read_lines` reads them."""
    return read_lines(path, (*Cell._fields, "image", "fingerprint", "version"))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
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


def require_own(path: Path, rows: Iterable[Row], expected: Mapping[Cell, str | None]) -> None:
    """Refuses rows of another configuration, model or version.

    Args:
      path: where they are from, for messages.
      rows: as read.
      expected: fingerprint by cell; None where nothing can have been computed yet.

    Raises:
      ValueError: if a row is not one that this run would write.
    """
    for row in rows:
        cell = cell_of(row)
        if expected.get(cell) != row["fingerprint"]:
            what = ", ".join(f"{name} {value!r}" for name, value in cell._asdict().items())
            why = "other settings or model weights" if cell in expected else "not in this one"
            raise ValueError(
                f"{path} holds rows of another configuration ({what}: {why}); give --out another "
                "folder, or the configuration and the model that made them"
            )


def require_version(path: Path, rows: Iterable[Row], *, only: str | None) -> None:
    """Refuses rows of several versions of this package, or of one other than `only`."""
    versions = sorted({row["version"] for row in rows})
    if len(versions) > 1 or (only is not None and versions not in ([], [only])):
        raise ValueError(
            f"{path} holds rows of aps_jax {', '.join(versions)}, this is {aps_jax.__version__}; "
            "give --out another folder"
        )
