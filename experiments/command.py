"""Makes programs of functions of their command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
