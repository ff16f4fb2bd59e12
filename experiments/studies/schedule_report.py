"""Tables of `experiments.schedules`, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from aps_jax.io.rows import Row
from experiments.bench import summary
from experiments.tables import markdown

_DIGITS = {"psnr": 2, "lpips": 3}


def tables(plan: Any, rows: Sequence[Row]) -> str:
    """Markdown: rules by task, the rule chosen for each, and the anchors."""
    frame = pd.DataFrame([row for row in rows if row["split"] != "shadow"])
    cells = {
        cell: part.set_index("image") for cell, part in frame.groupby(["split", "task", "rule"])
    }
    tasks = [task for task in plan.tasks if any(cell[1] == task for cell in cells)]
    reference = next(iter(plan.rules))
    head = (
        f"Sigma {plan.sigma:g}, seed {plan.seed}; ± is the half-width of a 95 % interval over "
        f"faces, gains are paired, over {reference}.\n"
    )
    lines = [
        {"rule (PSNR, dB; LPIPS)": rule}
        | {task: _cell(cells, task, rule, reference) for task in tasks}
        for rule in plan.rules
    ]
    parts = [head, f"### Rules, {plan.faces} faces\n\n{markdown(pd.DataFrame(lines))}\n"]
    chosen = [_chosen(cells, plan, task, reference) for task in tasks]
    if any(chosen):
        title = f"### Chosen by task on {plan.tuning_faces} other faces"
        parts.append(f"{title}\n\n{markdown(pd.DataFrame([c for c in chosen if c]))}\n")
    anchors = [row for row in rows if row["split"] == "shadow"]
    if anchors:
        title = f"### Tokens whose last proposal is another one, {plan.faces} faces"
        parts.append(f"{title}\n\n{markdown(pd.DataFrame(_anchors(anchors)))}\n")
    return "\n".join(parts)


def _cell(cells: dict[Any, pd.DataFrame], task: str, rule: str, reference: str) -> str | None:
    own, other = (cells.get(("test", task, name)) for name in (rule, reference))
    if own is None or other is None:
        return None
    metrics = [metric for metric in _DIGITS if metric in own]
    if rule == reference:
        return "; ".join(f"{own[metric].mean():.{_DIGITS[metric]}f}" for metric in metrics)
    gains = [(summary.gain(own, other, metric), _DIGITS[metric]) for metric in metrics]
    return "; ".join(gain.shown(digits) for gain, digits in gains if gain)


def _chosen(
    cells: dict[Any, pd.DataFrame], plan: Any, task: str, reference: str
) -> dict[str, str | None] | None:
    means = {
        rule: cells[("tuning", task, rule)]["psnr"].mean()
        for rule in plan.rules
        if ("tuning", task, rule) in cells
    }
    if len(means) < len(plan.rules):
        return None
    best = max(means, key=lambda rule: means[rule])
    return {
        "task": task,
        "best on the faces for tuning": best,
        "its gain there, dB": f"{means[best] - means[reference]:+.2f}",
        "its gain on the others: dB; LPIPS": (
            "none: it is the reference"
            if best == reference
            else _cell(cells, task, best, reference)
        ),
    }


def _anchors(rows: Sequence[Row]) -> list[dict[str, str | None]]:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        for group in ("anchors", "standard", "all open"):
            shares = np.array([row[group] for row in own], float)
            line: dict[str, str | None] = {"task": task, "tokens": _GROUPS[group]}
            for step in range(shares.shape[1] - 1):
                found = summary.interval(100 * shares[:, step][~np.isnan(shares[:, step])])
                line[f"step {step + 1}, %"] = found and f"{found.mean:.0f} ± {found.half_width:.0f}"
            lines.append(line)
    return lines


_GROUPS = {
    "anchors": "anchors, by the tilted confidence",
    "standard": "as many, by the prior's confidence",
    "all open": "all that are open",
}
