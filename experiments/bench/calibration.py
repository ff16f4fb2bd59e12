"""Budgets in seconds: how many decoder evaluations of a method take as long as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aps_jax.io.files import write_json
from aps_jax.samplers.budget import decoder_evaluations
from experiments.bench.rows import Row
from experiments.bench.study import Budget

#: Seconds may miss the target by this share before another trial is made.
TOLERANCE = 0.1


class Calibration:
    """A file of decoder evaluations by task, method and budget; found once, then kept.

    Attributes:
      path: the file.
      entries: by name; each holds what it was found from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.entries = {name: dict(e) for name, e in json.loads(path.read_text()).items()}
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{path} is damaged; give --out another folder") from None

    @staticmethod
    def _name(task: str, method: str, budget: str) -> str:
        return " | ".join((task, method, budget))

    def evaluations(self, task: str, method: str, budget: str, source: str) -> int | None:
        """What was found from rows with the fingerprints `source`, or None."""
        entry = self.entries.get(self._name(task, method, budget), {})
        return entry["evaluations"] if entry.get("source") == source else None

    def settle(
        self,
        task: str,
        method: str,
        budget: Budget,
        *,
        source: str,
        under: Budget,
        rows: Sequence[Row],
        make: Callable[[int], Any],
        try_out: Callable[[Any], float],
    ) -> None:
        """Finds and stores the evaluations that take the reference's seconds.

        The rows of the budget `under` give the seconds of the method and of the reference. Where
        they differ by more than `TOLERANCE`, a batch is tried at the number that proportion
        suggests, and where that is still off, the straight line through both decides.

        Args:
          task: label.
          method: label.
          budget: in seconds.
          source: fingerprints of the rows that it is found from.
          under: the budget of those rows, in evaluations.
          rows: all so far.
          make: configuration of the method for a number of evaluations; ValueError if too few.
          try_out: seconds per photo of a configuration.
        """
        name = self._name(task, method, budget.label)
        if self.entries.get(name, {}).get("source") == source:
            return
        target = _mean_seconds(rows, task, budget.seconds_of, under.label)
        own = _mean_seconds(rows, task, method, under.label)
        if target is None or own is None:
            raise ValueError(
                f"budget {budget.label!r} of {method!r} on {task!r} needs the seconds of both "
                f"methods under {under.label!r}, but one has none: check its tasks"
            )
        first = decoder_evaluations(make(under.evaluations))
        tried = [(first, own)]
        if first and abs(own - target) > TOLERANCE * target:
            second, config = _possible(make, first * target / own)
            if second != first:
                tried.append((second, try_out(config)))
        (first, own), (last, seconds) = tried[0], tried[-1]
        if abs(seconds - target) > TOLERANCE * target and seconds != own:
            slope = (seconds - own) / (last - first)
            if slope > 0:
                last, _ = _possible(make, last + (target - seconds) / slope)
        self.entries[name] = {
            "source": source,
            "evaluations": last,
            "target_seconds": round(target, 4),
            "tried": [[count, round(value, 4)] for count, value in tried],
        }
        write_json(self.path, self.entries)


def _mean_seconds(rows: Sequence[Row], task: str, method: str, budget: str) -> float | None:
    wanted = (task, method, budget)
    found = [r["seconds"] for r in rows if (r["task"], r["method"], r["budget"]) == wanted]
    return float(np.mean(found)) if found else None


def _possible(make: Callable[[int], Any], evaluations: float) -> tuple[int, Any]:
    """The nearest number of evaluations from below that a method can run with, and its options."""
    count = max(1, int(evaluations))
    while True:
        try:
            return count, make(count)
        except ValueError:
            count += 1 + count // 8  # Too few for even one step.
