"""The command line that all converters share."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from aps_jax.cli.errors import message_of
from aps_jax.io import checkpoint

from .engine import Dtype, Family, convert
from .sources import ConversionError
from .staging import staging_folder
from .stores import Format


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Takes SIGTERM, which batch systems send, for Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a converter takes.

    Attributes:
      source: folder of the published checkpoint, its weights file or its index, or owner/name on
        the Hugging Face hub.
      target: model folder to write; one that has the other half already gets this one too.
      dtype: of the converted weights, instead of the family's own.
      format: of the weights file; Orbax from 1 GB on, which is read in parts by many devices.
      revision: branch, tag or commit on the hub.
      verify: read the result back and compare every number with the source.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    dtype: Dtype | None = None
    format: Format | None = None
    revision: str | None = None
    verify: bool = False


def main(
    family: Family,
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """Command line of one converter; returns 0, 2 after one line on stderr, or 130 on Ctrl-C."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options = tyro.cli(
                _Options,
                args=argv,
                prog=prog or f"python -m convert.{family.name}",
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            return 0
        print(f"convert.{family.name}: {message_of(printed.getvalue())}", file=sys.stderr)
        return 2
    name = f"convert.{family.name}"
    kept = staging_folder(options.target, family.section)
    try:
        with _interruptible():
            report = convert(
                family,
                options.source,
                options.target,
                dtype=options.dtype,
                kind=options.format,
                revision=options.revision,
                verify=options.verify,
                console=Console(stderr=True),
                notify=lambda line: print(f"{name}: {line}", file=sys.stderr),
            )
    except (ConversionError, checkpoint.CheckpointError, OSError) as error:
        hint = f"; the same command goes on from {kept}" if isinstance(error, OSError) else ""
        print(f"{name}:", " ".join(str(error).split()) + hint * kept.exists(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        what = f"the same command goes on from {kept}, or delete that" * kept.exists()
        print(f"{name}: stopped;", what or f"{options.target} is untouched", file=sys.stderr)
        return 130
    line = f"{report.folder}: {family.section} of {report.num_params:,} weights"
    line += f", {report.num_bytes / 1e6:,.1f} MB as {report.kind}"
    if report.rounding is not None:
        line += f"; verified, largest relative rounding {report.rounding:.1e}"
    print(line)
    return 0
