"""The loop of every training: exact resume, logs, held-out scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from aps_jax import sharding
from experiments.train.config import RunConfig
from experiments.train.optimizer import TrainState


def fit(
    state: TrainState,
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Callable[[range], Iterator[tuple[int, Any]]],
    evaluate: Callable[[TrainState, dict[str, float]], dict[str, float]],
    config: RunConfig,
    log: Path,
) -> TrainState:
    """Runs or resumes a training until `config.steps` or `config.minutes`.

    With several devices every batch is spread over all of them and the state is copied to each;
    the compiled step then exchanges the sums of gradients by itself.

    Args:
      state: state before the first step, used if `config.out` holds no checkpoint.
      update: one step; also returns the terms that are logged.
      batches: yields (step, batch) for a range of steps, as a function of the step alone.
      evaluate: held-out scores of a state, given the row so far (step and seconds).
      config: steps, limits and intervals.
      log: JSONL file of the run; rows after the resumed step are dropped.

    Raises:
      ValueError: if the batch cannot be spread evenly over the devices, or TensorBoard's writer is
        asked for but not installed.
    """
    mesh = sharding.make_mesh()
    write_event = _event_writer(config)
    # Of a half-written state Orbax restores nothing.
    checkpoints = ocp.CheckpointManager(
        (config.out / "state").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    )
    state = jax.device_put(_latest(checkpoints, state), sharding.replicated(mesh))
    first = int(state.step)
    truncate_log(log, first)
    before = _seconds_in(log)
    start = time.monotonic() - before
    for step, batch in batches(range(first, config.steps)):
        state, terms = update(state, sharding.shard_batch(jax.tree.map(jnp.asarray, batch), mesh))
        terms = jax.device_get(terms)  # Else steps queue up, and the clock does not see them.
        done, elapsed = step + 1, time.monotonic() - start
        out_of_time = bool(config.minutes) and elapsed - before > 60 * config.minutes
        last = done == config.steps or out_of_time
        row = {"step": done, "seconds": round(elapsed, 2)}
        if done % 25 == 0 or last:
            row |= {name: float(value) for name, value in terms.items()}
        if done % config.eval_every == 0 or last:
            row |= evaluate(state, row)
        if len(row) > 2:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            write_event(row)
            print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), flush=True)
        if done % config.save_every == 0 or last:
            checkpoints.save(done, args=ocp.args.StandardSave(state), force=True)
            checkpoints.wait_until_finished()
        if out_of_time:
            print(f"stopped after {config.minutes} minutes; start again to go on", flush=True)
            break
    checkpoints.close()
    return state


def _seconds_in(log: Path) -> float:
    """Seconds of the last row; 0 where there is none, since a checkpoint may come before it."""
    rows = read_rows(log) if log.exists() else []
    return rows[-1]["seconds"] if rows else 0.0


def _latest(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The saved state if there is one, else `state`."""
    if checkpoints.latest_step() is None:
        return state
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return checkpoints.restore(None, args=ocp.args.StandardRestore(shapes))


def _event_writer(config: RunConfig) -> Callable[[dict[str, float]], None]:
    """Writes rows of the log as TensorBoard scalars, or does nothing."""
    if not config.tensorboard:
        return lambda row: None
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs tensorboardX; run: pip install 'aps_jax[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(config.out / "tensorboard"))

    def write(row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log; after a resume, the newest row of a step wins."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def truncate_log(path: Path, step: int) -> None:
    """Drops rows after `step`, which a resumed run is about to write again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
