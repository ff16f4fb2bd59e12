"""The table of the edits, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from aps_jax.io import rows
from aps_jax.samplers.budget import decoder_evaluations
from experiments.bench import summary
from experiments.studies.edit_methods import CASES, METHODS, UNTOUCHED, config_of
from experiments.tables import markdown


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
    parts = []
    for case in CASES:
        mine = [row for row in found if row["case"] == case]
        by_method = {
            method: [row for row in mine if row["method"] == method]
            for method in (*UNTOUCHED, *METHODS)
        }
        lines = [
            _cells(method, chosen, judged, CASES[case].attribute)
            for method, chosen in by_method.items()
            if chosen
        ]
        if lines:
            parts.append(f"### {case}\n\n{markdown(pd.DataFrame(lines))}\n")
    return "\n".join(parts)


def _cells(
    method: str, chosen: Sequence[rows.Row], judged: Mapping[str, float], attribute: str
) -> dict[str, str | None]:
    """A line by the heads of its columns."""
    verdicts = [judged[key_of(row)] > 0 for row in chosen if key_of(row) in judged]
    believed = np.mean([row["reward"] > 0 for row in chosen])
    is_edit = method in METHODS
    outside = _mean([row["outside"] for row in chosen], 2) if method != "original" else None
    cost = str(decoder_evaluations(config_of(METHODS[method]))) if is_edit else None
    seconds = f"{np.mean([row['seconds'] for row in chosen]):.1f}" if is_edit else None
    return {
        "method": method,
        "faces": str(len(chosen)),
        f"judged “{attribute}”, % (95 %)": _share(verdicts),
        "the reward says so, %": f"{100 * believed:.0f}",
        "outside the box, dB": outside,
        "the codec there, dB": f"{np.mean([row['codec_outside'] for row in chosen]):.2f}",
        "LPIPS to the original": _mean([row["lpips"] for row in chosen], 3),
        "decoder evaluations": cost,
        "seconds": seconds,
    }


def _share(verdicts: Sequence[bool]) -> str | None:
    if not verdicts:
        return None
    low, high = wilson(sum(verdicts), len(verdicts))
    return f"{100 * np.mean(verdicts):.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _mean(values: Sequence[float], digits: int) -> str:
    found = summary.interval(values)
    if found is None:
        return f"{np.mean(values):.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"
