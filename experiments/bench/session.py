"""Runs a benchmark: computes the rows that are missing, one batch after the other."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import images, sharding
from aps_jax.denoiser import PixelParams
from aps_jax.io.rows import append as append_rows
from aps_jax.pretrained import Model, load_denoiser
from aps_jax.types import Array, Params
from experiments.bench import restoring
from experiments.bench.identity import config_of
from experiments.bench.plan import Plan
from experiments.bench.rows import Cell, Row, cell_of, require_devices
from experiments.bench.study import Budget, Method, Study, Task
from experiments.photos import Crops

#: JAX keeps what it compiles until it is told not to, and with some seventy programs of this size a
#: process may map no more memory.
NUM_PROGRAMS = 32


class OutOfTime(Exception):
    """The minutes are over; what is done is safe."""


def without_weights(study: Study, weights: Path | None) -> tuple[Study, list[str]]:
    """The study without the tasks whose network weights are not given, and their labels."""
    if weights is not None:
        return study, []
    left_out = [label for label, task in study.tasks.items() if task.task == "nonlinear_blur"]
    tasks = {label: task for label, task in study.tasks.items() if label not in left_out}
    if not tasks:
        raise ValueError("all tasks are nonlinear_blur, which needs --blur-weights FOLDER")
    tuning = study.tuning
    if tuning is not None and tuning.tasks is not None:
        kept = tuple(label for label in tuning.tasks if label in tasks)
        tuning = tuning.changed(tasks=kept or None)
    return study.changed(tasks=tasks, tuning=tuning), left_out


class Session:
    """Computes the missing rows of a plan, batches spread over as many devices as divide them.

    Attributes:
      plan: what is to be done.
      mesh: devices that every batch is spread over.
      params: models on all of them, without an operator.
      denoisers: likewise, of the methods that have their own, by folder and kind.
      rows: what is done, the new rows included.
      only: labels of tasks and methods; nothing else is computed. All tasks if none is named, all
        methods likewise.
    """

    def __init__(
        self,
        plan: Plan,
        crops: Crops,
        model: Model,
        perceptual: Any,
        *,
        on_progress: Callable[[int, int, str], None],
        deadline: float | None = None,
        ignored: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> None:
        self.plan, self.crops = plan, crops
        self.only = only
        batch = plan.study.batch_size
        self.mesh = sharding.make_mesh(
            max(n for n in range(1, len(jax.devices()) + 1) if batch % n == 0)
        )
        self.params = sharding.shard_params(
            Params(model.prior, model.codec, None, perceptual), self.mesh
        )
        self.denoisers: dict[tuple[Path, str], PixelParams] = {}
        self.on_progress, self.deadline = on_progress, deadline
        self.rows = plan.rows(version=aps_jax.__version__, ignored=ignored)
        if any(budget and budget.seconds_of for budget in plan.study.budgets):
            require_devices(plan.log, self.rows, only=self.mesh.size)
        self.done: dict[Cell, set[str]] = {}
        for row in self.rows:
            self.done.setdefault(cell_of(row), set()).add(row["image"])
        self.num_done = 0

    def run(self) -> None:
        """Computes what is missing; raises OutOfTime between two batches."""
        jobs = [
            (task, method, budget)
            for task in self.plan.study.tasks.values()
            for budget in self.plan.study.budgets_of(task.label)
            for method in self.plan.methods(task)
            if method.kind != "record" and self._is_wanted(task, method)
        ]
        if self.only and not jobs:
            raise ValueError(f"--only {' '.join(self.only)}: none of the methods runs on the tasks")
        self.num_all = sum(len(missing) for job in jobs for missing in self._missing(*job).values())
        for count, job in enumerate(jobs, start=1):
            self._run_method(*job)
            if count % NUM_PROGRAMS == 0:
                jax.clear_caches()

    def _is_wanted(self, task: Task, method: Method) -> bool:
        wanted = set(self.only)
        tasks = wanted & set(self.plan.study.tasks)
        methods = wanted - tasks
        return (not tasks or task.label in tasks) and (not methods or method.label in methods)

    def _missing(self, task: Task, method: Method, budget: Budget | None) -> dict[Cell, list[int]]:
        """Indices of the photos that the cells of a method lack."""
        limits = [part.count for part in (task, method, budget) if part and part.count]
        chosen = range(len(self.crops.names))[: min(limits, default=None)]
        cells = [
            Cell(task.label, method.label, budget and budget.label, seed)
            for seed in self.plan.study.seeds
        ]
        return {
            cell: [i for i in chosen if self.crops.names[i] not in self.done.get(cell, set())]
            for cell in cells
        }

    def _run_method(self, task: Task, method: Method, budget: Budget | None) -> None:
        missing = self._missing(task, method, budget)
        if not any(missing.values()):
            return
        self._check_time()
        name = f"{task.label}, {method.label}" + (f", {budget.label}" if budget else "")
        self.on_progress(self.num_done, self.num_all, name)
        is_sampler = method.kind == "sampler"
        if budget is not None and budget.seconds_of and method.budgeted and is_sampler:
            self._calibrate(task, method, budget)
        config = self.plan.config(task, method, budget) if is_sampler else None
        mark = self.plan.mark(task, method, budget)
        run = None
        for cell, lacking in missing.items():
            known = self._known(cell, mark, lacking)
            if known:
                self._keep(cell, known)
            names = {row["image"] for row in known}
            for index in self._batches([i for i in lacking if self.crops.names[i] not in names]):
                x, y, params, keys = self._batch(task, cell.seed, index, method)
                if run is None:
                    run = restoring.compile_method(
                        method, config, task.sigma, params, x, y, keys,
                        budget and budget.limit(method),
                    )  # fmt: skip
                restored, seconds = restoring.timed(run, params, x, y, keys)
                self._keep(cell, self._score(cell, mark, index, restored, seconds, x, y, params))
                if index[0] == 0 and cell.seed == self.plan.study.seeds[0]:
                    self._save_pictures(name, restored.images, x)
                self.on_progress(self.num_done, self.num_all, name)
                self._check_time()

    def _known(self, cell: Cell, mark: dict[str, Any], lacking: list[int]) -> list[Row]:
        """Rows of a cell that another method of the same settings has: the same computation."""
        lacking = {self.crops.names[i] for i in lacking}
        twins = {
            row["image"]: row | cell._asdict() | mark for row in self.rows
            if row["fingerprint"] == mark["fingerprint"] and row["image"] in lacking
            and cell_of(row)._replace(method=cell.method) == cell
        }  # fmt: skip
        return list(twins.values())

    def _keep(self, cell: Cell, rows: list[Row]) -> None:
        append_rows(self.plan.log, rows)
        self.rows += rows
        self.done.setdefault(cell, set()).update(row["image"] for row in rows)
        self.num_done += len(rows)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    def _batches(self, missing: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(missing), self.plan.study.batch_size):
            yield missing[start : start + self.plan.study.batch_size]

    def _batch(
        self, task: Task, seed: int, index: list[int], method: Method
    ) -> tuple[Array, Any, Params | PixelParams, Array]:
        # The last batch is filled up, so that every batch has one shape.
        padded = np.resize(index, self.plan.study.batch_size)
        x = jnp.asarray(self.crops.images[padded])
        key, noise, keys = restoring.keys_of(seed, self.crops.positions[padded])
        operator = self.plan.operators[task.label].init(key, self.plan.image_shape)
        y = restoring.measured(operator, noise, x, float(task.sigma))
        x, y, keys = sharding.shard_batch((x, y, keys), self.mesh)
        operator = jax.device_put(operator, sharding.replicated(self.mesh))
        return x, y, self._models(method).replace(operator=operator), keys

    def _models(self, method: Method) -> Params | PixelParams:
        """What a method draws from, without an operator; denoisers are loaded once."""
        if method.folder is None:
            return self.params
        name = (method.folder, method.needed)
        if name not in self.denoisers:
            is_latent = method.needed == "latent denoiser"
            denoiser = load_denoiser(method.folder, is_latent=is_latent)
            denoiser = jax.device_put(denoiser, sharding.replicated(self.mesh))
            self.denoisers[name] = PixelParams(denoiser=denoiser, operator=None)
        return self.denoisers[name]

    def _score(
        self,
        cell: Cell,
        mark: dict[str, Any],
        index: list[int],
        restored: restoring.Restored,
        seconds: float,
        x: Array,
        y: Any,
        params: Params | PixelParams,
    ) -> list[Row]:
        perceptual = self.params.perceptual if self.plan.study.lpips else None
        table = restoring.scored(params.operator, perceptual, restored.images, x, y)
        rows = []
        for place, i in enumerate(index):
            row = cell._asdict() | {"image": self.crops.names[i]} | mark
            row |= {"version": aps_jax.__version__, "devices": self.mesh.size}
            if restored.is_finite[place] and table[place]:
                row |= table[place]
            else:
                row["error"] = "the objective or the restored image is not finite"
            row |= {name: int(values[place]) for name, values in restored.cost.items()}
            rows.append(row | {"seconds": round(seconds, 4)})
        return rows

    def _calibrate(self, task: Task, method: Method, budget: Budget) -> None:
        """Finds the decoder evaluations that take as long as those of the reference method."""

        def try_out(config: Any) -> float:
            index = list(range(min(len(self.crops.names), self.plan.study.batch_size)))
            x, y, params, keys = self._batch(task, self.plan.study.seeds[0], index, method)
            run = restoring.compile_method(method, config, task.sigma, params, x, y, keys)
            return restoring.timed(run, params, x, y, keys)[1]

        self.plan.calibration.settle(
            task.label, method.label, budget,
            source=self.plan.source(task, method, budget),
            under=self.plan.in_evaluations,
            rows=self.rows,
            make=lambda evaluations: config_of(
                method, task, evaluations, self.plan.drawn[task.label], self.plan.image_shape
            ),
            try_out=try_out,
        )  # fmt: skip

    def _save_pictures(self, name: str, restored: Array, x: Array) -> None:
        """The first batch as a picture: photos above, restored below."""
        rows = [np.concatenate(list(np.clip(batch, -1, 1)), axis=1) for batch in (x, restored)]
        slug = re.sub(r"[^\w.-]+", "_", name).strip("_")
        with contextlib.suppress(OSError):  # A missing picture must not end a sweep.
            path = self.plan.log.parent / "pictures" / f"{slug}.png"
            images.save_image(path, np.concatenate(rows))
