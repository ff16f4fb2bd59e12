"""Reads the configuration file of a benchmark; whatever is wrong with it is found here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aps_jax.io.names import choose, suggestion
from aps_jax.presets import config_class
from aps_jax.tasks import TASKS
from experiments.bench.study import (
    KINDS,
    METRICS,
    Budget,
    Method,
    Study,
    Task,
    Tuning,
    config_of,
)


def load(path: Path) -> Study:
    """Reads a configuration file; ValueError if it is not one."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"configuration {path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"configuration {path} is not JSON: {error}") from None
    try:
        return parse(raw)
    except ValueError as error:
        raise ValueError(f"configuration {path}: {error}") from None


def parse(raw: Any) -> Study:
    """Study of a configuration as it is in the file.

    Raises:
      ValueError: for a key, task, sampler or option that is unknown, missing or out of range.
    """
    known = (
        "model", "images", "lpips", "sigma", "seed", "seeds", "batch_size", "compare_to", "tasks",
        "methods", "budgets", "tuning", "x_label", "task_x_label",
    )  # fmt: skip
    _check(raw, "the configuration", known, ("images", "compare_to", "tasks", "methods"))
    if "seed" in raw and "seeds" in raw:
        raise ValueError("the configuration has both seed and seeds; keep one")
    for name in ("tasks", "methods", "budgets"):
        for label in _object(raw.get(name, {}), name):
            if not label.strip() or "|" in label or "#" in label:
                raise ValueError(f"{name} has the label {label!r}; it must be words without | or #")
    sigma = raw.get("sigma", 0.05)
    tasks = {label: _task(label, entry, sigma) for label, entry in raw["tasks"].items()}
    methods = {label: _method(label, entry, tasks) for label, entry in raw["methods"].items()}
    if not tasks or not methods:
        raise ValueError("the configuration needs at least one task and one method")
    _check(raw["images"], "images", ("size", "shrink", "count", "offset", "without"), ("size",))
    _check(raw["images"].get("without", {}), "images.without", ("count", "offset"))
    choose("method (compare_to)", raw["compare_to"], methods)
    budgets = [
        _budget(label, entry, methods, tasks) for label, entry in raw.get("budgets", {}).items()
    ]
    budgets.sort(key=lambda budget: budget.like is not None)
    if budgets and budgets[0].like is not None:
        raise ValueError("a budget in seconds needs one in evaluations beside it")
    study = Study(
        model=raw.get("model", "photo64"),
        images=raw["images"],
        lpips=raw.get("lpips", True),
        seeds=tuple(raw.get("seeds", [raw.get("seed", 0)])),
        batch_size=raw.get("batch_size", 8),
        compare_to=raw["compare_to"],
        tasks=tasks,
        methods=methods,
        budgets=tuple(budgets) or (None,),
        tuning=_tuning(raw["tuning"], tasks) if "tuning" in raw else None,
        x_label=_words("x_label", raw.get("x_label", "")),
        task_x_label=_words("task_x_label", raw.get("task_x_label", "")),
    )
    _check_places(study)
    _check_numbers(study)
    return study


def _check_places(study: Study) -> None:
    """Refuses two tasks at one place of the plot of tasks."""
    places: dict[tuple[str, float], str] = {}
    for task in study.tasks.values():
        if task.x is not None:
            other = places.setdefault((task.series, task.x), task.label)
            if other != task.label:
                raise ValueError(
                    f"tasks {other!r} and {task.label!r} are both at x {task.x:g} of series "
                    f"{task.series!r}; give one of them another x or series"
                )


def _check_numbers(study: Study) -> None:
    _whole("batch_size", study.batch_size, 1)
    for seed in study.seeds:
        _whole("seeds", seed, 0)
    places = {f"images.{name}": value for name, value in study.images.items() if name != "without"}
    for name, value in study.images.get("without", {}).items():
        places[f"images.without.{name}"] = value
    for name, value in places.items():
        _whole(name, value, 0 if name.endswith("offset") else 1)
    if "without" in study.images and study.tuning is not None:
        raise ValueError("images.without and tuning exclude each other; drop images.without")
    if study.tuning is not None:
        _whole("tuning.trials", study.tuning.trials, 1)
        _whole("tuning.seed", study.tuning.seed, 0)
        _whole("tuning.images.count", study.tuning.images["count"], 1)
        if "count" not in study.images:
            raise ValueError("tuning needs images.count, or no photos are left for it")
    # Whatever is wrong with a method is found now, not hours into the run.
    for method in study.methods.values():
        for task in study.tasks.values():
            for budget in study.budgets:
                if method.kind == "sampler":
                    config_of(method, task, budget.evaluations if budget else None)


def _words(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be words, got {value!r}")
    return value


def _place(where: str, raw: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The `series` and `x` of a task or method."""
    series, x = raw.get("series"), raw.get("x")
    if x is not None:
        is_number = isinstance(x, int | float) and not isinstance(x, bool)
        if not is_number or not math.isfinite(x):
            raise ValueError(f"{where}: x must be a finite number, got {x!r}")
    if series is not None:
        _words(f"{where}: series", series)
        if x is None:
            raise ValueError(f"{where} has a series but no place on it; add x")
    return series, x


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _object(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {raw!r}")
    return raw


def _check(raw: Any, where: str, known: tuple[str, ...], needed: tuple[str, ...] = ()) -> None:
    for name in _object(raw, where):
        if name not in known:
            raise ValueError(
                f"{where} has an unknown key {name!r}{suggestion(name, known)}; known: "
                f"{', '.join(known)}"
            )
    for name in needed:
        if name not in raw:
            raise ValueError(f"{where} lacks {name!r}")


def _task(label: str, raw: Any, sigma: float) -> Task:
    name = raw.get("task", label) if isinstance(raw, dict) else label
    known = choose("task", name, TASKS)
    given = set(known.options) - {"params"}
    own = ("task", "sigma", "best_of", "count", "series", "x")
    _check(raw, f"task {label!r}", (*own, *sorted(given)))
    series, x = _place(f"task {label!r}", raw)
    options = {key: value for key, value in raw.items() if key in given}
    task = Task(
        label=label,
        name=name,
        options=options,
        sigma=raw.get("sigma", sigma),
        best_of=raw.get("best_of", 1),
        count=raw.get("count"),
        series=series if x is None else series or name,
        x=x,
    )
    if task.count is not None:
        _whole(f"task {label!r}: count", task.count, 1)
    if not isinstance(task.sigma, int | float) or not 0 <= task.sigma < float("inf"):
        raise ValueError(f"task {label!r}: sigma must be a number >= 0, got {task.sigma!r}")
    if not isinstance(task.best_of, int) or task.best_of < 1:
        raise ValueError(f"task {label!r}: best_of must be at least 1, got {task.best_of!r}")
    return task


def _method(label: str, raw: Any, tasks: Mapping[str, Task]) -> Method:
    known = (
        "kind", "sampler", "preset", "prior", "config", "tasks", "count", "budgeted", "tune",
        "series", "x",
    )  # fmt: skip
    _check(raw, f"method {label!r}", known)
    series, x = _place(f"method {label!r}", raw)
    method = Method(
        label=label,
        kind=raw.get("kind", "sampler"),
        sampler=raw.get("sampler", "aps"),
        preset=raw.get("preset"),
        prior=raw.get("prior", "model"),
        options=dict(_object(raw.get("config", {}), f"method {label!r}: config")),
        tasks=tuple(raw["tasks"]) if "tasks" in raw else None,
        count=raw.get("count"),
        is_budgeted=raw.get("budgeted", True),
        space=dict(_object(raw.get("tune", {}), f"method {label!r}: tune")),
        series=series,
        x=x,
    )
    if method.count is not None:
        _whole(f"method {label!r}: count", method.count, 1)
    for name, values in method.space.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"method {label!r}: tune.{name} must be a list of values")
    choose("kind of method", method.kind, dict.fromkeys(KINDS))
    choose("prior", method.prior, dict.fromkeys(("model", "none")))
    for task in method.tasks or ():
        choose(f"task (of method {label!r})", task, tasks)
    if method.kind == "sampler":
        kind = config_class(method.sampler)
        fields = [field.name for field in dataclasses.fields(kind)]
        for name in (*method.options, *method.space):
            if name not in fields:
                raise ValueError(
                    f"method {label!r}: sampler {method.sampler!r} has no option {name!r}"
                    f"{suggestion(name, fields)}"
                )
    return method


def _budget(
    label: str, raw: Any, methods: Mapping[str, Method], tasks: Mapping[str, Task]
) -> Budget:
    known = ("evaluations", "seconds_of", "tasks", "count")
    _check(raw, f"budget {label!r}", known, ("evaluations",))
    if not isinstance(raw["evaluations"], int) or raw["evaluations"] < 1:
        raise ValueError(f"budget {label!r}: evaluations must be at least 1")
    if "seconds_of" in raw:
        method = choose("method (seconds_of)", raw["seconds_of"], methods)
        if method.kind != "sampler":
            raise ValueError(f"budget {label!r}: seconds_of must name a sampler")
    for task in raw.get("tasks", ()):
        choose(f"task (of budget {label!r})", task, tasks)
    if "count" in raw:
        _whole(f"budget {label!r}: count", raw["count"], 1)
    return Budget(
        label=label,
        evaluations=raw["evaluations"],
        like=raw.get("seconds_of"),
        tasks=tuple(raw["tasks"]) if "tasks" in raw else None,
        count=raw.get("count"),
    )


def _tuning(raw: Any, tasks: Mapping[str, Task]) -> Tuning:
    known = ("images", "trials", "metric", "tasks", "seed", "distinct")
    _check(raw, "tuning", known, ("images",))
    _check(raw["images"], "tuning.images", ("count",), ("count",))
    for task in raw.get("tasks", ()):
        choose("task (of tuning)", task, tasks)
    choose("metric", raw.get("metric", "psnr"), METRICS)
    if not isinstance(raw.get("distinct", False), bool):
        raise ValueError(f"tuning.distinct must be true or false, got {raw['distinct']!r}")
    chosen = {"tasks": tuple(raw["tasks"])} if "tasks" in raw else {}
    return Tuning(**raw | chosen)
