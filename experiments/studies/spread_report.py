"""Table and plots of `experiments.spread`, from its rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aps_jax.io.rows import Row
from experiments.bench import summary
from experiments.figures import figure, save_figure
from experiments.studies.spread_measures import rank_correlation
from experiments.tables import markdown


def agreement(found: Iterable[Row]) -> tuple[list[float], summary.Gain | None]:
    """Rank correlations, per photo, of its samples' overlap and PSNR; their mean and interval."""
    values = [rank_correlation(row["sample_overlap"], row["sample_psnr"]) for row in found]
    values = [value for value in values if value is not None]
    return values, summary.interval(values)


def _groups(found: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by task and method, in the order in which they were computed."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        groups.setdefault(row["task"], {}).setdefault(row["method"], []).append(row)
    return groups


def table(found: Sequence[Row]) -> str:
    """Markdown: means and standard deviations over photos, by task."""
    return "\n".join(
        f"### {task}\n\n{markdown(pd.DataFrame([_line(*item) for item in methods.items()]))}\n"
        for task, methods in _groups(found).items()
    )


def _line(method: str, rows: list[Row]) -> dict[str, str | None]:
    means = pd.DataFrame([row["psnr_of_means"] for row in rows])
    own = pd.DataFrame(rows)
    most = max(means.columns, key=int)
    values, mean = agreement(rows)
    fewer = f" ({len(values)})" if len(values) < len(rows) else ""
    ratio = summary.spread(own["predicted"] / own["error"], 2)
    lpips = {"LPIPS of a sample": "sample_lpips", "LPIPS of the mean": "mean_lpips"}
    lpips = {title: summary.spread(own[name], 3) for title, name in lpips.items() if name in own}
    # The photos' own table, which is older, has neither.
    extra = lpips | {"predicted over real error": ratio} if lpips else {}
    return {
        "method": method,
        "photos": str(len(rows)),
        "PSNR of a sample, dB": summary.spread(means["1"], 2),
        f"PSNR of the mean of {most}, dB": summary.spread(means[most], 2),
        **extra,
        "predicted error": summary.spread(own["predicted"], 3),
        "error": summary.spread(own["error"], 3),
        "rank correlation": summary.spread(own["correlation"], 2),
        "overlap of anchors": summary.spread(own["overlap"], 2),
        "overlap and PSNR of a photo's samples, 95 %": mean and mean.shown(2) + fewer,
    }


def _panels(found: Sequence[Row], title: str, height: float) -> tuple[Any, list[Any]]:
    """A figure and, for each task, its axis and the rows of its methods."""
    groups = _groups(found)
    picture, axes = figure(1, len(groups), (5, height))
    for axis, task in zip(axes[0], groups, strict=True):
        axis.set_title(title.format(task=task), fontsize=9)
        axis.grid(alpha=0.3)
    return picture, list(zip(axes[0], groups.values(), strict=True))


def plot_calibration(found: Sequence[Row], path: Path) -> None:
    """Error against predicted error, pooled over photos; the diagonal is calibration."""
    picture, panels = _panels(found, "{task}", 4.5)
    for axis, methods in panels:
        for method, rows in methods.items():
            pixels, predicted, error = (
                np.sum([row[name] for row in rows], axis=0)
                for name in ("pixels", "squared_predicted", "squared_error")
            )
            # Fewer pixels than these say nothing.
            is_full = pixels >= 100
            x, y = (np.sqrt(sums[is_full] / pixels[is_full]) for sums in (predicted, error))
            axis.plot(x, y, marker="o", markersize=4, label=method)
        limit = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, limit], [0, limit], color="grey", linewidth=1, linestyle="--")
        axis.set_xlabel("predicted error (spread of the samples)")
        axis.set_ylabel("error of their mean")
        axis.legend(fontsize=8)
    save_figure(picture, path)


def gains_of_means(found: Iterable[Row]) -> list[tuple[int, float, float]]:
    """By n: n, the mean PSNR of the mean of n samples, the interval of its gain over n = 1."""
    scores = pd.DataFrame([row["psnr_of_means"] for row in found])
    curve = []
    for n in sorted(scores.columns, key=int):
        between = summary.interval(scores[n] - scores["1"])
        curve.append((int(n), float(scores[n].mean()), between.half_width if between else 0.0))
    return curve


def plot_samples(found: Sequence[Row], path: Path) -> None:
    """PSNR of the mean of n samples against n, with intervals of the gain over one sample."""
    picture, panels = _panels(found, "{task}: PSNR, dB", 4)
    for axis, methods in panels:
        for method, rows in methods.items():
            xs, means, errors = zip(*gains_of_means(rows), strict=True)
            axis.errorbar(xs, means, yerr=errors, marker="o", capsize=3, label=method)
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, xs)
        axis.legend(fontsize=8)
        axis.set_xlabel("samples in the mean")
    picture.suptitle("intervals are of the gain over one sample", fontsize=9)
    save_figure(picture, path)
