"""What belongs to a study: its cells, their configurations, fingerprints and rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from aps_jax.operators import make_operator
from aps_jax.pretrained import load_kernel_wizard, model_folder
from aps_jax.types import Operator
from experiments.bench import restoring
from experiments.bench.calibration import Calibration
from experiments.bench.identity import config_of, described, digest, fingerprint, model_facts
from experiments.bench.rows import Cell, Row, cell_of, read_rows, require_own, require_version
from experiments.bench.study import Budget, Method, Study, Task


def operator_of(task: Task, weights: Path | None) -> Operator:
    """The operator of a task, random state not drawn yet; `weights` are those of nonlinear blur."""
    options = dict(task.options)
    if task.task == "nonlinear_blur":
        options["params"] = load_kernel_wizard(weights)
    return make_operator(task.task, **options)


class Plan:
    """What belongs to a study: its cells, their configurations and fingerprints.

    Attributes:
      study: tuned, and without tasks that cannot be run.
      log: file of the rows.
      calibration: what budgets in seconds come to.
    """

    def __init__(
        self, study: Study, log: Path, calibration: Calibration, weights: Path | None
    ) -> None:
        self.study, self.log, self.calibration = study, log, calibration
        size = study.images["size"]
        self.image_shape = (size, size)
        self.operators = {label: operator_of(task, weights) for label, task in study.tasks.items()}
        self.model = model_facts(model_folder(study.model))
        key = jax.random.key(0)
        # Some random state or other, for the shapes of the measurements.
        self.drawn = {
            label: operator.init(key, self.image_shape)
            for label, operator in self.operators.items()
        }

    def methods(self, task: Task) -> list[Method]:
        """Methods that are run on a task."""
        chosen = [
            m for m in self.study.methods.values() if m.tasks is None or task.label in m.tasks
        ]
        operator = self.drawn[task.label]
        return [
            m for m in chosen
            if m.kind != "measurement" or restoring.has_baseline(operator, self.image_shape)
        ]  # fmt: skip

    def config(self, task: Task, method: Method, budget: Budget | None) -> Any:
        """Configuration of a sampler, or None where it is not known before the run."""
        limit = None if budget is None else budget.limit(method)
        if budget is not None and budget.seconds_of is not None and method.budgeted:
            limit = self.calibration.evaluations(
                task.label, method.label, budget.label, self.source(task, method, budget)
            )
            if limit is None:
                return None
        return config_of(method, task, limit, self.drawn[task.label], self.image_shape)

    @property
    def in_evaluations(self) -> Budget:
        """The budget whose rows say what the others in seconds come to."""
        budgets = self.study.budgets
        return next(b for b in budgets if b.seconds_of is None and b.evaluations is not None)

    def source(self, task: Task, method: Method, budget: Budget) -> str:
        """Fingerprints of the rows that a budget in seconds is found from."""
        methods = (method, self.study.methods[budget.seconds_of])
        return digest([self.mark(task, m, self.in_evaluations)["fingerprint"] for m in methods])

    def mark(self, task: Task, method: Method, budget: Budget | None) -> dict[str, Any]:
        """What the rows of a cell say of how they were made; None where a run must tell first."""
        if method.kind == "sampler":
            config = self.config(task, method, budget)
            if config is None:
                return {"fingerprint": None}
            said = described(method.sampler, config, prior=method.prior, estimate=method.estimate)
            found = fingerprint(self.study, self.model_of(method), task, method, said)
            return {"fingerprint": found, "config": said}
        return {"fingerprint": fingerprint(self.study, self.model, task, method, None)}

    def model_of(self, method: Method) -> dict[str, str]:
        """Hashes of the weights that a method reads."""
        folder = method.folder
        return self.model if folder is None else model_facts(model_folder(folder), method.needed)

    def expected(self, rows: Sequence[Row] = ()) -> dict[Cell, str | None]:
        """Fingerprint of every cell; of records, what the configurations in their rows come to."""
        found = {
            Cell(task.label, method.label, budget and budget.label, seed): name
            for task in self.study.tasks.values()
            for method in self.methods(task)
            for budget in self.study.budgets_of(task.label)
            for name in [self.mark(task, method, budget)["fingerprint"]]
            for seed in self.study.seeds
        }
        for row in rows:
            cell = cell_of(row)
            method = self.study.methods.get(cell.method)
            if cell in found and method.kind == "record":
                task = self.study.tasks[cell.task]
                found[cell] = fingerprint(self.study, self.model, task, method, row.get("config"))
        return found

    def rows(self, *, version: str | None, ignored: Sequence[str] = ()) -> list[Row]:
        """The rows there are; ValueError if some are not this study's.

        Args:
          version: the only version of this package that may have written them; None for any one.
          ignored: labels of tasks whose rows are left alone.
        """
        rows = [row for row in read_rows(self.log) if row.get("task") not in ignored]
        require_version(self.log, rows, only=version)
        require_own(self.log, rows, self.expected(rows))
        return rows

    def digest(self) -> str:
        """Stands for all cells together."""
        cells = [[*cell, found] for cell, found in self.expected().items()]
        return digest(cells)
