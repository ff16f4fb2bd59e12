"""Converts published checkpoints to model folders that `aps_jax.load_pretrained` reads.

`convert` streams: tensors are copied piece by piece from a memory map of the source, so that next
to nothing is held in memory. The target appears whole or not at all; what an interrupted conversion
did is kept beside it, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import aps_jax
from aps_jax.io import checkpoint
from aps_jax.io.files import disk_size
from aps_jax.sharding import split_axis

from . import copying
from .hub import locate
from .rules import Place, Rule, place_tensors
from .sources import ConversionError, Source, open_source
from .staging import Staging, open_staging, staging_folder
from .stores import Format, Slot, Store, create_store, open_store, remove_store

Dtype = Literal["float32", "float16", "bfloat16"]
#: Weights of so many bytes become an Orbax checkpoint, smaller ones one safetensors file.
ORBAX_BYTES = 10**9
#: An interrupted conversion loses at most the work on so many bytes.
COMMIT_BYTES = 2**29


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a checkpoint turns out to be.

    Attributes:
      config: sizes of the model, a dataclass of JSON values.
      init: `(key, config) -> params`; only its shapes are used.
      card: further sections of the card.
      files: files to be copied into the folder, such as a tokenizer, by their names there.
    """

    config: Any
    init: Callable[[Any, Any], Any]
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one architecture.

    Attributes:
      name: module under `convert`.
      section: "codec" or "prior", the half of a model folder that is written, or another part.
      rules: where every tensor goes.
      build: finds out the sizes from the tensors; they are checked against config.json where there
        is one. Takes the source and the dtype asked for, or None.
      default_dtype: dtype of the weights unless one is asked for.
      checked: tensors that follow from the sizes and are dropped, by name, each with the value that
        it must have if it is there.
      ignored: how the names of tensors begin that are of no use here.
    """

    name: str
    section: Literal["codec", "prior", "kernel_wizard", "clip", "dino", "reward"]
    rules: tuple[Rule, ...]
    build: Callable[[Source, str], Built]
    default_dtype: Dtype
    checked: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
      folder: model folder.
      kind: format of the weights.
      num_params: weights written.
      num_bytes: their size.
      num_resumed: tensors that an interrupted conversion had done already.
      rounding: largest difference that the dtype made, relative to the largest weight of the same
        tensor; None if it was not verified.
    """

    folder: Path
    kind: Format
    num_params: int
    num_bytes: int
    num_resumed: int
    rounding: float | None


def convert(
    family: Family,
    source: str | os.PathLike[str],
    target: Path,
    *,
    dtype: Dtype | None = None,
    kind: Format | None = None,
    revision: str | None = None,
    verify: bool = False,
    console: Console | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Report:
    """Converts a checkpoint into a new model folder, or into one that lacks this half.

    Args:
      family: kind of checkpoint.
      source: folder, weights file, index, or `owner/name` on the Hugging Face hub.
      target: model folder; made if needed.
      dtype: of the weights; None means the family's own.
      kind: format of the weights; None means one safetensors file below `ORBAX_BYTES` and an Orbax
        checkpoint from there on.
      revision: branch, tag or commit of a hub repository.
      verify: read the result back and compare every number with the source.
      console: where progress is shown; None shows nothing.
      notify: takes one line about an unfinished conversion that was found.

    Raises:
      ConversionError: the source is no whole checkpoint of this family, or the target is taken.
      OSError: a file cannot be read or written.
    """
    _check_target(target, family.section)
    located = locate(source, revision)
    opened = open_source(located.path)
    dtype = dtype or family.default_dtype
    built = family.build(opened, dtype)
    abstract = jax.eval_shape(lambda key: built.init(key, built.config), jax.random.key(0))
    specs = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        for path, leaf in checkpoint.flat_arrays(abstract).items()
    }
    checked = family.checked(built.config)
    dropped = {name for name in opened.shapes if name.startswith(family.ignored)}
    places = place_tensors(opened, family.rules, specs, optional={*checked, *dropped})
    num_params = sum(math.prod(spec.shape) for spec in specs.values())
    num_bytes = num_params * jax.numpy.dtype(dtype).itemsize
    if kind is None:
        kind = "safetensors" if num_bytes < ORBAX_BYTES else "orbax"
    weights_name = checkpoint.weights_name(family.section, kind)
    section = dataclasses.asdict(built.config)
    made_by = f"convert.{family.name} {aps_jax.__version__}"
    identity = {
        "converter": made_by,
        "format": kind,
        "dtype": str(dtype),
        "files": {path.name: path.stat().st_size for path in opened.files},
        family.section: section,
        **built.card,
    }
    folder = staging_folder(target, family.section)
    _check_space(target, num_bytes, folder)
    with open_staging(folder, identity, notify) as staging, _progress(console) as advance:
        is_split = family.section in ("prior", "reward")
        job = _Job(kind, staging.model / weights_name, specs, places, is_split)
        store = _take_up(job, staging, identity, notify)
        num_resumed = len(staging.done)
        if num_resumed:
            notify(f"going on with {folder}: {num_resumed} of {len(opened.shapes)} tensors done")
        hashes = _copy_all(opened, store, job, checked, staging, advance)
        del store
        rounding = _verify(opened, job, advance) if verify else None
        for name, path in built.files.items():
            shutil.copyfile(path, staging.model / name)
        sections = {
            "format_version": checkpoint.FORMAT_VERSION,
            family.section: section,
            **built.card,
            f"{family.section}_source": {
                **located.origin,
                "files_sha256": hashes,
                "dtype": str(dtype),
                "converter": made_by,
            },
        }
        names = (weights_name, *built.files)
        _publish(staging.model, target, names, sections)
    return Report(
        folder=target,
        kind=kind,
        num_params=num_params,
        num_bytes=num_bytes,
        num_resumed=num_resumed,
        rounding=rounding,
    )


class _Job(NamedTuple):
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
        stacked = {place.target for place in self.places.values() if place.layer is not None}
        axes = {name: split_axis(name) if self.is_split else None for name in self.specs}
        return create_store(self.kind, self.weights, self.specs, stacked=stacked, axes=axes)

    def open(self) -> Store:
        return open_store(self.kind, self.weights, self.specs)


def _take_up(
    job: _Job, staging: Staging, identity: dict[str, Any], notify: Callable[[str], None]
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


def _check_target(target: Path, section: str) -> None:
    """A new folder, an empty one, or a model folder without this half."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder that does not exist yet")
    if not any(target.iterdir()):
        return
    try:
        card = checkpoint.read_card(target)
    except checkpoint.FormatError:
        raise
    except checkpoint.CheckpointError:
        raise ConversionError(f"{target} holds other files; choose another folder") from None
    if section in card:
        raise ConversionError(f"{target} already has a {section}; delete it or choose another")


def _check_space(target: Path, num_bytes: int, staging: Path) -> None:
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    missing = num_bytes - disk_size(staging)
    if free < missing:
        raise ConversionError(
            f"{target} needs {missing / 1e9:.2f} GB ({missing:,} bytes) and {free / 1e9:.2f} GB "
            f"({free:,} bytes) are free; make room or choose another disk"
        )


def _publish(model: Path, target: Path, names: Sequence[str], sections: dict[str, Any]) -> None:
    """Puts finished files in place: in one step, or weights first and then the card that counts."""
    if target.exists() and any(target.iterdir()):
        for name in names:
            remove_store(target / name)  # Left by a crash before the card was written.
            os.replace(model / name, target / name)
        checkpoint.update_card(target, **sections)
    else:
        checkpoint.update_card(model, **sections)
        os.replace(model, target)


def _num_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files)


def _slot(store: Store, place: Place) -> Slot:
    return store.slot(place.target, place.layer)


def _copy_all(
    source: Source,
    store: Store,
    job: _Job,
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


def _verify(source: Source, job: _Job, advance: Callable[..., None]) -> float:
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
def _progress(console: Console | None) -> Iterator[Callable[..., None]]:
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
