"""The `aps-jax` command. Options are parsed before anything heavy is imported.

Whatever a user can get wrong ends as one line on stderr and exit code 2; Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from aps_jax.cli import help as helps
from aps_jax.cli import wishes, written
from aps_jax.cli.errors import UsageError, guarded, message_of
from aps_jax.cli.options import (
    Align,
    Convert,
    Demo,
    Doctor,
    Models,
    Restore,
    Samplers,
    Sweep,
    Tasks,
    check,
    check_align,
)
from aps_jax.io import names

_COMMANDS = {
    "restore": Restore,
    "edit": wishes.Edit,
    "stylize": wishes.Stylize,
    "write": written.Write,
    "demo": Demo,
    "align": Align,
    "tasks": Tasks,
    "samplers": Samplers,
    "models": Models,
    "doctor": Doctor,
    "convert": Convert,
    "sweep": Sweep,
}
#: What checks the options of a command alone, and the module that runs it, by their class.
_RUNS: dict[type[Any], tuple[Callable[[Any], None], str]] = {
    Restore: (check, "restore"),
    wishes.Edit: (wishes.check, "edit"),
    wishes.Stylize: (wishes.check, "stylize"),
    written.Write: (written.check, "write"),
    Demo: (lambda options: None, "demo.command"),
    Align: (check_align, "align"),
}
#: Commands that parse their own words, by the modules that have them.
_OWN = {"convert": "aps_jax.cli.convert", "sweep": "aps_jax.cli.sweep.command"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(argv), "aps-jax")


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        from aps_jax import __version__

        print(f"aps-jax {__version__}")
        return 0
    if not argv:
        print(helps.WELCOME)
        return 0
    if argv[0] in _OWN:
        return importlib.import_module(_OWN[argv[0]]).main(argv[1:])
    options = _parse(argv)
    if options is None:
        return 0
    if type(options) in _RUNS:
        check, module = _RUNS[type(options)]
        check(options)
        return importlib.import_module(f"aps_jax.cli.{module}").run(options)
    from aps_jax.cli import doctor

    if isinstance(options, Tasks):
        return doctor.list_tasks()
    if isinstance(options, Samplers):
        return doctor.list_samplers()
    if isinstance(options, Models):
        return doctor.list_models(options.folders)
    assert isinstance(options, Doctor)  # Nothing else is left.
    return doctor.diagnose(options.model)


def _parse(
    argv: list[str],
) -> (
    Restore | wishes.Wish | written.Write | Demo | Align | Tasks | Samplers | Models | Doctor | None
):
    """The options, or None if help was asked for and printed."""
    if not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        names.choose("command", argv[0], _COMMANDS)
    printed = io.StringIO()
    kinds = helps.briefly(_COMMANDS, argv)
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.subcommand_cli_from_dict(
                kinds,
                args=helps.spelled_out(argv),
                prog="aps-jax",
                description="Posterior sampling of images with masked discrete diffusion.",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            if argv[0] in _COMMANDS and kinds[argv[0]] is not _COMMANDS[argv[0]]:
                print(helps.more(argv[0]))
            return None
        command = f"aps-jax {argv[0]}" if argv[0] in _COMMANDS else "aps-jax"
        raise UsageError(f"{message_of(printed.getvalue())}; see {command} --help") from None
