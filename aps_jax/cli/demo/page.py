"""Words and small drawings of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aps_jax.cli.demo.runs import Moment
from aps_jax.cli.progress import told
from aps_jax.cli.verdict import verdict

CSS = """
.aps-status { padding: 4px 2px; }
.aps-status progress { width: 100%; height: 12px; accent-color: #2a6fdb; }
.aps-status svg { display: block; width: 100%; height: 56px; }
.aps-status polyline { fill: none; stroke: #2a6fdb; stroke-width: 2; }
"""
_WIDTH, _HEIGHT = 300, 50


def status(moment: Moment, losses: Sequence[float]) -> str:
    """A bar, where the run is, and the losses so far as a curve."""
    report = moment.report
    if report is None:
        return _box("", f"waiting, reading or compiling, {told(moment.seconds)} so far")
    if not report.num_done:
        where = f"compiling the timestep, {told(moment.seconds)} so far"
        return _box(_bar(0, report.num_steps), where)
    parts = [f"timestep {report.num_done} of {report.num_steps}"]
    if math.isfinite(report.loss):
        parts.append(f"loss {report.loss:.4g}")
    parts.append(f"{report.num_masked:.0f} tokens masked")
    left = "" if moment.seconds_left is None else f", about {told(moment.seconds_left)} left"
    parts.append(f"{told(moment.seconds)} so far{left}")
    bar = _bar(report.num_done, report.num_steps)
    return _box(bar, " · ".join(parts), _curve(losses, report.num_steps))


def finished(record: Mapping[str, Any]) -> str:
    """What the bar says at the end."""
    return _box(_bar(1, 1), f"done after {told(record['seconds']['total'])}")


def stopped() -> str:
    """What the bar says after Stop."""
    return _box("", "stopped; the computation ends after the timestep that it was at")


def table(record: Mapping[str, Any]) -> str:
    """Scores, the verdict, notes and the command that repeats the run, as Markdown."""
    scores = record.get("metrics") or record.get("figures") or {}
    lines = []
    if scores:
        columns = list(next(iter(scores.values())))
        names = [column.replace("_", " ") for column in columns]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in scores.items():
            cells = ["–" if row[c] is None else f"{row[c]:.3f}" for c in columns]
            lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
        lines.append("")
    if record.get("metrics"):
        lines += [verdict(record["metrics"]), ""]
    lines += [f"Note: {note}.\n" for note in record.get("notes") or ()]
    return "\n".join([*lines, "```", record["command"], "```"])


def _box(*parts: str) -> str:
    return f'<div class="aps-status">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _bar(done: int, of: int) -> str:
    return f'<progress max="{of}" value="{done}"></progress>'


def _curve(losses: Sequence[float], of: int) -> str:
    """The losses on a logarithmic scale where they are positive."""
    kept = [loss for loss in losses if math.isfinite(loss)]
    if len(kept) < 2:
        return ""
    values = [math.log(loss) for loss in kept] if min(kept) > 0 else kept
    low, high = min(values), max(values)
    points = " ".join(
        f"{_WIDTH * index / max(of - 1, 1):.1f},"
        f"{3 + (_HEIGHT - 6) * (high - value) / max(high - low, 1e-12):.1f}"
        for index, value in enumerate(values)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="loss by timestep"><polyline points="{points}"/></svg>'
    )
