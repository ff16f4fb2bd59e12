"""When which tokens are fixed, chosen by task on other faces; and whether anchors stay right.

    python -m experiments.schedules --data HELD_OUT --out experiments/results/schedules

Counts and thresholds, falling or fixed, and two rules that look at what the measurement says of
each token, all from one compiled sampler. The rule of a task is the one with the best mean PSNR on
faces for tuning, and what it is worth is measured on others.

Anchors never change, so a second run shows what they would become: it chooses anchors and tells the
prior, but goes on optimising all tokens. The share of anchors whose last proposal is another one
says how stable they are.

Rows are appended to `OUT/rows.jsonl` cell by cell; the same command does only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

import aps_jax
from aps_jax.config import APSConfig
from aps_jax.io import rows
from aps_jax.io.files import write_atomically
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.pretrained import load_pretrained, model_folder
from aps_jax.types import Array, Key, Params
from experiments import photos
from experiments.bench import restoring
from experiments.bench.identity import model_facts
from experiments.bench.settings import Count, Index, Settings, Sigma, in_one_line
from experiments.command import command
from experiments.photos import Crops
from experiments.studies import schedule_report
from experiments.studies.schedule_rules import Rule, changes, numbers, sample, shadow
from experiments.studies.tokenizer_rows import perceptual_or_none

CONFIG = Path(__file__).with_suffix(".json")
NEEDED = ("split", "task", "rule", "image")


class Plan(Settings):
    """The whole study.

    Attributes:
      model: embedded model or folder.
      size: side of the faces in pixels.
      faces: held-out faces, spread evenly over their folder.
      tuning_faces: other ones that the rules are chosen on.
      sigma: noise standard deviation.
      seed: of operators, noise and sampling.
      options: of `aps_jax.presets.make_config`.
      tasks: options of operators, by label; `task` is the operator's name.
      rules: by label; the first is the reference.
    """

    model: str
    size: Count
    faces: Count
    tuning_faces: Count
    sigma: Sigma
    seed: Index
    options: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    rules: dict[str, Rule]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows and the table.
      data: folder of held-out faces; not needed with `--table`.
      config: JSON file of the study.
      minutes: stop after so many minutes; the same command goes on. 0 for no limit.
      table: only rewrite the table.
    """

    out: Path
    data: Path | None = None
    config: Path = CONFIG
    minutes: float = 0.0
    table: bool = False


def load(path: Path) -> Plan:
    """Reads a configuration; ValueError, in one line, if it is none."""
    try:
        return Plan.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {in_one_line(error, Plan.model_fields)}") from None


class Session:
    """Computes the missing rows of a study; the arguments are those of the command."""

    def __init__(self, plan: Plan, arguments: Arguments) -> None:
        self.plan, self.log = plan, arguments.out / "rows.jsonl"
        self.deadline = math.inf
        if arguments.minutes:
            self.deadline = time.monotonic() + 60 * arguments.minutes
        found = rows.read(self.log, NEEDED)
        self.done = {(row["split"], row["task"], row["rule"]) for row in found}
        assert arguments.data is not None  # `main` has looked.
        test = {"count": plan.faces}
        self.crops = {
            "test": photos.evaluation_crops(arguments.data, size=plan.size, **test),
            "tuning": photos.evaluation_crops(
                arguments.data, size=plan.size, count=plan.tuning_faces, without=test
            ),
        }
        self.model = load_pretrained(plan.model)
        self.perceptual = perceptual_or_none()
        self.config: APSConfig = make_config(**{"sigma": plan.sigma} | plan.options)  # type: ignore

    def run(self) -> None:
        """Task by task the rules on the faces of the table and the anchors; then the tuning."""
        rules = list(self.plan.rules)
        first = [("test", rule) for rule in rules] + [("shadow", "anchors")]
        cells = [(split, task, rule) for task in self.plan.tasks for split, rule in first]
        cells += [("tuning", task, rule) for task in self.plan.tasks for rule in rules]
        for split, task, rule in cells:
            if (split, task, rule) in self.done:
                continue
            if time.monotonic() > self.deadline:
                return
            found = self._anchors(task) if split == "shadow" else self._rule(split, task, rule)
            rows.append(self.log, [{"split": split, "task": task, "rule": rule} | r for r in found])
            print(f"{split}, {task}, {rule}", flush=True)

    def _measured(self, task: str, crops: Crops) -> tuple[Params, Array, Any, Key]:
        options, shape = dict(self.plan.tasks[task]), (self.plan.size,) * 2
        key, noise, keys = restoring.keys_of(self.plan.seed, crops.positions)
        operator = make_operator(options.pop("task"), **options).init(key, shape)
        x = jnp.asarray(crops.images)
        y = restoring.measured(operator, noise, x, self.plan.sigma)
        return Params(self.model.prior, self.model.codec, operator), x, y, keys

    def _rule(self, split: str, task: str, label: str) -> list[dict[str, Any]]:
        num_tokens = math.prod(self.model.codec.grid((self.plan.size,) * 2))
        rule = numbers(self.plan.rules[label], self.config.num_steps, num_tokens)
        found = []
        for crops in self._batches(split):
            params, x, y, keys = self._measured(task, crops)
            restored = sample(params, y, keys, rule, config=self.config)
            scores = restoring.scored(params.operator, self.perceptual, restored, x, y)
            found += [{"image": n} | score for n, score in zip(crops.names, scores, strict=True)]
        return found

    def _anchors(self, task: str) -> list[dict[str, Any]]:
        found = []
        for crops in self._batches("test"):
            params, _, y, keys = self._measured(task, crops)
            shares = changes(shadow(params, y, keys, config=self.config))
            found += [
                {"image": name}
                | {group: np.round(part[i], 4).tolist() for group, part in shares.items()}
                for i, name in enumerate(crops.names)
            ]
        return found

    def _batches(self, split: str) -> Iterator[Crops]:
        """As many faces at once as there are for tuning: one shape, one compilation."""
        crops, size = self.crops[split], self.plan.tuning_faces
        for first in range(0, len(crops.names), size):
            part = slice(first, first + size)
            yield crops._replace(
                names=crops.names[part],
                positions=crops.positions[part],
                images=crops.images[part],
            )


@command("schedules", after_interrupt="run the same command to go on")
def main(arguments: Arguments) -> int:
    """Computes what is missing, then writes the table; returns the exit code."""
    plan = load(arguments.config)
    log = arguments.out / "rows.jsonl"
    if not arguments.table:
        if arguments.data is None:
            raise ValueError("--data is needed to compute rows; name a folder of aligned faces")
        with rows.alone(log):
            facts = {
                "version": aps_jax.__version__,
                "weights": model_facts(model_folder(plan.model)),
            }
            rows.claim(arguments.out / "run.json", facts | plan.model_dump(mode="json"))
            Session(plan, arguments).run()
    found = rows.read(log, NEEDED)
    if not found:
        raise ValueError(f"{log} has no rows; leave out --table and give --data")
    text = schedule_report.tables(plan, found)
    write_atomically(arguments.out / "table.md", text.encode())
    print(text)
    return 0
