"""What the result of a run depends on: told in its record, and compared before it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import aps_jax
from aps_jax import pretrained
from aps_jax.cli.inputs import Problem, given_options
from aps_jax.cli.options import Restore
from aps_jax.config import SharedConfig
from aps_jax.io.checkpoint import CARD_NAME, fingerprint, weights_path
from aps_jax.presets import PARTS
from aps_jax.restore import Restored
from aps_jax.text.tokenizer import TOKENIZER_NAME


def run_facts(options: Restore, config: SharedConfig) -> dict[str, Any]:
    """What the samples of every image depend on, as JSON values."""
    return {
        "task": {"name": options.task, "options": given_options(options)},
        "sigma": options.sigma,
        "is_measured": options.measured,
        "prompt": options.prompt,
        "sampler": options.sampler,
    } | model_facts(
        options,
        config,
        has_words=options.prompt is not None,
        parts=PARTS[config.NEEDS],
    )


def model_facts(
    options: Any, config: Any, *, has_words: bool, parts: Sequence[str] = ("codec", "prior")
) -> dict[str, Any]:
    """What every command's samples depend on: seed, model, options of the sampler, versions.

    Args:
      options: with `seed`, `model` and, where it can be chosen, `dtype`.
      config: of the sampler.
      has_words: the tokenizer counts, too.
      parts: of the model that are read.
    """
    folder = pretrained.model_folder(options.model)
    paths = (folder / CARD_NAME, *(weights_path(folder, name) for name in parts))
    weights = {path.name: fingerprint(path) for path in paths}
    if has_words:
        tokenizer = (folder / TOKENIZER_NAME).read_bytes()
        weights[TOKENIZER_NAME] = hashlib.sha256(tokenizer).hexdigest()
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    image_shape = config.image_shape and list(config.image_shape)
    return {
        "seed": options.seed,
        "model": {"name": options.model, "sha256": weights},
        "dtype": getattr(options, "dtype", None),
        "config": dataclasses.asdict(config) | {"image_shape": image_shape},
        "versions": {
            "aps_jax": aps_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def seconds_of(restored: Restored, began: float) -> dict[str, float]:
    """Seconds of a run by what they went into; the clock showed `began` when it started."""
    seconds = restored.seconds | {"total": time.perf_counter() - began}
    return {name: round(value, 3) for name, value in seconds.items()}


def problem_facts(options: Restore, config: SharedConfig, problem: Problem) -> dict[str, Any]:
    """Everything the samples depend on, as JSON values."""
    operator = hashlib.sha256()
    for leaf in jax.tree.leaves(problem.operator):
        operator.update(np.asarray(leaf).tobytes())
    return run_facts(options, config) | {
        "image": problem.source | {"shape": list(problem.image_shape)},
        "measurement_sha256": hashlib.sha256(np.asarray(problem.y).tobytes()).hexdigest(),
        "operator_sha256": operator.hexdigest(),
        "device": device_facts(),
    }


def device_facts() -> dict[str, Any]:
    """The device, whose rounding the samples depend on."""
    device = jax.local_devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "cpus": os.cpu_count()}


def identity(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without the places of files, whose contents count."""
    return facts | {
        "image": {name: value for name, value in facts["image"].items() if name != "path"},
        "task": {
            "name": facts["task"]["name"],
            # Static options, such as the width of a blur, leave no trace in the operator's arrays.
            "options": {
                name: value
                for name, value in facts["task"]["options"].items()
                if name not in ("kernel", "mask", "weights")
            },
        },
        "model": facts["model"]["sha256"],
    }
