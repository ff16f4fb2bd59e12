"""Tables of a benchmark, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from experiments.bench.rows import Row
from experiments.bench.study import METRICS, Study
from experiments.tables import markdown

UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "residual": "residual"}
_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3, "residual": 4}
_SHOWN = ("psnr", "lpips")
_COSTS = {
    "denoiser_evaluations": "denoiser evaluations",
    "decoder_evaluations": "decoder evaluations",
    "gradient_evaluations": "with gradient",
    "flops": "GFLOPs",
    "seconds": "seconds",
}
_SCALES = {"flops": 1e9}
_CELL = ["task", "method", "budget"]


class Gain(NamedTuple):
    """A mean, mostly of paired differences, and the half-width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def shown(self, digits: int) -> str:
        """With its sign and so many digits."""
        return f"{self.mean:+.{digits}f} ± {self.half_width:.{digits}f}"


class Scores:
    """Scores and costs of all photos, means over seeds; failed restorations are left out.

    Attributes:
      rows: of the log.
      budgets: labels of those that have rows, in their order; None without budgets.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.budgets = list(dict.fromkeys(row["budget"] for row in rows))
        found = pd.DataFrame([row for row in rows if "error" not in row])
        found = found.reindex(columns=[*_CELL, "image", *METRICS, *_COSTS]).astype(
            dict.fromkeys((*METRICS, *_COSTS), float)
        )
        means = found.groupby([*_CELL, "image"], dropna=False, sort=False).mean()
        groups = means.reset_index().groupby(_CELL, dropna=False, sort=False)
        self._cells = {
            (task, method, None if pd.isna(budget) else budget): photos.set_index("image")
            for (task, method, budget), photos in groups
        }
        self._none = means.reset_index(_CELL).iloc[:0]

    def of(self, task: str, method: str, budget: str | None) -> pd.DataFrame:
        """Scores and costs by photo; empty if there are none."""
        return self._cells.get((task, method, budget), self._none)

    def begun(self, study: Study, budget: str | None) -> list[str]:
        """Tasks of a study with rows under the budget of this label."""
        begun = {row["task"] for row in self.rows if row["budget"] == budget}
        return [
            task for task in study.tasks
            if task in begun and any((b and b.label) == budget for b in study.budgets_of(task))
        ]  # fmt: skip


def gain(scores: pd.DataFrame, reference: pd.DataFrame, metric: str) -> Gain | None:
    """Difference to the reference on the photos that both have; None for fewer than two."""
    return interval((scores[metric] - reference[metric]).dropna())


def interval(values: Sequence[float] | pd.Series) -> Gain | None:
    """Mean and Student's interval, for values normal over photos; None for fewer than two."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Gain(float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * error))


def table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown: mean and standard deviation over photos, and the paired gains.

    Scores are means over seeds first, so that photos, not restorations, are counted.
    """
    scores = Scores(rows)
    costs = list(_COSTS) if study.budgets != (None,) else ["decoder_evaluations"]
    if not any("flops" in row for row in rows):  # Rows of before they were counted.
        costs = [name for name in costs if name != "flops"]
    begun = {(row["task"], row["budget"]) for row in rows}
    parts = []
    for task in study.tasks:
        for budget in study.budgets_of(task):
            label = budget and budget.label
            if (task, label) not in begun:
                continue
            lines = [
                _line(method, scores.of(task, method, label), reference, costs, study.compare_to)
                for reference in [scores.of(task, study.compare_to, label)]
                for method in study.methods
                if len(scores.of(task, method, label))
            ]
            if lines:
                title = f"{task}, {label}" if label else task
                parts.append(f"### {title}\n\n{markdown(pd.DataFrame(lines))}\n")
    failed = [row for row in rows if "error" in row]
    if failed:
        labels = sorted({f"{row['method']} on {row['task']}" for row in failed})
        parts.append(f"Failed restorations, left out: {len(failed)} ({', '.join(labels)}).\n")
    return "\n".join(parts)


def _line(
    method: str, own: pd.DataFrame, reference: pd.DataFrame, costs: list[str], compare_to: str
) -> dict[str, str | None]:
    """A line of the table by the heads of its columns."""
    gains = {m: None if own is reference else gain(own, reference, m) for m in _SHOWN}
    psnr, lpips = (found and found.shown(_DIGITS[m]) for m, found in gains.items())
    return (
        {"method": method, "photos": str(len(own))}
        | {UNITS[metric]: spread(own[metric], _DIGITS[metric]) for metric in METRICS}
        | {
            _COSTS[name]: _mean(own[name] / _SCALES.get(name, 1), 2 if name == "seconds" else 0)
            for name in costs
        }
        | {f"PSNR gain over {compare_to}": psnr, "LPIPS gain": lpips}
    )


def overview(study: Study, rows: Sequence[Row]) -> str:
    """Markdown, a table per budget: PSNR and LPIPS, means of the reference and gains of others.

    Only gains say how methods compare, since not all of them are run on all photos.
    """
    scores = Scores(rows)
    methods = sorted(study.methods, key=lambda method: method != study.compare_to)
    parts = []
    for budget in study.budgets:
        label = budget and budget.label
        if label not in scores.budgets:
            continue
        lines = []
        for method in methods:
            found = {task: scores.of(task, method, label) for task in scores.begun(study, label)}
            if any(map(len, found.values())):
                references = (scores.of(task, study.compare_to, label) for task in found)
                cells = map(_short, found.values(), references)
                head = {"PSNR, dB; LPIPS (pictures)": method}
                lines.append(head | dict(zip(found, cells, strict=True)))
        title = [f"### {label}\n"] if len(scores.budgets) > 1 else []
        parts.append("\n".join([*title, markdown(pd.DataFrame(lines)), ""]))
    return "\n".join(parts)


def _short(own: pd.DataFrame, reference: pd.DataFrame) -> str | None:
    """Means of the reference, gains of another method; None where there are none."""
    if own is reference:
        shown = [_mean(own[metric], _DIGITS[metric]) or "–" for metric in _SHOWN]
        return f"{'; '.join(shown)} ({len(own)})" if len(own) else None
    gains = [gain(own, reference, metric) for metric in _SHOWN]
    if gains[0] is None:
        return None
    shown = [g.shown(_DIGITS[m]) if g else "–" for g, m in zip(gains, _SHOWN, strict=True)]
    return f"{'; '.join(shown)} ({len(own.index.intersection(reference.index))})"


def spread(values: pd.Series, digits: int) -> str | None:
    """Mean and standard deviation; None if all are missing."""
    mean = _mean(values, digits)
    return mean and f"{mean} ± {values.std(ddof=0):.{digits}f}"


def _mean(values: pd.Series, digits: int) -> str | None:
    return f"{values.mean():.{digits}f}" if values.notna().any() else None
