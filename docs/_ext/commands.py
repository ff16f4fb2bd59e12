"""Writes the pages that show what every command prints for `--help`, at the time of a build."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from generated import write_pages
from sphinx.application import Sphinx
from sphinx.util import logging

_ROOT = Path(__file__).parents[2]
_WIDTH = "84"
_LOG = logging.getLogger(__name__)


def _printed(call: Callable[[], object]) -> tuple[int, str]:
    """The exit code of a program and what it printed to the standard output."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = call() or 0
        except SystemExit as stop:
            code = stop.code or 0
    return (code if isinstance(code, int) else 1), out.getvalue()


def _plain(text: str) -> str:
    """Help without the boxes that are drawn around it in a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # Where the output knows no other characters, a rule of dashes is drawn in their place.
    text = re.sub(r"^ -{20,}\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^╭─ (.*?) ─*╮$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^╰─*╯$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^│(.*?)│$", lambda found: found[1].rstrip(), text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _help_of(words: list[str], run: Callable[[list[str]], object]) -> str:
    """Help with every option, by `--help-all` where a program keeps some of them for that."""
    for flag in ("--help-all", "--help"):
        code, text = _printed(lambda flag=flag: run([*words, flag]))
        if code == 0 and text.strip():
            return _plain(text)
    _LOG.warning("no help of %s", " ".join(words) or "aps-jax")
    return ""


def _sections(programs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for title, text in programs:
        yield f"## `{title}`\n\n```text\n{text}\n```\n"


def _of_package() -> Iterator[tuple[str, str]]:
    from aps_jax.cli import main
    from aps_jax.cli.program import _COMMANDS

    yield "aps-jax", _help_of([], main)
    for name in _COMMANDS:
        yield f"aps-jax {name}", _help_of([name], main)


def _of_converters() -> Iterator[tuple[str, str]]:
    import convert
    from aps_jax.cli import main

    for name in convert.CONVERTERS:
        yield f"aps-jax convert {name}", _help_of(["convert", name], main)


def _of_experiments() -> Iterator[tuple[str, str]]:
    folder = _ROOT / "experiments"
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__main__.py")]):
        if "start(__name__" not in path.read_text():
            continue
        name = path.parent.name if path.stem == "__main__" else path.stem
        program = f"experiments.{name}"

        def run(words: list[str], program: str = program) -> None:
            before, sys.argv = sys.argv, [f"python -m {program}", *words]
            try:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            finally:
                sys.argv = before

        yield f"python -m {program}", _help_of([], run)


_PAGES = {
    "aps-jax": ("The command `aps-jax`", _of_package),
    "convert": ("The converters of published weights", _of_converters),
    "experiments": ("The studies and trainings", _of_experiments),
}


def _write(app: Sphinx, config: object) -> None:
    os.environ["COLUMNS"] = _WIDTH
    pages = {
        name: f"# {title}\n\n" + "\n".join(_sections(programs()))
        for name, (title, programs) in _PAGES.items()
    }
    write_pages(Path(app.srcdir) / "reference" / "commands", pages)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the pages."""
    app.connect("config-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
