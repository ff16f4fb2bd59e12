"""The options of a sweep, from the command line and from a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from aps_jax.cli import help as helps
from aps_jax.cli import options as cli_options

PROGRAM = "aps-jax sweep"
_Hidden = tyro.conf.Suppress[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(cli_options.Restore):
    """Restores many images; the options of one restoration are those of `aps-jax restore`.

    Attributes:
      image: folder of images, text file with one path per line, MODULE:NAME of a source with random
        access (Grain's, or any other), or JSON file of options.
      batch_size: images at once on this host; 4 per device if left out.
      num_data: groups of this host's devices that images are spread over; all if left out.
      num_model: devices that share one copy of the prior.
      coordinator: HOST:PORT of process 0; Slurm, GKE and TPU pods need none.
      cluster: ask JAX for the other processes although no variable of a scheduler tells of them, as
        on TPU pods.
      num_processes: number of processes, with --coordinator.
      process_id: which one this is, with --coordinator.
      join_seconds: how long to wait for the other processes.
    """

    image: Annotated[Path | None, tyro.conf.Positional] = None
    out: Path = Path("runs/sweep")
    batch_size: int | None = None
    num_data: int | None = None
    num_model: int = 1
    coordinator: str | None = None
    cluster: bool = False
    num_processes: int | None = None
    process_id: int | None = None
    join_seconds: float = 300.0
    resume: _Hidden = False
    overwrite: _Hidden = False
    paste_known: _Hidden = False
    estimate: tyro.conf.Suppress[str] = "sample"
    save_steps: _Hidden = False
    save_video: tyro.conf.Suppress[str | None] = None
    show_tokens: _Hidden = False


def read_options(argv: Sequence[str]) -> Sweep:
    """Options of the command line, over those of a JSON file if the first argument is one.

    Raises:
      ValueError: if the file is no mapping of options.
      SystemExit: as tyro does, for help and for what cannot be understood, in the file too.
    """
    argv, default = list(argv), Sweep()
    if argv and argv[0].endswith(".json"):
        path = Path(argv.pop(0))
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            values = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a JSON object of options ({error})") from None
        try:
            words = _words(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        default = tyro.cli(Sweep, args=words, prog=str(path))
    if not helps.wants_brief(argv):
        return tyro.cli(Sweep, args=helps.spelled_out(argv), prog=PROGRAM, default=default)
    try:
        return tyro.cli(helps.brief(Sweep, "sweep"), args=argv, prog=PROGRAM)
    finally:
        print(helps.more("sweep"))


def _words(values: Mapping[str, Any]) -> list[str]:
    """Options of a JSON file as words of a command line, for the checks of one.

    Raises:
      ValueError: for an unknown name, and for a flag that is neither true nor false.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Sweep)}
    words = []
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"unknown option {name!r}; see --help")
        flag = name.replace("_", "-")
        if isinstance(defaults[name], bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "image":
            words.insert(0, str(value))
        elif value is not None:
            items = value if isinstance(value, list) else [value]
            words += [f"--{flag}={item}" for item in items]
    return words
