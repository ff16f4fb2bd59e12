"""What a person sees while a host loop runs, and what becomes of its failures."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator

from aps_jax.cli.errors import is_out_of_memory
from aps_jax.io.snapshot import Snapshot
from aps_jax.restore import DivergedError, Restored, StepReport

#: Seconds from which on a run is told to be long.
_LONG = 20.0
OnStep = Callable[[StepReport], None]

#: Who else watches the runs of this thread; see `listening`.
_listener: contextvars.ContextVar[OnStep | None] = contextvars.ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(on_step: OnStep) -> Iterator[None]:
    """Sends what the runs of this thread report to `on_step` instead of to stderr.

    An exception that `on_step` raises ends the run after the timestep that it reports.
    """
    token = _listener.set(on_step)
    try:
        yield
    finally:
        _listener.reset(token)


def is_listened_to() -> bool:
    """Whether someone wants to see the pictures of timesteps."""
    return _listener.get() is not None


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
    """A bar on a terminal; elsewhere a plain line, and an estimate of what is left."""
    if (listener := _listener.get()) is not None:
        yield listener
        return
    if not sys.stderr.isatty():
        print(f"sampling {work}", file=sys.stderr)
        yield _Estimate()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("so far,"),
        TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("compiling", total=None, figures="")

        def on_step(step: StepReport) -> None:
            figures = f"{step.num_masked:.0f} tokens masked"
            if step.num_done:
                figures = f"loss {step.loss:.4f}, {figures}"
            elif step.seconds is not None:
                figures = f"roughly {told(step.seconds)}, {figures}"
            bar.update(
                job, description="sampling", completed=step.num_done, total=step.num_steps,
                figures=figures,
            )  # fmt: skip

        yield on_step


class _Estimate:
    """Says how long a long run will take: a guess before the first timestep, better after it."""

    def __init__(self) -> None:
        self.began: float | None = None

    def __call__(self, step: StepReport) -> None:
        """Takes the time of the first timestep that it sees."""
        now = time.perf_counter()
        if self.began is None:
            self.began, self.first = now, step.num_done
            if (guess := step.seconds or 0.0) >= _LONG:
                print(
                    f"about {told(guess)} on this machine, roughly guessed from the arithmetic",
                    file=sys.stderr,
                )
        elif step.num_done == self.first + 1:
            left = (now - self.began) * (step.num_steps - step.num_done)
            if left >= _LONG:
                print(f"about {told(left)} left; Ctrl-C keeps what is done", file=sys.stderr)


def told(seconds: float) -> str:
    """A time for people, in whole seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
