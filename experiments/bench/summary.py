"""Tables of a benchmark, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.bench.rows import Row
from experiments.bench.study import METRICS, Study

#: Photo -> metric -> mean over seeds.
Scores = dict[str, dict[str, float]]

UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "residual": "residual"}
_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3, "residual": 4}
_COSTS = ("denoiser_evaluations", "decoder_evaluations", "gradient_evaluations", "seconds")


class Gain(NamedTuple):
    """A mean, mostly of paired differences, and the half-width of its 95 % confidence interval."""

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
    """Difference to the reference on the photos that both have; None for fewer than two."""
    pairs = [
        scores[image][metric] - reference[image][metric]
        for image in scores.keys() & reference.keys()
        if metric in scores[image] and metric in reference[image]
    ]
    return interval(pairs)


def interval(values: Sequence[float]) -> Gain | None:
    """Mean and Student's interval, for values normal over photos; None for fewer than two."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Gain(float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * error))


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
            columns = ["method", "photos", *(UNITS[metric] for metric in METRICS)]
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
            for task in tasks_of(study, label)
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


def tasks_of(study: Study, budget: str | None) -> list[str]:
    """Tasks that are run under the budget of this label."""
    return [
        task for task in study.tasks
        if any((b.label if b else None) == budget for b in study.budgets_of(task))
    ]  # fmt: skip
