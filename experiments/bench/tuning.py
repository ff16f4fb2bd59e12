"""Tunes every method alike: as many configurations each, on photos of their own.

Trial 0 is the configuration as given; the others are drawn without replacement from the method's
search space. The best mean score over the tasks for tuning that a method runs on wins, and the main
run uses it.
"""

from __future__ import annotations

import collections
import itertools
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aps_jax.io.files import write_json
from experiments.bench.identity import config_of
from experiments.bench.rows import Row
from experiments.bench.study import METRICS, Budget, Method, Study


def trials_of(study: Study, method: Method) -> list[dict[str, Any]]:
    """Changes to a method's options by trial; the first are none.

    Raises:
      ValueError: if the search space has too few points, so that methods would not be tuned alike.
    """
    # In the order of the configuration, so that an option may get another name.
    count, names = study.tuning.trials, list(method.tune)
    points = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(method.tune[name] for name in names))
    ]
    points = [point for point in points if method.config | point != method.config]
    if study.tuning.distinct:
        first = _built(study, method, [{}, *points])
        points = [point for i, point in enumerate(points, start=1) if first[i] == i]
    if len(points) < count - 1:
        raise ValueError(
            f"method {method.label!r} has {len(points)} points to try, tuning needs {count - 1}; "
            "widen its search space or lower tuning.trials"
        )
    rng = np.random.default_rng([study.tuning.seed, zlib.crc32(method.label.encode())])
    chosen = rng.choice(len(points), count - 1, replace=False) if points else []
    return [{}, *(points[i] for i in chosen)]


def _built(study: Study, method: Method, points: Sequence[dict[str, Any]]) -> list[int]:
    """For each of the points the first one that comes to the same configurations."""
    budget = _budget(study)
    configs = [
        [
            config_of(method.configured(point), study.tasks[label], budget and budget.limit(method))
            for label in labels_of(study, method)
        ]
        for point in points
    ]
    return [configs.index(config) for config in configs]


def _budget(study: Study) -> Budget | None:
    return next(b for b in study.budgets if b is None or b.seconds_of is None)


def labels_of(study: Study, method: Method) -> list[str]:
    """The tasks that a method is tuned on.

    Raises:
      ValueError: if there are none.
    """
    labels = study.tuning.tasks or tuple(study.tasks)
    chosen = [label for label in labels if method.tasks is None or label in method.tasks]
    if not chosen:
        raise ValueError(
            f"method {method.label!r} has a search space, but runs on none of the tasks for "
            f"tuning ({', '.join(labels)}); add one to its tasks or to tuning.tasks"
        )
    return chosen


def tuning_study(study: Study) -> Study:
    """The study whose methods are the trials, on the photos for tuning."""
    tuning = study.tuning
    methods = {}
    for method in study.methods.values():
        if method.tune:
            labels_of(study, method)
            for index, options in enumerate(trials_of(study, method)):
                label = _label(method, index)
                trial = method.configured(options)
                methods[label] = trial.changed(label=label, tune={}, count=None)
    if not methods:
        raise ValueError("no method has a search space; add `tune` to some")
    labels = tuning.tasks or tuple(study.tasks)
    return study.changed(
        images=study.images | tuning.images | {"offset": 0, "without": _places(study.images)},
        seeds=(tuning.seed,),
        tasks={label: study.tasks[label] for label in labels},
        methods=methods,
        compare_to=next(iter(methods)),
        budgets=(_budget(study),),
        tuning=None,
    )


def _places(images: dict[str, Any]) -> dict[str, Any]:
    """What says which photos of a folder are used."""
    return {name: images[name] for name in ("count", "offset") if name in images}


def _label(method: Method, index: int) -> str:
    return f"{method.label} #{index}"


def method_of(label: str) -> str:
    """Label of the method whose trial has this label."""
    return label.rpartition(" #")[0]


def record(study: Study, rows: Sequence[Row], identity: str) -> dict[str, Any]:
    """What tuning found: the options of the best trial of each method, and all scores.

    A trial with a failed photo cannot win. Methods whose trials are not finished are left out. A
    trial of the same configuration as an earlier one says so (`repeats`): that method was given
    fewer to choose from.

    Raises:
      ValueError: if every trial of a method failed.
    """
    tuning, found = study.tuning, {}
    for method in study.methods.values():
        if not method.tune:
            continue
        labels, points = labels_of(study, method), trials_of(study, method)
        trials, is_finished = [], True
        for index, (options, first) in enumerate(
            zip(points, _built(study, method, points), strict=True)
        ):
            own = [row for row in rows if row["method"] == _label(method, index)]
            values = {
                label: [row.get(tuning.metric, np.nan) for row in own if row["task"] == label]
                for label in labels
            }
            is_finished &= all(len(v) == _most(rows, label) > 0 for label, v in values.items())
            means = [float(np.mean(v)) for v in values.values() if v]
            score = float(np.mean(means)) if means else float("nan")
            trials.append({"options": options, "score": score})
            if first != index:
                trials[-1]["repeats"] = first
        if not is_finished:
            continue
        scores = METRICS[tuning.metric] * np.array([trial["score"] for trial in trials])
        if np.isnan(scores).all():
            raise ValueError(f"every trial of {method.label!r} failed; widen its search space")
        best = int(np.nanargmax(scores))
        found[method.label] = {"best": best, "options": trials[best]["options"], "trials": trials}
    return {"identity": identity, "metric": tuning.metric, "methods": found}


def _most(rows: Sequence[Row], task: str) -> int:
    """How many photos of a task the trial with most of them has."""
    return max(collections.Counter(row["method"] for row in rows if row["task"] == task).values(),
               default=0)  # fmt: skip


def repeated(found: dict[str, Any]) -> list[str]:
    """Says of each method of a record which of its trials repeat others."""
    return [
        f"{method}: trial {index} repeats trial {trial['repeats']}"
        for method, entry in found["methods"].items()
        for index, trial in enumerate(entry["trials"])
        if "repeats" in trial
    ]


def write(path: Path, found: dict[str, Any]) -> None:
    """Stores what tuning found."""
    write_json(path, found)


def tuned(study: Study, path: Path, identity: str, *, wanted: Collection[str] = ()) -> Study:
    """The study with the options that tuning found.

    Args:
      study: as parsed.
      path: file of the record.
      identity: what the record must be of.
      wanted: labels of methods that are going to be run.

    Raises:
      ValueError: if there is no record, if it is of another configuration, or if it lacks a method
        that is wanted and to be tuned.
    """
    try:
        stored = json.loads(path.read_text())
        options = {name: entry["options"] for name, entry in stored["methods"].items()}
        found = stored["identity"]
    except FileNotFoundError:
        raise ValueError(
            f"the configuration asks for tuned methods, but there is no {path}; run the same "
            "command with --tune first, or add --untuned"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged; remove it and run with --tune again") from None
    if found != identity:
        raise ValueError(
            f"{path} is of another configuration or model; run with --tune and another --out"
        )
    lacking = [label for label in wanted if study.methods[label].tune and label not in options]
    if lacking:
        raise ValueError(
            f"not tuned yet: {', '.join(lacking)}; run --tune to the end, or name other methods "
            "with --only"
        )
    methods = {
        label: method.configured(options.get(label, {})) for label, method in study.methods.items()
    }
    return study.changed(methods=methods)
