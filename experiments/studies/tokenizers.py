"""What the tokenizer is worth: codebooks of one rate, each with a prior of its own.

    python -m experiments.tokenizers --data FACES --eval-data HELD_OUT --runs runs/tokenizers \
        --out experiments/results/tokenizers

Codecs that differ in their codebook alone are trained on the same small faces for the same steps,
then a prior on the tokens of each. Of held-out faces the rows have the reconstruction, the bits of
the prior's bound, and restorations with and without the prior; and on some tasks those of other
estimators of the gradient than the quantized expectation.

What is trained lies in `--runs`; rows are appended to `OUT/rows.jsonl` cell by cell. The same
command does only what is missing, and `--minutes` ends it between two cells.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import aps_jax
from aps_jax import images
from aps_jax.io import rows
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import Model
from experiments import photos
from experiments.command import command
from experiments.studies import tokenizer_models, tokenizer_report, tokenizer_rows
from experiments.studies.tokenizer_models import Plan

CONFIG = Path(__file__).with_suffix(".json")
#: The label of what needs no model.
NO_MODEL = "none"
NEEDED = ("tokenizer", "task", "method", "image")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows and the table.
      data: folder of faces to train on; not needed with `--table`.
      eval_data: folder of held-out faces; likewise.
      runs: folder of the trainings.
      config: JSON file of the study.
      minutes: stop after so many minutes; the same command goes on. 0 for no limit.
      table: only rewrite the table.
    """

    out: Path
    data: Path | None = None
    eval_data: Path | None = None
    runs: Path = Path("runs/tokenizers")
    config: Path = CONFIG
    minutes: float = 0.0
    table: bool = False


class Session:
    """Computes the missing rows of a study.

    Attributes:
      plan: the study.
      out: folder of the rows.
      runs: folder of the trainings.
      crops: held-out faces.
      bits_of: more of them, for the prior's bound.
      deadline: when to stop, on the monotonic clock.
    """

    def __init__(self, plan: Plan, arguments: Arguments, deadline: float | None) -> None:
        self.plan, self.out, self.runs = plan, arguments.out, arguments.runs
        assert arguments.eval_data is not None  # `main` has looked.
        faces = {"size": plan.size, "shrink": plan.shrink}
        self.crops = photos.evaluation_crops(arguments.eval_data, count=plan.faces, **faces)
        self.bits_of = photos.evaluation_crops(
            arguments.eval_data, count=plan.prior.get("num_eval", 128), **faces
        )
        self.deadline = deadline
        self.done = {
            (row["tokenizer"], row["task"], row["method"])
            for row in rows.read(self.out / "rows.jsonl", NEEDED)
        }
        self.perceptual = tokenizer_rows.perceptual_or_none()

    def run(self, label: str, tasks: Sequence[str]) -> None:
        """Cells of a tokenizer: what its models are worth, then these tasks."""
        if self._lacks(label, "bits", ["prior"]) and not self._is_late():
            self._models(label, tokenizer_rows.load(self.runs, label))
        for task in tasks:
            if self._lacks(NO_MODEL, task, ["smooth estimate"]) and not self._is_late():
                found = tokenizer_rows.smoothed(self.plan, task, self.crops, self.perceptual)
                self._keep(NO_MODEL, found)
            self._restore(label, task)

    def _models(self, label: str, model: Model) -> None:
        found = [tokenizer_rows.facts(model)]
        found += tokenizer_rows.reconstructed(model.codec, self.crops, self.perceptual)
        found += tokenizer_rows.bits_per_pixel(model, self.bits_of, self.plan.seed)
        self._keep(label, found)

    def _restore(self, label: str, task: str) -> None:
        missing = self._lacks(label, task, tokenizer_rows.methods_on(self.plan, task))
        if not missing or self._is_late():
            return
        model = tokenizer_rows.load(self.runs, label)
        for method in missing:
            if self._is_late():
                return
            found, restored = tokenizer_rows.restored(
                self.plan, task, method, model, self.crops, self.perceptual
            )
            self._keep(label, found)
            grid = np.concatenate(list(np.clip(restored, -1, 1)), axis=1)
            name = "_".join((label, task, method)).replace(" ", "_").replace(",", "")
            images.save_image(self.runs / "pictures" / f"{name}.png", grid)

    def _lacks(self, label: str, task: str, methods: list[str]) -> list[str]:
        return [method for method in methods if (label, task, method) not in self.done]

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _keep(self, label: str, found: list[dict[str, Any]]) -> None:
        rows.append(self.out / "rows.jsonl", [{"tokenizer": label} | row for row in found])
        last = found[-1]
        self.done.add((label, last["task"], last["method"]))
        print(f"{label}: {last['task']}, {last['method']}", flush=True)


@command("tokenizers", after_interrupt="run the same command to go on")
def main(arguments: Arguments) -> int:
    """Trains and restores what is missing, then writes the table; returns the exit code."""
    plan = tokenizer_models.load(arguments.config)
    log = arguments.out / "rows.jsonl"
    if not arguments.table:
        if arguments.data is None or arguments.eval_data is None:
            raise ValueError("--data and --eval-data are needed; name folders of aligned faces")
        deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
        paths = arguments.data, arguments.eval_data, arguments.runs
        with rows.alone(log):
            identity = {"version": aps_jax.__version__} | plan.model_dump(mode="json")
            rows.claim(arguments.out / "run.json", identity)
            for label in plan.tokenizers:
                if not tokenizer_models.train(plan, label, *paths, deadline):
                    print("stopped in a training; run the same command to go on", flush=True)
                    break
                Session(plan, arguments, deadline).run(label, list(plan.tasks)[:-1])
            else:  # The last task comes when everything else is there.
                session = Session(plan, arguments, deadline)
                for label in plan.tokenizers:
                    session.run(label, list(plan.tasks)[-1:])
    found = rows.read(log, NEEDED)
    if not found:
        raise ValueError(f"{log} has no rows; leave out --table and give --data")
    text = tokenizer_report.tables(plan, found)
    write_atomically(arguments.out / "table.md", text.encode())
    print(text)
    return 0
