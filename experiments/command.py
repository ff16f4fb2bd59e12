"""Makes programs of functions of their command line."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import tyro

from aps_jax.cli.errors import guarded


def command(
    program: str, **messages: str
) -> Callable[[Callable[[Any], int | None]], Callable[[Any], int]]:
    """Makes a program of a function of its arguments: whatever a user can get wrong is one line.

    Args:
      program: what the line begins with.
      **messages: of `guarded`, for Ctrl-C and for memory that runs out.
    """

    def decorate(work: Callable[[Any], int | None]) -> Callable[[Any], int]:
        @functools.wraps(work)
        def main(arguments: Any) -> int:
            return guarded(lambda: work(arguments), program, **messages)

        return main

    return decorate


def start(name: str, module: str) -> None:
    """Runs `main` of a module with what the command line says, if `name` is that of a program.

    `python -m experiments.NAME` runs a file that has only this call; the work is in the rooms.
    """
    if name == "__main__":
        main = importlib.import_module(module).main
        sys.exit(main(tyro.cli(get_type_hints(main)["arguments"])))
