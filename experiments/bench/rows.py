"""The log of a benchmark: one row per photo, and whose rows they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import aps_jax
from aps_jax.io.rows import Row, read


class Cell(NamedTuple):
    """A task restored by a method under a budget (None without budgets), for one seed."""

    task: str
    method: str
    budget: str | None
    seed: int


def cell_of(row: Row) -> Cell:
    """The cell that a row belongs to."""
    return Cell(*(row[name] for name in Cell._fields))


def read_rows(path: Path) -> list[Row]:
    """The rows of a benchmark, as `experiments.rows.read` reads them."""
    return read(path, (*Cell._fields, "image", "fingerprint", "version"))


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


def require_devices(path: Path, rows: Iterable[Row], *, only: int) -> None:
    """Refuses rows of batches spread over other than `only` devices, whose seconds differ."""
    others = {row.get("devices", 1) for row in rows} - {only}
    if others:
        raise ValueError(
            f"{path} holds rows of batches spread over {max(others)} devices, here are {only}, and "
            "a budget in seconds cannot mix them; run on as many, or give --out another folder"
        )
