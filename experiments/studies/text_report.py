"""Tables, plot and examples of `experiments.studies.text_rewards`.

Lines of one beginning resemble each other, so intervals are those of a bootstrap over beginnings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.figures import figure, save_figure
from experiments.studies.text_judges import distinct
from experiments.studies.text_methods import LABELS, METHODS

#: Resamples of a bootstrap.
RESAMPLES = 2000


class Looks(NamedTuple):
    """What reward and judges say of N lines, in the order of label, beginning and number.

    Attributes:
      reward: log-probability of the wanted label by the reward [N].
      judged: 1 where the judge sees the wanted label [N].
      nats: -log p by the trigram model [N].
      words: words that this is of, the end included [N].
      texts: the lines.
    """

    reward: np.ndarray
    judged: np.ndarray
    nats: np.ndarray
    words: np.ndarray
    texts: list[str]


def means(looks: Looks) -> dict[str, float]:
    """What is reported of a row, without intervals."""
    return {
        "reward": float(looks.reward.mean()),
        "judged": float(looks.judged.mean()),
        "perplexity": float(np.exp(looks.nats.sum() / looks.words.sum())),
        "distinct_2": distinct(looks.texts),
        "words": float(looks.words.mean()) - 1,
    }


def _resampled(columns: tuple[np.ndarray, ...], each: int) -> tuple[np.ndarray, ...]:
    """Means of columns [N] over resampled beginnings of `each` lines: [RESAMPLES] of each."""
    groups = [column.reshape(-1, each).mean(axis=1) for column in columns]
    number = len(groups[0])
    index = np.random.default_rng(0).integers(number, size=(RESAMPLES, number))
    return tuple(group[index].mean(axis=1) for group in groups)


def half_width(
    columns: tuple[np.ndarray, ...], each: int, value: Callable[..., np.ndarray] = lambda x: x
) -> float:
    """Half of the 95 % interval of a function of means of columns [N]."""
    low, high = np.quantile(value(*_resampled(columns, each)), (0.025, 0.975))
    return float(high - low) / 2


def _perplexity(nats: np.ndarray, words: np.ndarray) -> np.ndarray:
    return np.exp(nats / words)


def _of_split(
    rows: list[dict[str, Any]], looks: list[Looks], split: str
) -> Iterator[tuple[dict[str, Any], Looks]]:
    """Rows of a split and what is said of them, in the order of the methods."""
    for method in METHODS:
        for row, look in zip(rows, looks, strict=True):
            if (row["method"], row["split"]) == (method, split):
                yield row, look


def table(rows: list[dict[str, Any]], looks: list[Looks], split: str, each: int) -> str:
    """Markdown: a line per method and setting of a split, with 95 % intervals.

    Args:
      rows: as written.
      looks: what is said of them.
      split: "tuning", "test" or "contrary".
      each: lines of a beginning.
    """
    columns = ["method", "setting", "log reward", "judged right", "perplexity", "distinct-2",
               "words", "prior calls", "reward calls (with gradient)"]  # fmt: skip
    has_seconds = split != "tuning"  # There they are those of the compilation.
    columns += ["seconds of 64 lines"] if has_seconds else []
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row, look in _of_split(rows, looks, split):
        said, calls = means(look), row["evaluations"]
        setting = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
        width = half_width((look.nats, look.words), each, _perplexity)
        cells = [
            row["method"], setting or "-",
            f"{said['reward']:.2f} ± {half_width((look.reward,), each):.2f}",
            f"{100 * said['judged']:.0f} ± {100 * half_width((look.judged,), each):.0f} %",
            f"{said['perplexity']:.0f} ± {width:.0f}",
            f"{said['distinct_2']:.2f}", f"{said['words']:.1f}", calls["denoiser"],
            f"{calls['decoder'] + calls['decoder_gradient'] - 1} ({calls['decoder_gradient']})",
        ]  # fmt: skip
        cells += [f"{row['seconds']:.1f}"] if has_seconds else []
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def differences(rows: list[dict[str, Any]], looks: list[Looks], split: str, each: int) -> str:
    """Markdown: how much oftener the forms of APS are judged right than the others, in points."""
    found = {row["method"]: look for row, look in _of_split(rows, looks, split)}
    own = [method for method in found if method.startswith("APS")]
    if not own:
        return ""
    text = [
        "Judged right, in points more than the other method on the same beginnings:\n",
        "| than | " + " | ".join(own) + " |", "|" + "---|" * (1 + len(own)),
    ]  # fmt: skip
    for other in (method for method in found if method not in own):
        cells = []
        for method in own:
            gap = 100 * (found[method].judged - found[other].judged)
            cells.append(f"{gap.mean():+.0f} ± {half_width((gap,), each):.0f}")
        text.append(f"| {other} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _frontier(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """The points that have a larger y than all of smaller x, in order."""
    kept: list[tuple[float, float]] = []
    for point in sorted(zip(x, y, strict=True)):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return [a for a, _ in kept], [b for _, b in kept]


def plot(rows: list[dict[str, Any]], looks: list[Looks], path: Path, each: int) -> None:
    """Reward against perplexity of all settings, and judged success against it of those chosen."""
    picture, axes = figure(1, 3, (4.2, 3.8))
    for axis, split in zip(axes[0], ("tuning", "test", "contrary"), strict=True):
        for index, method in enumerate(METHODS):
            own = [look for row, look in _of_split(rows, looks, split) if row["method"] == method]
            if not own:
                continue
            said = [means(look) for look in own]
            x = [score["perplexity"] for score in said]
            style = {"color": f"C{index}", "label": method, "marker": "o", "markersize": 4}
            if split == "tuning":
                y = [score["reward"] for score in said]
                axis.plot(x, y, **style, linestyle="")
                axis.plot(*_frontier(x, y), color=style["color"], linewidth=0.8)
                continue
            bars = [
                [half_width((look.nats, look.words), each, _perplexity) for look in own],
                [100 * half_width((look.judged,), each) for look in own],
            ]
            y = [100 * score["judged"] for score in said]
            axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], elinewidth=0.8, **style, linestyle="")
        axis.set_xlabel("perplexity under the trigram model")
        axis.grid(alpha=0.3, which="both")
    titles = ("all settings, prompts of tuning", "chosen settings, test", "chosen, contrary")
    labels = ("log reward", "judged right (%)", "judged right (%)")
    for axis, title, label in zip(axes[0], titles, labels, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(label)
    axes[0][2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(picture, path)


def examples(rows: list[dict[str, Any]], each: int, count: int = 2) -> str:
    """Markdown: the first lines of the first beginnings of every method on the test, unchosen."""
    text = []
    for method in METHODS:
        for row in rows:
            if (row["method"], row["split"]) != (method, "test"):
                continue
            text.append(f"\n**{method}**\n")
            for number, label in enumerate(LABELS):
                pairs = zip(row["lines"], row["wanted"], strict=True)
                own = [line for line, wanted in pairs if wanted == number]
                text += [f"- {label}: {line}" for line in own[::each][:count]]
    return "\n".join(text) + "\n"
