"""Runs a command in a thread, and tells of its timesteps while it runs."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import NamedTuple

from aps_jax.cli.errors import trouble_of
from aps_jax.cli.progress import listening
from aps_jax.restore import StepReport

#: Runs share one machine: the next begins when the one before it has let go.
_MACHINE = threading.Lock()
_TICK = 1.0


class Failed(Exception):
    """An expected failure; one line with cause and cure."""


class _Stopped(BaseException):
    """Nobody wants the result any more."""


class Moment(NamedTuple):
    """What there is to tell of a run.

    Attributes:
      seconds: since it was asked for.
      report: of the last timestep; None while waiting or compiling.
      is_new: whether the report has not been told before.
      seconds_left: a guess from the timesteps so far.
    """

    seconds: float
    report: StepReport | None = None
    is_new: bool = False
    seconds_left: float | None = None


def moments(command: Callable[[], int]) -> Generator[Moment, None, None]:
    """Runs a command and tells of it after every timestep, and every second in between.

    Closing the iterator stops the run after the timestep that it is at. Only one command of this
    process runs at a time; others wait.

    Raises:
      Failed: what is wrong with the input, in the words of the command line.
      RuntimeError: a bug; its traceback is on stderr.
    """
    told: queue.Queue[StepReport | Exception | None] = queue.Queue()
    is_unwanted = threading.Event()

    def on_step(report: StepReport) -> None:
        if is_unwanted.is_set():
            raise _Stopped
        told.put(report)

    def work() -> None:
        try:
            with _MACHINE, listening(on_step):
                if not is_unwanted.is_set():
                    command()
            told.put(None)
        except _Stopped:
            pass
        except Exception as error:
            if trouble_of(error) is None:
                traceback.print_exc()
            told.put(error)

    began = time.perf_counter()
    threading.Thread(target=work, daemon=True).start()
    first: float | None = None
    moment = Moment(0.0)
    try:
        yield moment
        while True:
            try:
                news = told.get(timeout=_TICK)
            except queue.Empty:
                yield moment._replace(seconds=time.perf_counter() - began, is_new=False)
                continue
            now = time.perf_counter()
            if news is None:
                return
            if isinstance(news, Exception):
                raise _failure(news)
            first = now if first is None else first
            done, left = news.num_done, None
            if done:
                left = (now - first) / done * (news.num_steps - done)
            moment = Moment(now - began, news, True, left)
            yield moment
    finally:
        is_unwanted.set()


def _failure(error: Exception) -> Exception:
    trouble = trouble_of(error)
    if trouble is None:
        return RuntimeError("something went wrong that should not; the terminal says more")
    return Failed(trouble)
