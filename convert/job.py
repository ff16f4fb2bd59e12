"""The copying of one conversion: every tensor to its place, then a look at what is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from aps_jax.sharding import split_axis

from . import copying
from .rules import Place
from .sources import ConversionError, Source
from .staging import Staging
from .stores import Format, Slot, Store, create_store, open_store, remove_store

#: An interrupted conversion loses at most the work on so many bytes.
COMMIT_BYTES = 2**29


class Job(NamedTuple):
    """Where the weights go.

    Attributes:
      kind: format of the weights.
      weights: file or folder.
      specs: shape and dtype of every weight.
      places: place of every tensor.
      is_split: whether a mesh splits them by the rules of `aps_jax.sharding`.
    """

    kind: Format
    weights: Path
    specs: Mapping[str, jax.ShapeDtypeStruct]
    places: Mapping[str, Place]
    is_split: bool

    def create(self) -> Store:
        """A new, empty store."""
        stacked = {place.target for place in self.places.values() if place.layer is not None}
        axes = {name: split_axis(name) if self.is_split else None for name in self.specs}
        return create_store(self.kind, self.weights, self.specs, stacked=stacked, axes=axes)

    def open(self) -> Store:
        """The store that is there; ConversionError if it does not fit."""
        return open_store(self.kind, self.weights, self.specs)


def take_up(
    job: Job, staging: Staging, identity: dict[str, Any], notify: Callable[[str], None]
) -> Store:
    """The weights that an interrupted conversion began, or new ones."""
    if staging.done:
        try:
            return job.open()
        except ConversionError as error:
            notify(f"{error}; starting again")
            staging.begin(identity)
    remove_store(job.weights)
    return job.create()


def _num_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files)


def _slot(store: Store, place: Place) -> Slot:
    return store.slot(place.target, place.layer)


def copy_all(
    source: Source,
    store: Store,
    job: Job,
    checked: Mapping[str, np.ndarray],
    staging: Staging,
    advance: Callable[..., None],
) -> dict[str, str]:
    """Fills the store with what is not there yet; gives the SHA-256 of each file."""
    hashes, finished, num_pending = {}, {}, 0

    def commit() -> None:
        store.flush()
        staging.record(finished)
        finished.clear()

    advance("converting", 0, _num_bytes(source))
    try:
        for file, name, array, digest in source.tensors():
            hashes[file] = digest
            if name in checked:
                copying.check_value(name, array, checked[name])
            elif name in job.places and staging.done.get(name) != digest:
                place = job.places[name]
                copying.copy(name, array, _slot(store, place), place)
                finished[name] = digest
                num_pending += array.nbytes
            if num_pending >= COMMIT_BYTES:
                commit()
                num_pending = 0
            advance("converting", array.nbytes)
    except (KeyboardInterrupt, OSError):
        with contextlib.suppress(OSError):
            commit()
        raise
    commit()
    return hashes


def compare_all(source: Source, job: Job, advance: Callable[..., None]) -> float:
    """Largest relative rounding difference; an error if it is more than the dtype explains."""
    store = job.open()
    advance("verifying", 0, _num_bytes(source))
    worst = 0.0
    for _, name, array, _ in source.tensors():
        if place := job.places.get(name):
            worst = max(worst, copying.compare(name, array, _slot(store, place), place))
        advance("verifying", array.nbytes)
    return worst


@contextlib.contextmanager
def progress(console: Console | None) -> Iterator[Callable[..., None]]:
    """Gives `advance(stage, count, total)`; the first call of a stage starts its bar."""
    if console is None or not console.is_terminal:
        yield lambda stage, count, total=None: None
        return
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        stages: dict[str, Any] = {}

        def advance(stage: str, count: int, total: int | None = None) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.advance(stages[stage], count)

        yield advance
