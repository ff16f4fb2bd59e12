"""What the two trainings share: optimiser, moving average, exact resume, logs and pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from PIL import Image

from aps_jax import sharding
from aps_jax.cli.errors import guarded
from aps_jax.io import checkpoint, rows
from aps_jax.io.locks import held
from aps_jax.pretrained import model_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of any training run.

    Attributes:
      data: folders of training photos, searched recursively.
      eval_data: folder of held-out photos.
      out: folder of the run; the same folder again resumes it.
      init: name or folder of a model whose sizes and weights the run starts from, such as
        `photo64`, instead of random weights.
      optimizer: "muon" or "adamw".
      learning_rate: peak learning rate.
      warmup: steps of linear warm-up.
      weight_decay: weight decay of all matrices.
      ema_decay: decay of the averaged weights, which are the ones exported.
      steps: optimiser steps.
      batch_size: images per step.
      eval_every: steps between held-out scores.
      save_every: steps between checkpoints.
      num_eval: held-out photos scored.
      eval_shrink: held-out images are centre squares of so many times `image_size`, reduced to it;
        1 for pictures that are no larger, such as aligned faces.
      minutes: stop (resumably) after this long; 0 for no limit.
      seed: seed of weights, images and noise.
      dtype: of activations while training, "float32" or "bfloat16" (for accelerators); weights,
        optimiser and exported model stay in float32 and float16.
      tensorboard: also write the log for TensorBoard, to OUT/tensorboard (needs tensorboardX).
      description: what the training data are, for the card.
      smoke: a tiny run that proves that everything works.
    """

    data: tuple[Path, ...]
    eval_data: Path
    out: Path
    init: Path | None = None
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    ema_decay: float = 0.998
    steps: int = 4000
    batch_size: int = 16
    eval_every: int = 250
    save_every: int = 250
    num_eval: int = 64
    eval_shrink: int = 2
    minutes: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    tensorboard: bool = False
    description: str = ""
    smoke: bool = False


#: Settings that a resumed run may change, beside paths (one, or a tuple of them).
_FREE = (
    "description", "eval_every", "eval_shrink", "minutes", "num_eval", "save_every", "smoke",
    "steps", "tensorboard",
)  # fmt: skip


def claim(config: RunConfig) -> None:
    """Makes the folder of the run, as that of these settings.

    Raises:
      ValueError: if it holds a run with other settings, which this one cannot go on from.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in _FREE and not isinstance(value, Path | tuple)
    }
    rows.claim(config.out / "run.json", settings)


def initial_sizes(config: RunConfig, part: str, kind: Callable[..., Any]) -> Any:
    """Sizes of a part of the model in `config.init`, from its card.

    Raises:
      ValueError: if there is no such model, or it lacks this part.
    """
    folder = model_folder(config.init)
    card = checkpoint.read_card(folder)
    if part not in card:
        raise ValueError(f"--init {config.init} has no {part}; leave it out")
    return checkpoint.parse_config(kind, card[part], folder / checkpoint.CARD_NAME)


def device_name() -> str:
    """The devices of this process, for cards."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def run(name: str, train: Callable[[Any], None], config: RunConfig) -> int:
    """Trains and returns the exit code; what a user can get wrong ends as one line and code 2."""
    return guarded(
        lambda: _alone(train, config),
        name,
        after_interrupt="the same command goes on from the last checkpoint",
        memory_cure="lower --batch-size",
    )


def _alone(train: Callable[[Any], None], config: RunConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    with held(config.out):
        train(config)


def origin(config: RunConfig, part: str) -> dict[str, Any]:
    """Card entry of the weights a run started from, empty if they were random."""
    if config.init is None:
        return {}
    return {"started_from": checkpoint.read_card(model_folder(config.init)).get(part)}


class TrainState(NamedTuple):
    """Everything a resumed run needs; batches are functions of (seed, step)."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_optimizer(config: RunConfig, *, b2: float = 0.99) -> optax.GradientTransformation:
    """Clipped gradients, linear warm-up, cosine decay to zero, weight decay on matrices only.

    "muon" orthogonalises the updates of convolution kernels (HWIO) and of layer-stacked matrices
    [layers, in, out] (https://kellerjordan.github.io/posts/muon) and leaves every other leaf to
    AdamW. Its updates have AdamW's size (0.2 per entry, arXiv 2502.16982), so that one magnitude of
    learning rates serves both.
    """
    # A short run warms up for half of its steps.
    warmup = min(config.warmup, config.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    decay = config.weight_decay

    def is_matrix(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if config.optimizer == "adamw":
        optimizer = optax.adamw(schedule, b2=b2, weight_decay=decay, mask=is_matrix)
    elif config.optimizer == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=decay,
            weight_decay_mask=is_matrix,
            adam_b2=b2,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
    else:
        raise ValueError(f"unknown optimizer {config.optimizer!r}: choose muon or adamw")
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def _muon_axes(params: Any) -> Any:
    """Reduction and output axes of the leaves that Muon updates, None for the others."""
    axes = {
        3: optax.contrib.MuonDimensionNumbers((1,), (2,)),
        4: optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,)),
    }
    return jax.tree.map(lambda leaf: axes.get(leaf.ndim), params)


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
    checkpoints = Checkpoints(config.out / "state")
    state = jax.device_put(checkpoints.restore(state), sharding.replicated(mesh))
    first = int(state.step)
    truncate_log(log, first)
    earlier = read_rows(log) if first else []
    seconds_before = earlier[-1]["seconds"] if earlier else 0.0
    start = time.monotonic()
    for step, batch in batches(range(first, config.steps)):
        state, terms = update(state, sharding.shard_batch(jax.tree.map(jnp.asarray, batch), mesh))
        # Steps queue up on the device otherwise, and the clock would not see them.
        terms = jax.device_get(terms)
        done, elapsed = step + 1, time.monotonic() - start
        out_of_time = bool(config.minutes) and elapsed > 60 * config.minutes
        last = done == config.steps or out_of_time
        row = {"step": done, "seconds": round(seconds_before + elapsed, 2)}
        if done % 25 == 0 or last:
            row |= {name: float(value) for name, value in terms.items()}
        if done % config.eval_every == 0 or last:
            row |= evaluate(state, row)
        if len(row) > 2:
            append_row(log, row)
            write_event(row)
            print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), flush=True)
        if done % config.save_every == 0 or last:
            checkpoints.save(state)
        if out_of_time:
            print(f"stopped after {config.minutes} minutes; start again to go on", flush=True)
            break
    checkpoints.close()
    return state


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
