"""The models of `experiments.tokenizers`: a codec per codebook, and a prior on its tokens."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from aps_jax.codec.config import CodecConfig
from aps_jax.io.files import list_images
from aps_jax.io.locks import held
from experiments import photos, training
from experiments.bench.settings import Count, Index, Settings, Sigma, in_one_line
from experiments.train import codec as train_codec
from experiments.train import prior as train_prior


class Tokenizer(Settings):
    """What is a tokenizer's own: sizes of its codec, and options of the two trainings."""

    sizes: dict[str, Any] = {}
    codec: dict[str, Any] = {}
    prior: dict[str, Any] = {}


class Plan(Settings):
    """The whole study.

    Attributes:
      size: side of the faces in pixels.
      shrink: how many times larger those of the folders are.
      faces: held-out faces, spread evenly over their folder.
      sigma: noise standard deviation.
      seed: of operators, noise and sampling.
      sizes: of `CodecConfig`, for all tokenizers.
      codec: options of `train_codec`, likewise.
      prior: options of `train_prior`, likewise.
      tokenizers: by label.
      tasks: options of operators, by label; `task` is the operator's name.
      options: of `aps_jax.presets.make_config`.
      estimators_on: labels of the tasks that other estimators are tried on.
    """

    size: Count
    shrink: Count
    faces: Count
    sigma: Sigma
    seed: Index
    sizes: dict[str, Any]
    codec: dict[str, Any]
    prior: dict[str, Any]
    tokenizers: dict[str, Tokenizer]
    tasks: dict[str, dict[str, Any]]
    options: dict[str, Any]
    estimators_on: tuple[str, ...] = ()


def load(path: Path) -> Plan:
    """Reads a configuration; ValueError, in one line, if it is none."""
    try:
        return Plan.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {in_one_line(error, Plan.model_fields)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"configuration {path} cannot be read: {error}") from None


def folder_of(runs: Path, label: str) -> Path:
    """Folder of a tokenizer's trainings."""
    return runs / label.lower().replace(",", "").replace(" ", "_")


def small_faces(data: Path, plan: Plan, folder: Path) -> Path:
    """A folder of the pictures below `data`, reduced as the held-out ones are; made once."""
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(list_images([data])):
            photos.load_rgb(path).reduce(plan.shrink).save(folder / f"{index:06}.png")
        done.touch()
    with Image.open(next(folder.glob("*.png"))) as first:
        if min(first.size) != plan.size:
            raise ValueError(
                f"pictures below {data} become {first.width}x{first.height} pixels, not "
                f"{plan.size}; give aligned faces of {plan.size * plan.shrink} pixels"
            )
    return folder


def codec_config(plan: Plan, label: str, **paths: Any) -> train_codec.Config:
    """Settings of a codec's training."""
    own = plan.tokenizers[label]
    return train_codec.Config(
        codec=CodecConfig(**plan.sizes | own.sizes), image_size=plan.size,
        eval_shrink=plan.shrink, seed=plan.seed, **plan.codec | own.codec, **paths,
    )  # fmt: skip


def prior_config(plan: Plan, label: str, **paths: Any) -> train_prior.Config:
    """Settings of a prior's training."""
    own = plan.tokenizers[label]
    return train_prior.Config(
        image_size=plan.size, eval_shrink=plan.shrink, seed=plan.seed,
        **plan.prior | own.prior, **paths,
    )  # fmt: skip


def finished(config: training.RunConfig, log: str) -> bool:
    """Whether a training has made all its steps."""
    path = config.out / log
    return path.exists() and training.read_rows(path)[-1]["step"] >= config.steps


def train(
    plan: Plan, label: str, data: Path, eval_data: Path, runs: Path, deadline: float | None
) -> bool:
    """Trains what is not trained yet, the codec first; False if the time is over before the end."""
    shared: dict[str, Any] = {
        "data": (small_faces(data, plan, runs / "faces"),), "eval_data": eval_data,
        "description": "aligned faces, reduced",
    }  # fmt: skip
    folder = folder_of(runs, label)
    codec = codec_config(plan, label, out=folder / "codec", **shared)
    prior = prior_config(
        plan, label, out=folder / "prior", codec=folder / "codec" / "model", **shared
    )
    jobs: list[tuple[str, Callable[[Any], None], training.RunConfig]] = [
        ("codec", train_codec.train, codec), ("prior", train_prior.train, prior),
    ]  # fmt: skip
    for name, work, config in jobs:
        if finished(config, f"{name}.jsonl"):
            continue
        minutes = 0.0 if deadline is None else (deadline - time.monotonic()) / 60
        if deadline is not None and minutes < 0.5:
            return False
        print(f"training the {name} of {label}", flush=True)
        config.out.mkdir(parents=True, exist_ok=True)
        with held(config.out):
            work(dataclasses.replace(config, minutes=minutes))
        if not finished(config, f"{name}.jsonl"):
            return False
    return True
