"""Plots of a benchmark, from its rows alone.

Methods may have been run on some of the photos only, so a point is always the mean of the reference
plus the paired gain over it, with the 95 % interval of the gain: what photos have in common does
not widen it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.bench.rows import Row
from experiments.bench.study import Study
from experiments.bench.summary import UNITS, Scores, gain
from experiments.figures import DPI, figure, save_figure

_METRICS = ("psnr", "lpips")
#: Costs are told apart, and axes are logarithmic, from these ratios on.
_MIN_RATIO, _LOG_RATIO = 1.5, 20
_FEWER = ", fewer photos"
_COSTS = {
    "flops": "FLOPs",
    "decoder_evaluations": "decoder evaluations",
    "seconds": "seconds",
}


class Point(NamedTuple):
    """A score at the place `x`, the half-width of its interval, and how many photos it is of."""

    x: float
    mean: float
    half_width: float
    count: int


def plot(study: Study, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plots the gains, and whatever else the study has places for; returns the files."""
    scores, paths = Scores(rows), []
    kinds = {"gains": _plot_gains}
    kinds |= {"quality": _plot_quality} if study.budgets != (None,) else {}
    kinds |= {"sweep": _plot_sweep} if any(m.x is not None for m in study.methods.values()) else {}
    kinds |= {"tasks": _plot_tasks} if any(t.x is not None for t in study.tasks.values()) else {}
    for budget in study.budgets:
        label = budget and budget.label
        suffix = f"-{label.replace(' ', '_')}" if label else ""
        for name, draw in kinds.items():
            picture = draw(study, scores, label)
            if picture is not None:
                paths.append(save_figure(picture, folder / f"{name}{suffix}.png"))
    return paths


def _panels(study: Study, tasks: Sequence[str], size: tuple[float, float]) -> tuple[Any, dict]:
    """A figure that says what its intervals are of, and axes by (task, metric)."""
    picture, axes = figure(len(tasks), len(_METRICS), size)
    picture.suptitle(f"intervals are of the gain over {study.compare_to}", fontsize=9)
    panels = {}
    for row, task in zip(axes, tasks, strict=True):
        for axis, metric in zip(row, _METRICS, strict=True):
            axis.set_title(f"{task}: {UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
            panels[task, metric] = axis
    return picture, panels


def _point(x: float, own: pd.DataFrame, reference: pd.DataFrame, metric: str) -> Point | None:
    found = gain(own, reference, metric)
    if found is None:
        return None
    count = len(own.index.intersection(reference.index))
    return Point(x, float(reference[metric].mean() + found.mean), found.half_width, count)


def _plot_gains(study: Study, scores: Scores, budget: str | None) -> Any:
    """Per task and metric: the gain of each method, with its interval."""
    tasks, found = scores.begun(study, budget), {}
    for task in tasks:
        reference = scores.of(task, study.compare_to, budget)
        for method in [m for m in study.methods if m != study.compare_to]:
            for metric in _METRICS:
                value = gain(scores.of(task, method, budget), reference, metric)
                if value is not None:
                    found.setdefault((task, metric), {})[method] = value
    if not found:
        return None
    picture, panels = _panels(study, tasks, (5.5, 1 + 0.25 * len(study.methods)))
    for (task, metric), axis in panels.items():
        gains = found.get((task, metric), {})
        axis.errorbar(
            [g.mean for g in gains.values()], range(len(gains)),
            xerr=[g.half_width for g in gains.values()], fmt="o", capsize=3,
        )  # fmt: skip
        # Names stand once, at the left.
        axis.set_yticks(range(len(gains)), list(gains) if metric == _METRICS[0] else [])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=6)
        axis.axvline(0, color="grey", linewidth=1)
    picture.suptitle(f"gain over {study.compare_to}", fontsize=10)
    return picture


def _draw(axis: Any, points: Iterable[Point | None], most: int, label: str, **style: Any) -> None:
    """A line with intervals; points of fewer than `most` photos are hollow."""
    points = [point for point in points if point is not None]
    if not points:
        return
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


def _is_empty(panels: dict[Any, Any]) -> bool:
    return not any(axis.has_data() for axis in panels.values())


def _plot_sweep(study: Study, scores: Scores, budget: str | None) -> Any:
    """Per task and metric: scores against `Method.x`, one line per series."""
    placed = [method for method in study.methods.values() if method.x is not None]
    lines = {method.series or "": [] for method in placed}
    for method in sorted(placed, key=lambda method: method.x):
        lines[method.series or ""].append(method)
    tasks = scores.begun(study, budget)
    if not tasks:
        return None
    picture, panels = _panels(study, tasks, (4.5, 3.2))
    for (task, metric), axis in panels.items():
        own = {method.label: scores.of(task, method.label, budget) for method in placed}
        reference = scores.of(task, study.compare_to, budget)
        for series, methods in lines.items():
            points = (_point(m.x, own[m.label], reference, metric) for m in methods)
            _draw(axis, points, max(map(len, own.values())), series)
        _scale(axis, [method.x for method in placed])
        axis.set_xlabel(study.x_label)
        if any(lines):
            axis.legend(fontsize=8)
    return None if _is_empty(panels) else picture


def _plot_tasks(study: Study, scores: Scores, budget: str | None) -> Any:
    """Per family of tasks and metric: scores against `Task.x`, one line per method."""
    families: dict[str, list[tuple[float, str]]] = {}
    for label in scores.begun(study, budget):
        task = study.tasks[label]
        if task.x is not None:
            families.setdefault(task.family, []).append((task.x, label))
    if not families:
        return None
    picture, panels = _panels(study, list(families), (4.5, 3.4))
    for (family, metric), axis in panels.items():
        places = sorted(families[family])
        found = {(t, m): scores.of(t, m, budget) for _, t in places for m in study.methods}
        most = max(map(len, found.values()))
        for index, method in enumerate(study.methods.values()):
            points = (
                _point(x, found[task, method.label], found[task, study.compare_to], metric)
                for x, task in places
            )
            # Yardsticks, and methods beyond the number of colours, look different.
            dashes = "--" if not method.has_sampler else "-" if index < 10 else "-."
            _draw(axis, points, most, method.label, color=f"C{index % 10}", linestyle=dashes)
        values = sorted({x for x, _ in places})
        _scale(axis, values)
        axis.set_xticks(values, [f"{x:g}" for x in values])
        axis.minorticks_off()
        axis.set_xlabel(study.task_x_label)
    if _is_empty(panels):
        return None
    # One legend for all.
    shown = [axis.get_legend_handles_labels() for axis in panels.values()]
    lines = {label: line for found in shown for line, label in zip(*found, strict=True)}
    labels = sorted(lines, key=lambda label: label.endswith(_FEWER))
    picture.legend(
        [lines[label] for label in labels], labels, fontsize=8, loc="outside right upper"
    )
    return picture


def _cost_of(costs: pd.DataFrame) -> str | None:
    """The first cost that tells methods apart: what a budget makes equal says nothing."""
    # Methods that run no decoder before their last picture are no part of a budget of its runs.
    costs = costs[(costs["decoder_evaluations"] > 0) | costs["flops"].notna()]
    costs = costs.where(costs > 0)
    ratios = costs.max() / costs.min()
    return next((name for name in _COSTS if ratios[name] > _MIN_RATIO), None)


def _plot_quality(study: Study, scores: Scores, budget: str | None) -> Any:
    """Per task and metric: scores of the samplers against what they cost.

    Seconds are shown only of studies that have a budget in seconds: others may have been run on a
    machine that was doing something else.
    """
    samplers = [label for label, method in study.methods.items() if method.has_sampler]
    costs = {
        task: pd.DataFrame(
            {label: scores.of(task, label, budget)[list(_COSTS)].mean() for label in samplers},
            index=list(_COSTS),
        ).T
        for task in scores.begun(study, budget)
    }
    names = {task: _cost_of(costs[task]) for task in costs}
    is_timed = any(other and other.seconds_of for other in study.budgets)
    tasks = [task for task in costs if names[task] and (is_timed or names[task] != "seconds")]
    if not tasks:
        return None
    picture, panels = _panels(study, tasks, (5.5, 4.2))
    labels = []
    for (task, metric), axis in panels.items():
        reference, name = scores.of(task, study.compare_to, budget), names[task]
        points = {
            label: _point(cost, scores.of(task, label, budget), reference, metric)
            for label, cost in costs[task][name].dropna().items()
        }
        points = {label: point for label, point in points.items() if point is not None}
        for label, (x, mean, half_width, _) in points.items():
            axis.errorbar([x], [mean], yerr=[half_width], fmt="o", capsize=2, alpha=0.8)
            labels.append((axis, label, (x, mean)))
        if points:
            _scale(axis, [point.x for point in points.values()])
        axis.margins(x=0.15, y=0.1)
        axis.set_xlabel(_COSTS[name])
    if not labels:
        return None
    _name_points(picture, labels)
    return picture


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
