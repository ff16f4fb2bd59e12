"""The table of the edits, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from aps_jax.io import rows
from aps_jax.samplers.budget import decoder_evaluations
from experiments.bench import summary
from experiments.studies.edit_methods import CASES, METHODS, UNTOUCHED, config_of


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = float(stats.norm.ppf(0.975))
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return centre - half, centre + half


def key_of(row: rows.Row) -> str:
    """What tells a row from all others."""
    return f"{row['case']}|{row['method']}|{row['image']}"


def table(found: Iterable[rows.Row], judged: Mapping[str, float]) -> str:
    """Markdown, a part per case.

    Args:
      found: the rows.
      judged: the judge's logits by `key_of` a row; rows without one count elsewhere only.
    """
    found = list(found)
    lines = []
    for case in CASES:
        mine = [row for row in found if row["case"] == case]
        if not mine:
            continue
        lines += [f"### {case}", ""]
        heads = [
            "method", "faces", f"judged “{CASES[case].attribute}”, % (95 %)",
            "the reward network says so, %", "outside the box, dB (95 %)",
            "codec alone, dB", "LPIPS to the original (95 %)", "decoder evaluations", "seconds",
        ]  # fmt: skip
        lines += [summary.line(heads), "|" + "---|" * len(heads)]
        for method in (*UNTOUCHED, *METHODS):
            chosen = [row for row in mine if row["method"] == method]
            if chosen:
                lines.append(summary.line(_cells(method, chosen, judged)))
        lines.append("")
    return "\n".join(lines)


def _cells(method: str, chosen: Sequence[rows.Row], judged: Mapping[str, float]) -> list[str]:
    verdicts = [judged[key_of(row)] > 0 for row in chosen if key_of(row) in judged]
    believed = np.mean([row["reward"] > 0 for row in chosen])
    is_edit = method in METHODS
    cost = decoder_evaluations(config_of(METHODS[method])) if is_edit else 0
    return [
        method,
        str(len(chosen)),
        _share(verdicts),
        f"{100 * believed:.0f}",
        _mean([row["outside"] for row in chosen], 2) if method != "original" else "–",
        f"{np.mean([row['codec_outside'] for row in chosen]):.2f}",
        _mean([row["lpips"] for row in chosen], 3),
        str(cost) if is_edit else "–",
        f"{np.mean([row['seconds'] for row in chosen]):.1f}" if is_edit else "–",
    ]


def _share(verdicts: Sequence[bool]) -> str:
    if not verdicts:
        return "–"
    low, high = wilson(sum(verdicts), len(verdicts))
    return f"{100 * np.mean(verdicts):.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _mean(values: Sequence[float], digits: int) -> str:
    found = summary.interval(values)
    if found is None:
        return f"{np.mean(values):.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"
