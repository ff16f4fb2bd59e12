"""What a person sees while a host loop runs, and what becomes of its failures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from aps_jax.cli.errors import is_out_of_memory
from aps_jax.io.snapshot import Snapshot
from aps_jax.restore import DivergedError, Restored, StepReport

OnStep = Callable[[StepReport], None]


def watched(
    run: Callable[[OnStep | None], Restored],
    *,
    work: str,
    snapshot: Snapshot,
    memory_advice: Callable[[], str],
) -> Restored:
    """Runs a host loop of `aps_jax.restore` with progress on stderr.

    Args:
      run: the loop, given what it should call after each step.
      work: how much it does, for people (`aps_jax.cli.outputs.work_of`).
      snapshot: what the loop writes; removed where going on from it would fail again.
      memory_advice: what would fit, should memory run out.

    Raises:
      ValueError: memory ran out.
      DivergedError: as the loop.
    """
    try:
        with _bar(work) as on_step:
            return run(on_step)
    except DivergedError:
        snapshot.remove()
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory: {memory_advice()}") from error


@contextlib.contextmanager
def _bar(work: str) -> Iterator[OnStep | None]:
    """A bar on a terminal; elsewhere one plain line."""
    if not sys.stderr.isatty():
        print(f"sampling {work}", file=sys.stderr)
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("compiling", total=None, figures="")

        def on_step(step: StepReport) -> None:
            figures = f"{step.num_masked:.0f} tokens masked"
            if step.num_done:
                figures = f"loss {step.loss:.4f}, {figures}"
            bar.update(
                job, description="sampling", completed=step.num_done, total=step.num_steps,
                figures=figures,
            )  # fmt: skip

        yield on_step
