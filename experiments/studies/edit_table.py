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

#: The method that others are compared with, on the same faces.
REFERENCE = "prompt, guidance and reward (APS)"


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
    """Markdown: all edits together, then a part per case.

    Args:
      found: the rows.
      judged: the judge's logits by `key_of` a row; rows without one count elsewhere only.
    """
    found = list(found)
    parts = [("all edits", found)]
    parts += [(case, [row for row in found if row["case"] == case]) for case in CASES]
    text = []
    for title, mine in parts:
        chosen = {
            method: [row for row in mine if row["method"] == method]
            for method in (*UNTOUCHED, *METHODS)
        }
        lines = [
            {"method": method, "faces": str(len(some))}
            | _success(some, chosen[REFERENCE], judged)
            | _cost(method, some)
            for method, some in chosen.items()
            if some
        ]
        if lines:
            text.append(f"### {title}\n\n{markdown(pd.DataFrame(lines))}\n")
    return "\n".join(text)


def _success(
    some: Sequence[rows.Row], others: Sequence[rows.Row], judged: Mapping[str, float]
) -> dict[str, str | None]:
    """How often the wish is fulfilled, and on how many faces more or fewer than by `REFERENCE`."""
    verdicts, theirs = _verdicts(some, judged), _verdicts(others, judged)
    shared = verdicts.keys() & theirs.keys()
    gains = [100.0 * (verdicts[face] - theirs[face]) for face in shared]
    gain = None if some is others else summary.interval(gains)
    believed = np.mean([CASES[row["case"]].is_fulfilled(row["reward"]) for row in some])
    return {
        "judged a success, % (95 %)": _share(list(verdicts.values())),
        "more than APS with all": gain and gain.shown(0),
        "the reward says so, %": f"{100 * believed:.0f}",
    }


def _verdicts(some: Sequence[rows.Row], judged: Mapping[str, float]) -> dict[tuple[str, str], bool]:
    return {
        (row["case"], row["image"]): bool(CASES[row["case"]].is_fulfilled(judged[key_of(row)]))
        for row in some
        if key_of(row) in judged
    }


def _cost(method: str, some: Sequence[rows.Row]) -> dict[str, str | None]:
    """What an edit costs the rest of the picture, and the computer."""
    is_edit = method in METHODS
    cells = {
        "outside the box, dB": [row["outside"] for row in some],
        "less the codec's": [row["outside"] - row["codec_outside"] for row in some],
        "moved there, dB": [row["moved"] for row in some],
    }
    known = {
        name: _mean(values, 2) if is_edit or (method, name) == ("codec", "outside the box, dB")
        else None
        for name, values in cells.items()
    }  # fmt: skip
    return known | {
        "LPIPS": _mean([row["lpips"] for row in some], 3),
        "decoder runs": str(decoder_evaluations(config_of(METHODS[method]))) if is_edit else None,
        "seconds": f"{np.mean([row['seconds'] for row in some]):.1f}" if is_edit else None,
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
