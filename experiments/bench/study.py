"""The configuration of a benchmark: what is compared, on what, and what it costs.

A configuration is one JSON object, a `Study`. Every number of the results is decided by it, the
model's weights and the version of this package; `fingerprint` names all of that for one row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from typing_extensions import TypedDict

from aps_jax.io.names import choose
from aps_jax.presets import config_class
from aps_jax.tasks import TASKS
from experiments.bench.budgets import Budget, Calls, OtherCalls
from experiments.bench.identity import config_of
from experiments.bench.settings import (
    FORBID,
    Count,
    Index,
    Number,
    Part,
    Settings,
    Sigma,
    in_one_line,
    require_known,
)

#: Better is larger, or smaller.
METRICS = {"psnr": 1, "ssim": 1, "lpips": -1, "residual": -1}


class Photos(TypedDict):
    """`count` and `offset` of `photos.evaluation_crops`."""

    __pydantic_config__ = FORBID
    count: NotRequired[Count]
    offset: NotRequired[Index]


class Images(Photos):
    """Arguments of `photos.evaluation_crops` but the folder."""

    size: Count
    shrink: NotRequired[Count]
    without: NotRequired[Photos]


class TuningImages(TypedDict):
    """How many photos are tuned on."""

    __pydantic_config__ = FORBID
    count: Count


class Placed(Part):
    """A part with a place in a plot.

    Attributes:
      series: line, or family of tasks, that it belongs to.
      x: its place on that line.
    """

    series: str | None = None
    x: Number | None = None

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.series is not None and self.x is None:
            raise ValueError("has a series but no place on it; add x")
        return self


class Task(Placed):
    """A measurement task; further keys are options of that task.

    Attributes:
      task: key of `aps_jax.tasks.TASKS`.
      sigma: noise standard deviation.
      best_of: samples per photo, of which the one of least residual counts.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    task: str
    sigma: Sigma
    best_of: Count = 1

    @model_validator(mode="after")
    def _has_known_options(self) -> Self:
        known = [name for name in choose("task", self.task, TASKS).options if name != "params"]
        require_known(self.options, [*type(self).model_fields, *known], "unknown key")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Options of the operator."""
        return dict(self.model_extra or {})

    @property
    def family(self) -> str:
        """Tasks that share a plot."""
        return self.series or self.task


class Method(Placed):
    """What restores the measurements.

    Attributes:
      kind: a sampler, a yardstick that needs none, or the record of a sampler whose options this
        version no longer has: its rows are shown, and nothing of it is run.
      sampler: key of `aps_jax.samplers.SAMPLERS` or of `VARIANTS`.
      preset: preset that `config` changes, of aps and its variants.
      prior: "model", or "none" for a uniform prior.
      estimate: of several samples (`best_of` of the task, or `num_samples` in `config`) the "best",
        which fits the measurement best, or their "mean".
      config: options of the sampler's configuration.
      tasks: labels of the tasks that it is for; None for all.
      denoiser: folder of the denoiser that samplers without tokens need, seen from the repository.
      calls: what its networks cost in a budget in FLOPs, where they are not the budget's.
      budgeted: sized by the study's budgets; otherwise it runs as it is.
      tune: values that tuning may choose from, by option.
    """

    kind: Literal["sampler", "codec", "measurement", "estimate", "record"] = "sampler"
    sampler: str = "aps"
    preset: str | None = None
    prior: Literal["model", "none"] = "model"
    estimate: Literal["best", "mean"] = "best"
    config: dict[str, Any] = {}
    tasks: tuple[str, ...] | None = None
    denoiser: str | None = None
    calls: OtherCalls = OtherCalls()
    budgeted: StrictBool = True
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _has_known_options(self) -> Self:
        if self.kind == "sampler":
            fields = config_class(self.sampler).__dataclass_fields__
            what = f"sampler {self.sampler!r} has no option"
            require_known((*self.config, *self.tune), fields, what)
            if (self.needed != "prior") != (self.denoiser is not None):
                has = "lacks" if self.denoiser is None else "has no use for"
                raise ValueError(f"sampler {self.sampler!r} {has} a folder in `denoiser`")
        return self

    @property
    def has_sampler(self) -> bool:
        """Whether its rows are of a sampler, not of a yardstick."""
        return self.kind in ("sampler", "record")

    @property
    def needed(self) -> str:
        """What its sampler draws from (`SharedConfig.NEEDS`); of yardsticks, what they read."""
        return config_class(self.sampler).NEEDS if self.kind == "sampler" else "prior"

    @property
    def folder(self) -> Path | None:
        """Of its denoiser; a relative one is in the repository."""
        return self.denoiser and Path(__file__).parents[2] / self.denoiser

    def configured(self, options: Mapping[str, Any]) -> Method:
        """The method with some of its options replaced."""
        return self.changed(config=self.config | dict(options))


class Tuning(Settings):
    """How options are chosen: by random search on photos of their own.

    Attributes:
      images: `count` of the photos, spread evenly over those that the study does not use.
      trials: configurations tried per method, the one given included.
      metric: its mean over tasks and photos decides.
      tasks: labels of the tasks it is measured on; None for all.
      seed: of the search and of the noise.
      distinct: whether options that come to the same configuration, defaults and budget included,
        are one point of the search space. Without, trials may repeat each other, as they do in
        studies that were tuned before this was an option: the draw is part of their identity.
    """

    images: TuningImages
    trials: Count = 8
    metric: Literal["psnr", "ssim", "lpips", "residual"] = "psnr"
    tasks: tuple[str, ...] | None = None
    seed: Index = 1
    distinct: StrictBool = False


def _in_order(budgets: dict[str, Budget]) -> tuple[Budget | None, ...]:
    """Those in evaluations first: their rows say what the others in seconds come to."""
    ordered = sorted(budgets.values(), key=lambda budget: budget.seconds_of is not None)
    if ordered and ordered[0].seconds_of is not None:
        raise ValueError("a budget in seconds needs one in evaluations beside it")
    return tuple(ordered) or (None,)


class Study(Settings):
    """A whole benchmark; `parse` makes one.

    Attributes:
      model: embedded model or folder.
      images: which photos.
      lpips: whether LPIPS is scored.
      seeds: of operators, noise and sampling; each photo is restored once per seed.
      batch_size: photos at once.
      compare_to: label of the method that the others are compared with, photo by photo.
      tasks: by label; in the file, `sigma` beside them is that of those that name none.
      methods: by label.
      budgets: in the order in which they run; None: every method runs as it is.
      tuning: how options are tuned, if they are.
      x_label: what `Method.x` is.
      task_x_label: what `Task.x` is.
    """

    model: str = "photo64"
    images: Images
    lpips: StrictBool = True
    seeds: Annotated[tuple[Index, ...], Field(min_length=1)] = (0,)
    batch_size: Count = 8
    compare_to: str
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    budgets: Annotated[dict[str, Budget], AfterValidator(_in_order)] = (None,)
    tuning: Tuning | None = None
    x_label: str = ""
    task_x_label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _with_labels(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        defaults = {"tasks": {"sigma": raw.pop("sigma", 0.05)}, "methods": {}, "budgets": {}}
        for name in [name for name in defaults if isinstance(raw.get(name), dict)]:
            raw[name] = {
                label: _labelled(name, label, defaults[name], entry)
                for label, entry in raw[name].items()
            }
        return raw

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        choose("method (compare_to)", self.compare_to, self.methods)
        budgets = [budget for budget in self.budgets if budget is not None]
        for part in (*self.methods.values(), *budgets, self.tuning):
            for task in (part and part.tasks) or ():
                choose(f"task (of {getattr(part, 'label', 'tuning')!r})", task, self.tasks)
        for budget in budgets:
            if budget.seconds_of is not None:
                method = choose("method (seconds_of)", budget.seconds_of, self.methods)
                if method.kind != "sampler":
                    raise ValueError(f"budget {budget.label!r}: seconds_of must name a sampler")
        if self.tuning is not None and "without" in self.images:
            raise ValueError("images.without and tuning exclude each other; drop images.without")
        if self.tuning is not None and "count" not in self.images:
            raise ValueError("tuning needs images.count, or no photos are left for it")
        self._require_own_places()
        # Whatever is wrong with a method is found now, not hours into the run.
        for method in self.methods.values():
            for task in self.tasks.values() if method.kind == "sampler" else ():
                for budget in self.budgets:
                    config_of(method, task, budget and budget.limit(method))
        return self

    def _require_own_places(self) -> None:
        places: dict[tuple[str, float], str] = {}
        for task in [task for task in self.tasks.values() if task.x is not None]:
            other = places.setdefault((task.family, task.x), task.label)
            if other != task.label:
                raise ValueError(
                    f"tasks {other!r} and {task.label!r} are both at x {task.x:g} of series "
                    f"{task.family!r}; give one of them another x or series"
                )

    def budgets_of(self, task: str) -> list[Budget | None]:
        """Budgets that the task of this label is run under."""
        return [b for b in self.budgets if b is None or b.tasks is None or task in b.tasks]


def _labelled(name: str, label: str, defaults: dict[str, Any], entry: Any) -> Any:
    """An entry of `tasks`, `methods` or `budgets` with its label."""
    if not label.strip() or "|" in label or "#" in label:
        raise ValueError(f"{name} has the label {label!r}; it must be words without | or #")
    if not isinstance(entry, dict):
        return entry
    if "label" in entry:
        raise ValueError(f"{name}.{label}: unknown key 'label'; the name before it is the label")
    own = {"task": entry.get("task", label)} if name == "tasks" else {}
    return defaults | entry | own | {"label": label}


#: All keys of a configuration, to find what was meant.
_KEYS = sorted(
    {"sigma", *Images.__annotations__}.union(
        *(kind.model_fields for kind in (Study, Method, Budget, Calls, Tuning))
    )
)


def load(path: Path) -> Study:
    """Reads a configuration file; ValueError if it is not one."""
    try:
        return parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"configuration {path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"configuration {path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"configuration {path}: {error}") from None


def parse(raw: Any) -> Study:
    """Study of a configuration as it is in the file.

    Raises:
      ValueError: in one line, for what is unknown, missing or out of range.
    """
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise ValueError(in_one_line(error, _KEYS)) from None
