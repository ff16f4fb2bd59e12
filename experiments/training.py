"""What the two trainings share: optimiser, moving average, exact resume, logs and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from PIL import Image


class TrainState(NamedTuple):
    """Everything a resumed run needs; batches are functions of (seed, step)."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_optimizer(
    learning_rate: float, *, warmup: int, steps: int, weight_decay: float = 1e-4, b2: float = 0.99
) -> optax.GradientTransformation:
    """AdamW with clipped gradients, linear warm-up and cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    decayed = optax.adamw(
        schedule,
        b2=b2,
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), decayed)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimiser step; the average warms up so that early weights are forgotten."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    return TrainState(step, params, opt_state, ema)


class Checkpoints:
    """Latest training state in `folder`, through Orbax; a half-written one is never restored."""

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        )

    def restore(self, state: TrainState) -> TrainState:
        """The saved state if there is one, else `state`."""
        latest = self._manager.latest_step()
        if latest is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(latest, args=ocp.args.StandardRestore(abstract))

    def save(self, state: TrainState) -> None:
        """Saves `state` and waits until it is on disk."""
        step = int(state.step)
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends Orbax's background threads."""
        self._manager.close()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds one JSON line to a log."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


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


def plot_curves(rows: list[dict[str, Any]], panels: dict[str, list[str]], path: Path) -> None:
    """One panel per title, one line per named column of the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False)
    for axis, (title, columns) in zip(axes[0], panels.items(), strict=True):
        for column in columns:
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=column)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_grid(rows: list[np.ndarray], path: Path, zoom: int = 1) -> None:
    """Saves equally sized images in [-1, 1] as a grid; each entry of `rows` is [n, H, W, 3]."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    pixels = np.round((np.clip(grid, -1, 1) + 1) * 127.5).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.resize([side * zoom for side in image.size], Image.Resampling.NEAREST).save(path)
