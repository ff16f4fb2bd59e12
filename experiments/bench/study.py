"""The configuration of a benchmark: what is compared, on what, and what it costs.

A configuration is one JSON object. Every number of the results is decided by it, the model's
weights and the version of this package; `fingerprint` names all of that for one row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aps_jax.config import VARIANTS, APSConfig
from aps_jax.io import checkpoint
from aps_jax.io.names import choose
from aps_jax.presets import PRESETS, config_class
from aps_jax.samplers.budget import with_budget
from aps_jax.scores.lpips import MIN_SIDE as LPIPS_SIDE
from aps_jax.types import Operator

#: What a method may be: a sampler, a yardstick that needs none, or the record of a sampler whose
#: options this version no longer has: its rows are shown, and nothing of it is run.
KINDS = ("sampler", "codec", "measurement", "estimate", "record")
METRICS = {"psnr": 1, "ssim": 1, "lpips": -1, "residual": -1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement task.

    Attributes:
      label: its name in rows and tables.
      name: key of `aps_jax.tasks.TASKS`.
      options: options of that task.
      sigma: noise standard deviation.
      best_of: samples per photo, of which the one of least residual counts.
      count: the first so many photos only.
      series: family of tasks that it belongs to; its name by default.
      x: its place among the family in the plot of tasks.
    """

    label: str
    name: str
    options: dict[str, Any]
    sigma: float
    best_of: int = 1
    count: int | None = None
    series: str | None = None
    x: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What restores the measurements.

    Attributes:
      label: its name in rows and tables.
      kind: one of `KINDS`.
      sampler: key of `aps_jax.samplers.SAMPLERS` or of `VARIANTS`.
      preset: preset that `options` change, of aps and its variants.
      prior: "model", or "none" for a uniform prior.
      options: options of the sampler's configuration.
      tasks: labels of the tasks that it is for; None for all.
      count: the first so many photos only.
      is_budgeted: sized by the study's budgets; otherwise it runs as it is.
      space: values that tuning may choose from, by option.
      series: line of the sweep plot that it belongs to.
      x: its place on that line.
    """

    label: str
    kind: str = "sampler"
    sampler: str = "aps"
    preset: str | None = None
    prior: str = "model"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    count: int | None = None
    is_budgeted: bool = True
    space: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    series: str | None = None
    x: float | None = None

    @property
    def has_sampler(self) -> bool:
        """Whether its rows are of a sampler, not of a yardstick."""
        return self.kind in ("sampler", "record")

    def changed(self, options: Mapping[str, Any]) -> Method:
        """The method with some of its options replaced."""
        return dataclasses.replace(self, options=self.options | dict(options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work a method may do per sample.

    Attributes:
      label: its name in rows and tables.
      evaluations: runs of the decoder.
      like: instead of a number of its own, everyone gets the seconds per photo that this method
        takes for `evaluations`.
      tasks: labels of the tasks that it is for; None for all.
      count: the first so many photos only.
    """

    label: str
    evaluations: int
    like: str | None = None
    tasks: tuple[str, ...] | None = None
    count: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How options are chosen: by random search on photos of their own.

    Attributes:
      images: `count` of the photos, spread evenly over those that the study does not use.
      trials: configurations tried per method, the one given included.
      metric: one of `METRICS`, its mean over tasks and photos decides.
      tasks: labels of the tasks it is measured on; None for all.
      seed: of the search and of the noise.
      distinct: whether options that come to the same configuration, defaults and budget included,
        are one point of the search space. Without, trials may repeat each other, as they do in
        studies that were tuned before this was an option: the draw is part of their identity.
    """

    images: dict[str, Any]
    trials: int = 8
    metric: str = "psnr"
    tasks: tuple[str, ...] | None = None
    seed: int = 1
    distinct: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A whole benchmark; `parsing.parse` makes one.

    Attributes:
      model: embedded model or folder.
      images: arguments of `photos.evaluation_crops` but the folder.
      lpips: whether LPIPS is scored.
      seeds: of operators, noise and sampling; each photo is restored once per seed.
      batch_size: photos at once.
      compare_to: label of the method that the others are compared with, photo by photo.
      tasks: by label.
      methods: by label.
      budgets: in the order in which they run; None: every method runs as it is.
      tuning: how options are tuned, if they are.
      x_label: what `Method.x` is.
      task_x_label: what `Task.x` is.
    """

    model: str
    images: dict[str, Any]
    lpips: bool
    seeds: tuple[int, ...]
    batch_size: int
    compare_to: str
    tasks: dict[str, Task]
    methods: dict[str, Method]
    budgets: tuple[Budget | None, ...]
    tuning: Tuning | None = None
    x_label: str = ""
    task_x_label: str = ""

    def budgets_of(self, task: str) -> list[Budget | None]:
        """Budgets that the task of this label is run under."""
        return [b for b in self.budgets if b is None or b.tasks is None or task in b.tasks]


def config_of(
    method: Method, task: Task, evaluations: int | None, operator: Operator | None = None,
    image_shape: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    """Configuration of a sampler for a task, sized to a number of decoder evaluations.

    The task decides sigma (0 leaves the sampler's own) and the number of samples. With the operator
    known, the perceptual weight falls to 0 where the measurement is no image or below 16 pixels.

    Raises:
      ValueError: an option is out of range, or the budget too small.
    """
    kind = config_class(method.sampler)
    options: dict[str, Any] = {}
    if kind is APSConfig:
        options |= choose("preset", method.preset, PRESETS) if method.preset else {}
        options |= VARIANTS[method.sampler]
        options |= {"draw": "categorical"} if task.best_of > 1 else {}
    options |= {"sigma": float(task.sigma)} if task.sigma else {}
    options |= {"num_samples": task.best_of} | method.options
    if operator is not None:
        y_shape = operator.output_shape((1, *image_shape, 3))
        is_small = not operator.is_image or min(y_shape[1:3]) < LPIPS_SIDE
        if options.get("perceptual_weight", 0) > 0 and is_small:
            options["perceptual_weight"] = 0.0
    try:
        config = kind(**options)
        if evaluations is None or not method.is_budgeted or kind.KNOB is None:
            return config
        return with_budget(config, evaluations, fixed=method.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {method.label!r}: {error}") from None


def model_facts(folder: Path) -> dict[str, str]:
    """Hashes of a model's weights."""
    paths = [checkpoint.weights_path(folder, section) for section in ("codec", "prior")]
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
    facts = [study.images, model, [task.name, task.options, task.sigma, task.best_of]]
    return digest([*facts, method.kind if config is None else config])


def described(sampler: str, config: Any, prior: str = "model") -> dict[str, Any]:
    """What a row says of its sampler: its name, and all options that are not its defaults."""
    defaults = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    options = {name: getattr(config, name) for name in names}
    return (
        {"sampler": sampler}
        | ({"prior": prior} if prior != "model" else {})
        | {name: value for name, value in options.items() if value != getattr(defaults, name)}
    )
