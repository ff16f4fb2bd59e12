"""Which of several hosts this process is, by JAX's own runtime.

The hosts meet once, learn their places and part again: work that exchanges nothing needs no
connection, and JAX ends every connected process when one of them dies.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Place:
    """This process is number `index` of `count`."""

    index: int
    count: int


def scheduled(environment: Mapping[str, str]) -> bool:
    """True if a scheduler that JAX knows (Slurm, GKE, TPU pod) started several processes."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 1

    return (
        number("SLURM_STEP_NUM_TASKS") > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
    )


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    seconds: float,
    fail: Callable[[str], None],
    is_cluster: bool = False,
) -> Place:
    """Meets the other processes; must come before anything else asks JAX for a device.

    Args:
      coordinator: HOST:PORT of process 0. None lets JAX ask the scheduler, where there is one that
        started several processes; elsewhere this process is alone.
      num_processes: how many there are, with `coordinator`.
      process_id: which of them this is, with `coordinator`.
      seconds: how long to wait for the others.
      fail: told why, from another thread, if they do not come; must end the process.
      is_cluster: ask JAX even if the environment names no scheduler: TPU pods tell their workers by
        a metadata server.

    Raises:
      ValueError: if the three do not make sense together, or JAX finds no cluster.
    """
    given = _place_given(coordinator, num_processes, process_id)
    if given == (0, 1) or (given is None and not (is_cluster or scheduled(os.environ))):
        return Place(0, 1)
    if not seconds > 0:
        raise ValueError(f"--join-seconds must be positive, got {seconds}")

    # JAX's own time limit aborts the process with a stack trace.
    where = coordinator or "the scheduler's coordinator"
    name = "" if given is None else f" (this is process {process_id} of {num_processes})"
    timer = threading.Timer(
        seconds,
        fail,
        [
            f"not all processes met at {where} within {seconds:g} s{name}; check that every one "
            "was started and reaches that address, or wait longer with --join-seconds"
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=int(seconds) + 300
        )
        jax.devices()  # Some devices are found by all processes together.
        place = Place(jax.process_index(), jax.process_count())
        jax.distributed.shutdown()
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        cure = "" if coordinator else "; give --coordinator, --num-processes and --process-id"
        raise ValueError(f"the processes could not meet at {where}: {first}{cure}") from None
    finally:
        timer.cancel()
    return place


def _place_given(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[int, int] | None:
    """Number and count that the three options say, or None; ValueError if they do not fit."""
    if coordinator is None and num_processes is None and process_id is None:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "--coordinator, --num-processes and --process-id belong together; give all three"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, got {process_id}")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    return process_id, num_processes


def give_up(program: str) -> Callable[[str], None]:
    """A `fail` for `join`: one line on stderr, then the end with exit code 2."""

    def fail(message: str) -> None:
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        os._exit(2)  # The main thread waits inside JAX and cannot be interrupted.

    return fail
