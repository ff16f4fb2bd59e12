"""Converts published checkpoints to model folders that `aps_jax.load_pretrained` reads.

`convert` streams: tensors are copied piece by piece from a memory map of the source to one of the
target, so that hardly more than one shard is in memory. The target appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax import traverse_util
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import aps_jax
from aps_jax import checkpoint
from aps_jax.cli import message_of
from aps_jax.tensors import create_tensors, open_tensors
from convert.rules import Place, Rule, place_tensors
from convert.sources import ConversionError, Source, is_float, open_source, sha256

Dtype = Literal["float32", "float16", "bfloat16"]
#: Side of the square pieces that are copied; a transposed copy in large strides is five times
#: slower.
_TILE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a checkpoint turns out to be.

    Attributes:
      config: sizes of the model, a dataclass of JSON values.
      init: `(key, config) -> params`; only its shapes are used.
      card: further sections of the card.
      files: files to be copied into the folder, such as a tokenizer.
    """

    config: Any
    init: Callable[[Any, Any], Any]
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()


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
    section: Literal["codec", "prior", "kernel_wizard"]
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
      num_params: weights written.
      num_bytes: size of the weights file.
      rounding: largest difference that the dtype made, relative to the largest weight of the same
        tensor; None if it was not verified.
    """

    folder: Path
    num_params: int
    num_bytes: int
    rounding: float | None


def convert(
    family: Family,
    source: Path,
    target: Path,
    *,
    dtype: Dtype | None = None,
    verify: bool = False,
    console: Console | None = None,
) -> Report:
    """Converts a checkpoint into a new model folder, or into one that lacks this half.

    Args:
      family: kind of checkpoint.
      source: folder, weights file or index.
      target: model folder; made if needed.
      dtype: of the weights; None means the family's own.
      verify: read the result back and compare every number with the source.
      console: where progress is shown; None shows nothing.

    Raises:
      ConversionError: the source is no whole checkpoint of this family, or the target is taken.
      OSError: a file cannot be read or written.
    """
    weights_name = f"{family.section}.safetensors"
    _check_target(target, family.section)
    opened = open_source(source)
    dtype = dtype or family.default_dtype
    built = family.build(opened, dtype)
    abstract = jax.eval_shape(lambda key: built.init(key, built.config), jax.random.key(0))
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()
    }
    checked = family.checked(built.config)
    dropped = {name for name in opened.shapes if name.startswith(family.ignored)}
    places = place_tensors(opened, family.rules, targets, optional={*checked, *dropped})
    num_params = sum(math.prod(spec.shape) for spec in targets.values())
    num_bytes = num_params * jax.numpy.dtype(dtype).itemsize
    _check_space(target, num_bytes)

    staging = target.absolute().with_name(f".{target.absolute().name}.{uuid.uuid4().hex[:8]}.tmp")
    weights = staging / weights_name
    try:
        staging.mkdir(parents=True)
        with _progress(console) as advance:
            hashes = _hash_files(opened, advance)
            written = create_tensors(weights, targets)
            advance("converting", 0, _num_bytes(opened))
            for name, array in _tensors(opened):
                if name in checked:
                    _check_value(name, array, checked[name])
                elif name in places:
                    _copy(name, array, _slot(written, places[name]), places[name])
                advance("converting", array.nbytes)
            del written
            rounding = _verify(opened, weights, places, advance) if verify else None
            for path in built.files:
                shutil.copyfile(path, staging / path.name)
        sections = {
            family.section: dataclasses.asdict(built.config),
            **built.card,
            f"{family.section}_source": {
                "files_sha256": hashes,
                "dtype": str(dtype),
                "converter": f"convert.{family.name} {aps_jax.__version__}",
            },
        }
        names = (weights_name, *(path.name for path in built.files))
        _publish(staging, target, names, sections)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Report(folder=target, num_params=num_params, num_bytes=num_bytes, rounding=rounding)


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
    except checkpoint.CheckpointError:
        raise ConversionError(f"{target} holds other files; choose another folder") from None
    if section in card:
        raise ConversionError(f"{target} already has a {section}; delete it or choose another")


def _check_space(target: Path, num_bytes: int) -> None:
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{target} needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room or choose another disk"
        )


def _publish(staging: Path, target: Path, names: Sequence[str], sections: dict[str, Any]) -> None:
    """Puts finished files in place: in one step, or weights first and then the card that counts."""
    if target.exists() and any(target.iterdir()):
        for name in names:
            os.replace(staging / name, target / name)
        checkpoint.update_card(target, **sections)
    else:
        checkpoint.update_card(staging, **sections)
        os.replace(staging, target)


def _hash_files(source: Source, advance: Callable[..., None]) -> dict[str, str]:
    advance("hashing", 0, _num_bytes(source))
    return {
        path.name: sha256(path, lambda count: advance("hashing", count)) for path in source.files
    }


def _num_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files)


def _tensors(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    for shard in source.shards():
        yield from shard.items()


def _slot(arrays: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    array = arrays[place.target]
    return array if place.layer is None else array[place.layer]


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Pieces along the first two axes that together cover an array of `shape`."""
    rows, columns = (*shape[:2], 1, 1)[:2]
    for row in range(0, rows, _TILE):
        if len(shape) < 2:
            yield (slice(row, row + _TILE),)[: len(shape)]
            continue
        for column in range(0, columns, _TILE):
            yield slice(row, row + _TILE), slice(column, column + _TILE)


def _copy(name: str, array: np.ndarray, slot: np.ndarray, place: Place) -> None:
    if not is_float(array):
        raise ConversionError(f"tensor {name!r} holds {array.dtype}, not floating-point numbers")
    moved = place.transform(array)
    for tile in _tiles(moved.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            piece = moved[tile].astype(slot.dtype)
            is_finite = np.isfinite(piece).all()
        if not is_finite:
            raise ConversionError(
                f"tensor {name!r} has numbers that are not finite in {slot.dtype}; "
                "fetch it again, or choose another --dtype"
            )
        slot[tile] = piece


def _check_value(name: str, array: np.ndarray, expected: np.ndarray) -> None:
    if array.shape != expected.shape:
        raise ConversionError(
            f"tensor {name!r} has shape {array.shape}; this model needs {expected.shape}"
        )
    if not np.array_equal(array, expected):
        raise ConversionError(f"tensor {name!r} has other values than this model needs")


def _verify(
    source: Source, weights: Path, places: Mapping[str, Place], advance: Callable[..., None]
) -> float:
    """Largest rounding difference; an error if it is more than the dtype explains."""
    written = open_tensors(weights)
    advance("verifying", 0, _num_bytes(source))
    worst = 0.0
    for name, array in _tensors(source):
        advance("verifying", array.nbytes)
        if name not in places:
            continue
        moved, slot = places[name].transform(array), _slot(written, places[name])
        difference = peak = 0.0
        for tile in _tiles(moved.shape):
            exact, got = (x[tile].astype(np.float64) for x in (moved, slot))
            peak = max(peak, np.abs(exact).max(initial=0))
            difference = max(difference, np.abs(exact - got).max(initial=0))
        limits = jax.numpy.finfo(slot.dtype)
        if difference > peak * float(limits.eps) + float(limits.smallest_subnormal):
            raise ConversionError(f"tensor {name!r} was written wrongly, off by {difference:.1e}")
        worst = max(worst, difference / peak if peak else 0.0)
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Takes SIGTERM, which batch systems send, for Ctrl-C: half-written files are removed."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a converter takes.

    Attributes:
      source: folder of the published checkpoint, its weights file or its index.
      target: model folder to write; one that has the other half already gets this one too.
      dtype: of the converted weights, instead of the family's own.
      verify: read the result back and compare every number with the source.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    dtype: Dtype | None = None
    verify: bool = False


def main(family: Family, description: str, argv: Sequence[str] | None = None) -> int:
    """Command line of one converter; returns 0, 2 after one line on stderr, or 130 on Ctrl-C."""
    prog = f"python -m convert.{family.name}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options = tyro.cli(
                _Options,
                args=argv,
                prog=prog,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            return 0
        print(f"convert.{family.name}: {message_of(printed.getvalue())}", file=sys.stderr)
        return 2
    try:
        with _interruptible():
            report = convert(
                family,
                options.source,
                options.target,
                dtype=options.dtype,
                verify=options.verify,
                console=Console(stderr=True),
            )
    except (ConversionError, checkpoint.CheckpointError, OSError) as error:
        print(f"convert.{family.name}:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"convert.{family.name}: stopped, {options.target} is untouched", file=sys.stderr)
        return 130
    line = f"{report.folder}: {family.section} of {report.num_params:,} weights"
    line += f", {report.num_bytes / 1e6:,.1f} MB"
    if report.rounding is not None:
        line += f"; verified, largest relative rounding {report.rounding:.1e}"
    print(line)
    return 0
