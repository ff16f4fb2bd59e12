"""Tables and plots of a benchmark, from its rows alone."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aps_jax.files import write_atomically
from experiments.bench.rows import Row
from experiments.bench.study import METRICS, Study

#: Photo -> metric -> mean over seeds.
Scores = dict[str, dict[str, float]]

_UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "residual": "residual"}
_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3, "residual": 4}
_COSTS = ("denoiser_evaluations", "decoder_evaluations", "gradient_evaluations", "seconds")


class Gain(NamedTuple):
    """Mean paired difference and the half-width of its 95 % confidence interval."""

    mean: float
    half_width: float


def scores_of(rows: Sequence[Row], task: str, method: str, budget: str | None) -> Scores:
    """Scores and costs of each photo, means over seeds; failed restorations are left out."""
    table: dict[str, dict[str, list[float]]] = {}
    wanted = (task, method, budget)
    for row in rows:
        if (row["task"], row["method"], row["budget"]) != wanted or "error" in row:
            continue
        photo = table.setdefault(row["image"], {})
        for name in (*METRICS, *_COSTS):
            if name in row:
                photo.setdefault(name, []).append(row[name])
    return {
        image: {name: float(np.mean(values)) for name, values in photo.items()}
        for image, photo in table.items()
    }


def gain(scores: Scores, reference: Scores, metric: str) -> Gain | None:
    """Difference to the reference on the photos that both have; None for fewer than two.

    The interval is Student's, for differences that are normal over photos.
    """
    pairs = [
        scores[image][metric] - reference[image][metric]
        for image in scores.keys() & reference.keys()
        if metric in scores[image] and metric in reference[image]
    ]
    if len(pairs) < 2:
        return None
    error = np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return Gain(float(np.mean(pairs)), float(stats.t.ppf(0.975, len(pairs) - 1) * error))


def table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown: mean and standard deviation over photos, and the paired gains.

    Scores are means over seeds first, so that photos, not restorations, are counted.
    """
    has_budgets = study.budgets != (None,)
    lines = []
    begun = {(row["task"], row["budget"]) for row in rows}
    for task in study.tasks:
        for budget in study.budgets_of(task):
            if (task, budget.label if budget else None) not in begun:
                continue
            lines += [f"### {task}, {budget.label}" if budget else f"### {task}", ""]
            columns = ["method", "photos", *(_UNITS[metric] for metric in METRICS)]
            columns += ["denoiser evaluations"] * has_budgets + ["decoder evaluations"]
            columns += ["with gradient", "seconds"] * has_budgets
            columns += [f"PSNR gain over {study.compare_to}", "LPIPS gain"]
            lines += [line(columns), "|" + "---|" * len(columns)]
            label = budget.label if budget else None
            reference = scores_of(rows, task, study.compare_to, label)
            for method in study.methods:
                scores = scores_of(rows, task, method, label)
                if not scores:
                    continue
                cells = [method, str(len(scores))]
                cells += [_spread(scores, metric) for metric in METRICS]
                cells += [_cost(scores, "denoiser_evaluations")] * has_budgets
                cells += [_cost(scores, "decoder_evaluations")]
                if has_budgets:
                    cells += [_cost(scores, "gradient_evaluations"), _cost(scores, "seconds", 2)]
                is_reference = method == study.compare_to
                for metric in ("psnr", "lpips"):
                    found = None if is_reference else gain(scores, reference, metric)
                    cells.append(_signed(found, _DIGITS[metric]))
                lines.append(line(cells))
            lines.append("")
    failed = [row for row in rows if "error" in row]
    if failed:
        labels = sorted({f"{row['method']} on {row['task']}" for row in failed})
        lines += [f"Failed restorations, left out: {len(failed)} ({', '.join(labels)}).", ""]
    return "\n".join(lines)


def overview(study: Study, rows: Sequence[Row]) -> str:
    """Markdown, a table per budget: PSNR and LPIPS, means of the reference and gains of others.

    Only gains say how methods compare, since not all of them are run on all photos.
    """
    lines = []
    begun = {row["budget"] for row in rows}
    for budget in study.budgets:
        label = budget.label if budget else None
        if label not in begun:
            continue
        found = {
            (task, method): scores_of(rows, task, method, label)
            for task in _tasks_of(study, label)
            for method in study.methods
        }
        tasks = [task for task in study.tasks if any(found.get((task, m)) for m in study.methods)]
        lines += [f"### {label}", ""] if len(begun) > 1 else []
        lines += [line(["PSNR, dB; LPIPS (photos)", *tasks]), "|" + "---|" * (len(tasks) + 1)]
        for method in sorted(study.methods, key=lambda m: m != study.compare_to):
            if any(found[task, method] for task in tasks):
                references = [found[task, study.compare_to] for task in tasks]
                scores = [found[task, method] for task in tasks]
                is_reference = method == study.compare_to
                cells = [
                    _means(own) if is_reference else _gains(own, reference)
                    for own, reference in zip(scores, references, strict=True)
                ]
                lines.append(line([method, *cells]))
        lines.append("")
    return "\n".join(lines)


def _means(scores: Scores) -> str:
    shown = (_spread(scores, metric).split(" ")[0] for metric in ("psnr", "lpips"))
    return f"{'; '.join(shown)} ({len(scores)})" if scores else "–"


def _gains(scores: Scores, reference: Scores) -> str:
    found = [gain(scores, reference, metric) for metric in ("psnr", "lpips")]
    if found[0] is None:
        return "–"
    psnr, lpips = (_signed(g, _DIGITS[m]) for g, m in zip(found, ("psnr", "lpips"), strict=True))
    return f"{psnr}; {lpips} ({len(scores.keys() & reference.keys())})"


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _spread(scores: Scores, metric: str) -> str:
    values = [photo[metric] for photo in scores.values() if metric in photo]
    if not values:
        return "–"
    digits = _DIGITS[metric]
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _cost(scores: Scores, name: str, digits: int = 0) -> str:
    values = [photo[name] for photo in scores.values() if name in photo]
    return f"{np.mean(values):.{digits}f}" if values else "–"


def _signed(found: Gain | None, digits: int) -> str:
    return "–" if found is None else f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f}"


def plot(study: Study, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plots the gains, and the sweeps where methods have a place `x`; returns the files."""
    paths = []
    for budget in study.budgets:
        label = budget.label if budget else None
        suffix = f"-{label.replace(' ', '_')}" if label else ""
        paths.append(_plot_gains(study, rows, label, folder / f"gains{suffix}.png"))
        if any(method.x is not None for method in study.methods.values()):
            paths.append(_plot_sweep(study, rows, label, folder / f"sweep{suffix}.png"))
    return [path for path in paths if path is not None]


def figure(num_rows: int, num_columns: int, size: tuple[float, float]) -> Any:
    """A figure and its axes [rows, columns], each of `size` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width, height = size
    return plt.subplots(
        num_rows, num_columns, squeeze=False, figsize=(width * num_columns, height * num_rows),
        layout="constrained",
    )  # fmt: skip


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    return path


def _tasks_of(study: Study, budget: str | None) -> list[str]:
    """Tasks that are run under the budget of this label."""
    return [
        task for task in study.tasks
        if any((b.label if b else None) == budget for b in study.budgets_of(task))
    ]  # fmt: skip


def _plot_gains(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per task and metric: the gain of each method, with its interval."""
    found = {}
    begun = {row["task"] for row in rows if row["budget"] == budget}
    tasks = [task for task in _tasks_of(study, budget) if task in begun]
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
            axis.set_title(f"{task}: {_UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
    picture.suptitle(f"gain over {study.compare_to}", fontsize=10)
    return save_figure(picture, path)


def _plot_sweep(study: Study, rows: Sequence[Row], budget: str | None, path: Path) -> Path | None:
    """Per task and metric: scores against `Method.x`, one line per series.

    A point is the mean of the reference plus the paired gain over it, with the 95 % interval of the
    gain: what all photos have in common does not widen it.
    """
    lines: dict[str, list[tuple[float, str]]] = {}
    for method in study.methods.values():
        if method.x is not None:
            lines.setdefault(method.series or "", []).append((method.x, method.label))
    begun = {row["task"] for row in rows if row["budget"] == budget}
    tasks = [task for task in _tasks_of(study, budget) if task in begun]
    if not tasks:
        return None
    picture, axes = figure(len(tasks), 2, (4.5, 3.2))
    is_empty = True
    values = [x for line in lines.values() for x, _ in line]
    for row, task in zip(axes, tasks, strict=True):
        scores = {
            label: scores_of(rows, task, label, budget)
            for points in lines.values() for _, label in points
        }  # fmt: skip
        reference = scores_of(rows, task, study.compare_to, budget)
        most = max(map(len, scores.values()))
        for axis, metric in zip(row, ("psnr", "lpips"), strict=True):
            known = [photo[metric] for photo in reference.values() if metric in photo]
            level = float(np.mean(known)) if known else 0.0
            for series, points in lines.items():
                curve = []
                for x, label in sorted(points):
                    found = gain(scores[label], reference, metric)
                    if found is not None:
                        count = len(scores[label].keys() & reference.keys())
                        curve.append((x, level + found.mean, found.half_width, count))
                if curve:
                    is_empty = False
                    xs, means, errors, counts = zip(*curve, strict=True)
                    line = axis.errorbar(
                        xs, means, yerr=errors, capsize=3, marker="o", label=series
                    )
                    fewer = [(x, y) for x, y, n in zip(xs, means, counts, strict=True) if n < most]
                    if fewer:
                        axis.plot(
                            *zip(*fewer, strict=True), "o", color=line[0].get_color(), mfc="white",
                            zorder=3, label=f"{series}, fewer photos",
                        )  # fmt: skip
            if min(values) > 0 and max(values) >= 20 * min(values):
                axis.set_xscale("log")
            axis.set_xlabel(study.x_label)
            axis.set_title(f"{task}: {_UNITS[metric]}", fontsize=9)
            axis.grid(alpha=0.3)
            if any(lines):
                axis.legend(fontsize=8)
    picture.suptitle(f"intervals are of the gain over {study.compare_to}", fontsize=9)
    return None if is_empty else save_figure(picture, path)
