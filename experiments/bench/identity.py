"""What decides a row: the configuration of its sampler, and a fingerprint of everything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aps_jax.config import VARIANTS, APSConfig, Knob
from aps_jax.io import checkpoint
from aps_jax.io.names import choose
from aps_jax.presets import PARTS, PRESETS, config_class
from aps_jax.samplers.budget import sized, with_budget
from aps_jax.scores.lpips import MIN_SIDE as LPIPS_SIDE
from aps_jax.types import Operator
from experiments.bench.budgets import Work

if TYPE_CHECKING:
    from experiments.bench.study import Method, Study, Task


def config_of(
    method: Method, task: Task, limit: int | Work | None, operator: Operator | None = None,
    image_shape: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    """Configuration of a sampler for a task, sized to a limit of decoder evaluations or FLOPs.

    The task decides sigma (0 leaves the sampler's own) and the number of samples. Of a preset its
    data consistency is left out, so that samplers are compared as they are. With the operator
    known, the perceptual weight falls to 0 where the measurement is no image or below 16 pixels.

    Raises:
      ValueError: an option is out of range, the budget too small, or a mean of one sample.
    """
    kind = config_class(method.sampler)
    options: dict[str, Any] = {}
    if kind is APSConfig:
        options |= choose("preset", method.preset, PRESETS) if method.preset else {}
        # Any sampler can have it, so only a method that names it does.
        options.pop("data_consistency", None)
        options |= VARIANTS[method.sampler]
        options |= {"draw": "categorical"} if task.best_of > 1 else {}
    options |= {"sigma": float(task.sigma)} if task.sigma else {}
    options |= {"num_samples": task.best_of} | method.config
    if method.estimate == "mean" and options["num_samples"] == 1:
        raise ValueError(f"method {method.label!r}: a mean needs num_samples above 1 in its config")
    if operator is not None:
        y_shape = operator.output_shape((1, *image_shape, 3))
        is_small = not operator.is_image or min(y_shape[1:3]) < LPIPS_SIDE
        if options.get("perceptual_weight", 0) > 0 and is_small:
            options["perceptual_weight"] = 0.0
    try:
        config = kind(**options)
        # Samplers on pixels call no decoder, but FLOPs limit them, too.
        levels = Knob("num_steps") if isinstance(limit, Work) and kind.NEEDS != "prior" else None
        knob = kind.KNOB or levels
        if limit is None or not method.budgeted or knob is None:
            return config
        if isinstance(limit, Work):
            return sized(
                config, limit.most, limit.cost, knob=knob, fixed=method.config, unit="GFLOPs"
            )
        return with_budget(config, limit, fixed=method.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {method.label!r}: {error}") from None


def model_facts(folder: Path, needed: str = "prior") -> dict[str, str]:
    """Hashes of a model's weights, as far as a sampler reads them (`SharedConfig.NEEDS`).

    Raises:
      ValueError: the folder lacks some of them.
    """
    paths = [checkpoint.weights_path(folder, section) for section in PARTS[needed]]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"model {folder} has no {' and no '.join(missing)}; train or convert that part first"
        )
    return {path.name: checkpoint.fingerprint(path) for path in paths}


def digest(facts: Any) -> str:
    """Twelve characters that stand for JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(
    study: Study, model: dict[str, str], task: Task, method: Method, config: dict[str, Any] | None
) -> str:
    """Names everything that decides a row, but the seed and the version of this package.

    Options that have their defaults are no part of it, so that options can come and go. A changed
    default is another computation under the old name: it needs another version of this package.

    Args:
      study: gives the images.
      model: from `model_facts`.
      task: as parsed.
      method: as parsed.
      config: from `described`, None for yardsticks.
    """
    facts = [study.images, model, [task.task, task.options, task.sigma, task.best_of]]
    return digest([*facts, method.kind if config is None else config])


def described(
    sampler: str, config: Any, *, prior: str = "model", estimate: str = "best"
) -> dict[str, Any]:
    """What a row says of its sampler: its name, and all options that are not its defaults."""
    defaults = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    options = {name: getattr(config, name) for name in names}
    return (
        {"sampler": sampler}
        | ({"prior": prior} if prior != "model" else {})
        | ({"estimate": estimate} if estimate != "best" else {})
        | {name: value for name, value in options.items() if value != getattr(defaults, name)}
    )
