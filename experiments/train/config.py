"""What all trainings are told, and which folder is whose."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

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


def facts(config: RunConfig, row: Mapping[str, float], part: str) -> dict[str, Any]:
    """What the card says of any training, at a row of its log; `part` names its entry there."""
    return {
        "data": config.description or [path.resolve().name for path in config.data],
        "steps": row["step"],
        "batch_size": config.batch_size,
        "optimizer": config.optimizer,
        "seconds": round(row["seconds"]),
        "device": device_name(),
        **origin(config, part),
    }
