"""Plots of a benchmark, from its rows alone.

Methods may have been run on some of the photos only, so a point is always the mean of the reference
plus the paired gain over it, with the 95 % interval of the gain: what photos have in common does
not widen it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.bench.rows import Row
from experiments.bench.study import Study
from experiments.bench.summary import UNITS, Scores, gain, scores_of, tasks_of
from experiments.figures import DPI, figure, save_figure

_METRICS = ("psnr", "lpips")
#: Costs are told apart, and axes are logarithmic, from these ratios on.
_MIN_RATIO, _LOG_RATIO = 1.5, 20
_FEWER = ", fewer photos"
_COSTS = {"decoder_evaluations": "decoder evaluations", "seconds": "seconds"}


class Point(NamedTuple):
    """A score at the place `x`, the half-width of its interval, and how many photos it is of."""

    x: float
    mean: float
    half_width: float
    count: int


def plot(study: Study, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plots the gains, and whatever else the study has places for; returns the files."""
    paths = []
    for budget in study.budgets:
        label = budget.label if budget else None
        suffix = f"-{label.replace(' ', '_')}" if label else ""
        paths.append(_plot_gains(study, rows, label, folder / f"gains{suffix}.png"))
        if budget is not None:
            paths.append(_plot_quality(study, rows, label, folder / f"quality{suffix}.png"))
        if any(method.x is not None for method in study.methods.values()):
            paths.append(_plot_sweep(study, rows, label, folder / f"sweep{suffix}.png"))
        if any(task.x is not None for task in study.tasks.values()):
            paths.append(_plot_tasks(study, rows, label, folder / f"tasks{suffix}.png"))
    return [path for path in paths if path is not None]


def _begun(study: Study, rows: Sequence[Row], budget: str | None) -> list[str]:
    """Tasks with rows under the budget of this label."""
    begun = {row["task"] for row in rows if row["budget"] == budget}
    return [task for task in tasks_of(study, budget) if task in begun]


def _point(x: float, scores: Scores, reference: Scores, metric: str) -> Point | None:
    found = gain(scores, reference, metric)
    if found is None:
        return None
    level = np.mean([photo[metric] for photo in reference.values() if metric in photo])
    count = len(scores.keys() & reference.keys())
    return Point(x, float(level + found.mean), found.half_width, count)


def _plot_gains(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per task and metric: the gain of each method, with its interval."""
    found = {}
    tasks = _begun(study, rows, budget)
    for task in tasks:
        reference = scores_of(rows, task, study.compare_to, budget)
        for method in study.methods:
            scores = scores_of(rows, task, method, budget)
            for metric in ("psnr", "lpips"):
                value = gain(scores, reference, metric)
                if value is not None and method != study.compare_to:
                    found[task, metric, method] = value
    if not found:
        return None
    height = 1 + 0.25 * len(study.methods)
    picture, axes = figure(len(tasks), 2, (5.5, height))
    for row, task in zip(axes, tasks, strict=True):
        for axis, metric in zip(row, ("psnr", "lpips"), strict=True):
            methods = [m for m in study.methods if (task, metric, m) in found]
            gains = [found[task, metric, method] for method in methods]
            axis.errorbar(
                [g.mean for g in gains], range(len(gains)), xerr=[g.half_width for g in gains],
                fmt="o", capsize=3,
            )  # fmt: skip
            # Names stand once, at the left.
            axis.set_yticks(range(len(methods)), methods if axis is row[0] else [])
            axis.invert_yaxis()
            axis.locator_params(axis="x", nbins=6)
            axis.axvline(0, color="grey", linewidth=1)
            axis.set_title(f"{task}: {UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
    picture.suptitle(f"gain over {study.compare_to}", fontsize=10)
    return save_figure(picture, path)


def _draw(axis: Any, points: Sequence[Point], most: int, label: str, **style: Any) -> None:
    """A line with intervals; points of fewer than `most` photos are hollow."""
    xs, means, errors, _ = zip(*points, strict=True)
    line = axis.errorbar(xs, means, yerr=errors, capsize=3, marker="o", label=label, **style)
    fewer = [(point.x, point.mean) for point in points if point.count < most]
    if fewer:
        axis.plot(
            *zip(*fewer, strict=True), "o", color=line[0].get_color(), mfc="white", zorder=3,
            label=label + _FEWER,
        )  # fmt: skip


def _scale(axis: Any, values: Iterable[float]) -> None:
    low, high = min(values), max(values)
    if low > 0 and high >= _LOG_RATIO * low:
        axis.set_xscale("log")


def _plot_sweep(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per task and metric: scores against `Method.x`, one line per series."""
    lines: dict[str, list[tuple[float, str]]] = {}
    for method in study.methods.values():
        if method.x is not None:
            lines.setdefault(method.series or "", []).append((method.x, method.label))
    tasks = _begun(study, rows, budget)
    if not tasks:
        return None
    picture, axes = figure(len(tasks), 2, (4.5, 3.2))
    is_empty = True
    for row, task in zip(axes, tasks, strict=True):
        scores = {
            label: scores_of(rows, task, label, budget)
            for points in lines.values() for _, label in points
        }  # fmt: skip
        reference = scores_of(rows, task, study.compare_to, budget)
        most = max(map(len, scores.values()))
        for axis, metric in zip(row, _METRICS, strict=True):
            for series, places in lines.items():
                found = (_point(x, scores[m], reference, metric) for x, m in sorted(places))
                points = [point for point in found if point is not None]
                if points:
                    is_empty = False
                    _draw(axis, points, most, series)
            _scale(axis, [x for line in lines.values() for x, _ in line])
            axis.set_xlabel(study.x_label)
            axis.set_title(f"{task}: {UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
            if any(lines):
                axis.legend(fontsize=8)
    picture.suptitle(f"intervals are of the gain over {study.compare_to}", fontsize=9)
    return None if is_empty else save_figure(picture, path)


def _plot_tasks(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per family of tasks and metric: scores against `Task.x`, one line per method."""
    families: dict[str, list[tuple[float, str]]] = {}
    for label in _begun(study, rows, budget):
        task = study.tasks[label]
        if task.x is not None:
            families.setdefault(task.family, []).append((task.x, label))
    if not families:
        return None
    picture, axes = figure(len(families), 2, (4.5, 3.4))
    for row, (family, places) in zip(axes, families.items(), strict=True):
        scores = {
            (task, method): scores_of(rows, task, method, budget)
            for _, task in places for method in study.methods
        }  # fmt: skip
        most = max(map(len, scores.values()))
        for axis, metric in zip(row, _METRICS, strict=True):
            for index, method in enumerate(study.methods.values()):
                found = (
                    _point(x, scores[task, method.label], scores[task, study.compare_to], metric)
                    for x, task in sorted(places)
                )
                points = [point for point in found if point is not None]
                if points:
                    # Yardsticks, and methods beyond the number of colours, look different.
                    dashes = "--" if not method.has_sampler else "-" if index < 10 else "-."
                    _draw(
                        axis, points, most, method.label, color=f"C{index % 10}", linestyle=dashes
                    )
            values = sorted({x for x, _ in places})
            _scale(axis, values)
            axis.set_xticks(values, [f"{x:g}" for x in values])
            axis.minorticks_off()
            axis.set_xlabel(study.task_x_label)
            axis.set_title(f"{family}: {UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
    return _with_legend(picture, axes, study, path)


def _with_legend(picture: Any, axes: Any, study: Study, path: Path) -> Path | None:
    """Saves a figure with one legend for all its axes; nothing if it shows nothing."""
    shown = [axis.get_legend_handles_labels() for axis in axes.flat]
    lines = {label: line for found in shown for line, label in zip(*found, strict=True)}
    if not lines:
        return None
    labels = sorted(lines, key=lambda label: label.endswith(_FEWER))
    picture.legend(
        [lines[label] for label in labels], labels, fontsize=8, loc="outside right upper"
    )
    picture.suptitle(f"intervals are of the gain over {study.compare_to}", fontsize=9)
    return save_figure(picture, path)


def _cost_of(costs: Iterable[dict[str, float]]) -> str | None:
    """The first cost that tells methods apart: what a budget makes equal says nothing."""
    costs = list(costs)
    for name in _COSTS:
        # Methods that run no decoder before their last picture are no part of the budget.
        values = [c[name] for c in costs if c.get("decoder_evaluations") and name in c]
        if values and max(values) > _MIN_RATIO * min(values):
            return name
    return None


def _plot_quality(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per task and metric: scores of the samplers against what they cost.

    Seconds are shown only of studies that have a budget in seconds: others may have been run on a
    machine that was doing something else.
    """
    tasks = _begun(study, rows, budget)
    samplers = [label for label, method in study.methods.items() if method.has_sampler]
    scores = {
        (task, label): scores_of(rows, task, label, budget) for task in tasks for label in samplers
    }
    costs = {
        place: {
            name: float(np.mean([photo[name] for photo in photos.values() if name in photo]))
            for name in _COSTS if any(name in photo for photo in photos.values())
        }
        for place, photos in scores.items()
    }  # fmt: skip
    names = {task: _cost_of([costs[task, label] for label in samplers]) for task in tasks}
    is_timed = any(other and other.seconds_of for other in study.budgets)
    tasks = [task for task in tasks if names[task] and (is_timed or names[task] != "seconds")]
    if not tasks:
        return None
    picture, axes = figure(len(tasks), 2, (5.5, 4.2))
    labels = []
    for row, task in zip(axes, tasks, strict=True):
        name, reference = names[task], scores_of(rows, task, study.compare_to, budget)
        for axis, metric in zip(row, _METRICS, strict=True):
            points = {
                label: _point(costs[task, label][name], scores[task, label], reference, metric)
                for label in samplers if name in costs[task, label]
            }  # fmt: skip
            points = {label: point for label, point in points.items() if point is not None}
            for label, (x, mean, half_width, _) in points.items():
                axis.errorbar([x], [mean], yerr=[half_width], fmt="o", capsize=2, alpha=0.8)
                labels.append((axis, label, (x, mean)))
            if points:
                _scale(axis, [point.x for point in points.values()])
            axis.margins(x=0.15, y=0.1)
            axis.set_xlabel(_COSTS[name])
            axis.set_title(f"{task}: {UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
    if not labels:
        return None
    picture.suptitle(f"intervals are of the gain over {study.compare_to}", fontsize=9)
    _name_points(picture, labels)
    return save_figure(picture, path)


def _name_points(picture: Any, labels: Sequence[tuple[Any, str, tuple[float, float]]]) -> None:
    """Writes names beside points, where they cover neither each other nor a point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    picture.set_dpi(DPI)
    picture.draw_without_rendering()  # Places are known only now.
    picture.set_layout_engine("none")
    taken: dict[Any, list[Any]] = {}
    for axis, _, place in labels:
        x, y = axis.transData.transform(place)
        taken.setdefault(axis, []).append(Bbox.from_bounds(x - 4, y - 4, 8, 8))
    steps = [(dx, dy) for dy in (0, 9, -9, 18, -18, 27, -27, 36, -36) for dx in (7, -7)]
    for axis, label, place in labels:
        tried = []
        for dx, dy in steps:
            text = axis.annotate(
                label, place, xytext=(dx, dy), textcoords="offset points", fontsize=7,
                ha="left" if dx > 0 else "right", va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey"} if dy else None,
            )  # fmt: skip
            text.get_window_extent()  # Places the text; the extent itself includes the arrow.
            box = Text.get_window_extent(text)
            is_beyond = not all(axis.bbox.contains(*corner) for corner in (box.min, box.max))
            tried.append((is_beyond, sum(map(box.overlaps, taken[axis])), box, text))
            if tried[-1][:2] == (False, 0):
                break
        _, _, box, best = min(tried, key=lambda found: found[:2])
        for *_, text in tried:
            if text is not best:
                text.remove()
        taken[axis].append(box)
