"""Restores held-out photos with many samplers and compares them at equal cost.

    python -m experiments.benchmark CONFIG --data PHOTOS --out RUN [--tune]

Tasks x methods x budgets x seeds x photos, as the configuration says; where it asks for tuning,
`--tune` comes first. A run may be killed at any point: finished batches are rows in
`RUN/rows.jsonl`, and the same command does only what is missing. `--minutes` stops it by itself;
`--table` rewrites tables and plots from the rows alone, and `--compare-to` only prints gains over
another method than the configuration's.

A photo that cannot be read and a restoration that is not finite are recorded and left out; the
sweep goes on, and the exit code is 1. Rows of another configuration, model, version of the package
or other photos are refused (exit code 2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import aps_jax
from aps_jax.io import rows
from aps_jax.io.files import write_atomically, write_json
from aps_jax.io.names import choose
from experiments import photos
from experiments.bench import plots, summary, tuning
from experiments.bench.calibration import Calibration
from experiments.bench.identity import digest
from experiments.bench.plan import Plan
from experiments.bench.session import OutOfTime, Session, without_weights
from experiments.bench.study import Study, load
from experiments.command import command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      config: JSON file of the benchmark.
      data: folder of held-out photos.
      out: folder of the rows, the table, the plots and the pictures.
      tune: search the options of every method on photos of their own; writes OUT/tuned.json, with
        the methods that are finished.
      untuned: run without tuning, although the configuration asks for it.
      table: only rewrite tables and plots from existing rows.
      compare_to: with `--table`, a method: gains over this one are printed, and no file changes.
      minutes: stop after so many minutes; the same command goes on. 0 for no limit.
      only: labels of tasks and methods; nothing else is computed (all tasks if none is named, all
        methods likewise). Processes with other `--only` and `--out` may run side by side; `cat`
        their rows (or tuning rows) into one folder afterwards.
      limit: use only the first so many photos of the configuration; 0 for all.
      smoke: a tiny run of every method that proves that everything works.
      blur_weights: folder of `convert.kernel_wizard`; without, nonlinear blur is left out.
    """

    config: tyro.conf.Positional[Path]
    out: Path
    data: Path | None = None
    tune: bool = False
    untuned: bool = False
    table: bool = False
    compare_to: str | None = None
    minutes: float = 0.0
    only: tuple[str, ...] = ()
    limit: int = 0
    smoke: bool = False
    blur_weights: Path | None = None


def smoked(study: Study) -> Study:
    """A tiny form of the study: every method on the first task, one on the others."""
    methods, first = {}, next(iter(study.tasks))
    samplers = [label for label, method in study.methods.items() if method.kind == "sampler"]
    everywhere = next(
        (b.seconds_of for b in study.budgets if b and b.seconds_of), (samplers or [None])[0]
    )
    for label, method in study.methods.items():
        knobs = ("num_steps", "num_inner_steps", "num_likelihood_steps", "num_candidates")
        options = method.config | {
            name: min(2, value) for name, value in method.config.items() if name in knobs
        }
        if "perceptual_weight" in options:  # Works without LPIPS weights.
            options["perceptual_weight"] = 0.0
        tasks = tuple(study.tasks) if label == everywhere else (first,)
        # Steps that are tuned keep their first value, which fits a tiny budget.
        space = {name: values[: 1 if name in knobs else 3] for name, values in method.tune.items()}
        methods[label] = method.changed(config=options, tasks=tasks, count=None, tune=space)
    tuned = None
    if study.tuning is not None:
        tuned = study.tuning.changed(
            images=study.tuning.images | {"count": 2}, trials=2, tasks=(first,)
        )
    budgets = tuple(
        b.changed(evaluations=min(b.evaluations, 32)) if b and b.evaluations
        else b and b.changed(gflops=b.gflops / 2)
        for b in study.budgets
    )  # fmt: skip
    return study.changed(images=study.images | {"count": 2}, lpips=False, seeds=study.seeds[:1],
        batch_size=2, methods=methods, budgets=budgets, tuning=tuned,
    )  # fmt: skip


def run(
    study: Study,
    log: Path,
    arguments: Arguments,
    *,
    ignored: tuple[str, ...] = (),
    only: Sequence[str] = (),
) -> Session:
    """Computes the missing rows of a study, or of some tasks or methods; the session has them."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of photos")
    began = time.monotonic()
    plan = plan_of(study, log.name, arguments)
    # Refused before anything is loaded.
    found = plan.rows(version=aps_jax.__version__, ignored=ignored)
    crops = photos.evaluation_crops(arguments.data, **study.images)
    photos.require_own(log, (row["image"] for row in found), crops, arguments.data)
    if arguments.limit:
        crops = crops.first(arguments.limit)
    model = aps_jax.load_pretrained(study.model)
    needs_lpips = study.lpips or any(
        m.config.get("perceptual_weight", 0) > 0 or m.preset == "paper"
        for m in study.methods.values()
    )
    perceptual = aps_jax.load_lpips() if needs_lpips else None
    write_json(log.parent / "unreadable.json", crops.left_out)
    deadline = began + 60 * arguments.minutes if arguments.minutes else None
    with _progress() as on_progress:
        with rows.alone(log):
            session = Session(
                plan, crops, model, perceptual,
                on_progress=on_progress, deadline=deadline, ignored=ignored, only=only,
            )  # fmt: skip
            session.run()
    return session


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, with the time left; elsewhere one line per method."""
    console, shown = Console(stderr=True), ""
    is_shown = console.is_terminal
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, speed_estimate_period=600, disable=not is_shown
    ) as bar:
        job = bar.add_task("starting", total=None)

        def say(done: int, total: int, name: str) -> None:
            nonlocal shown
            if name != shown and not is_shown:
                print(f"{done}/{total} {name}", file=sys.stderr, flush=True)
            shown = name
            bar.update(job, completed=done, total=total, description=name)

        yield say


def tune(study: Study, identity: str, arguments: Arguments) -> Session:
    """Runs all trials and writes what they found."""
    if arguments.limit:
        raise ValueError(
            "--limit is for runs; of tuning it would leave options that were tried on fewer photos "
            "than the configuration says"
        )
    trials = tuning.tuning_study(study)
    only = [label for label in trials.tasks if label in arguments.only]
    only += [label for label in trials.methods if tuning.method_of(label) in arguments.only]
    if arguments.only and not only:
        raise ValueError(f"--only {' '.join(arguments.only)}: nothing of these is tuned")
    session = run(trials, arguments.out / "tuning.jsonl", arguments, only=only)
    found = tuning.record(study, session.rows, identity)
    tuning.write(arguments.out / "tuned.json", found)
    for method, entry in found["methods"].items():
        print(f"{method}: {found['metric']} {entry['trials'][entry['best']]['score']:.3f} with "
              f"{entry['options'] or 'the options as given'}")  # fmt: skip
    for line in tuning.repeated(found):
        print(f"note: {line}; tuning.distinct draws none twice", file=sys.stderr)
    return session


def plan_of(study: Study, name: str, arguments: Arguments) -> Plan:
    """The plan of a study whose rows are in the file `name`."""
    calibration = Calibration(arguments.out / "calibration.json")
    return Plan(study, arguments.out / name, calibration, arguments.blur_weights)


def tuning_identity(study: Study, arguments: Arguments) -> str:
    """Names everything that tuning depends on, so that its record is not used for anything else."""
    plan = plan_of(tuning.tuning_study(study), "tuning.jsonl", arguments)
    return digest([plan.digest(), study.tuning.metric])


@command(
    "benchmark",
    after_interrupt="finished batches are kept, run the same command to go on",
    memory_cure="lower batch_size in the configuration",
)
def main(arguments: Arguments) -> int:
    """Does what the command line says; returns the exit code."""
    study = load(arguments.config)
    study, left_out = without_weights(study, arguments.blur_weights)
    for label in left_out:
        print(f"note: task {label} is left out: it needs --blur-weights", file=sys.stderr)
    if arguments.smoke:
        study = smoked(study)
    if arguments.compare_to is not None:
        if not arguments.table:
            raise ValueError("--compare-to prints gains from existing rows; add --table")
        choose("method (--compare-to)", arguments.compare_to, study.methods)
    for label in arguments.only:
        choose("task or method (--only)", label, study.methods | study.tasks)
    if arguments.tune and study.tuning is None:
        raise ValueError(f"configuration {arguments.config} has no tuning section")
    try:
        if study.tuning is not None and not arguments.untuned:
            identity = tuning_identity(study, arguments)
            if arguments.tune:
                return _outcome(tune(study, identity, arguments))
            methods = [label for label in study.methods if label in arguments.only]
            wanted = () if arguments.table else methods or tuple(study.methods)
            record = arguments.out / "tuned.json"
            study = tuning.tuned(study, record, identity, wanted=wanted)
        log = arguments.out / "rows.jsonl"
        code = 0
        if not arguments.table:
            session = run(study, log, arguments, ignored=tuple(left_out), only=arguments.only)
            code = _outcome(session)
    except OutOfTime:
        print(f"stopped after {arguments.minutes:g} minutes; run the same command to go on",
              file=sys.stderr)  # fmt: skip
        return 0
    plan = plan_of(study, log.name, arguments)
    found = plan.rows(version=None, ignored=tuple(left_out))
    if not found:
        raise ValueError(f"{log} has no rows; leave out --table and give --data")
    if arguments.compare_to is not None:
        print(gains_over(arguments.compare_to, study, found))
        return 0
    text = summary.table(study, found)
    write_atomically(arguments.out / "table.md", (text + "\n").encode())
    short = summary.overview(study, found)
    write_atomically(arguments.out / "overview.md", (short + "\n").encode())
    plots.plot(study, found, arguments.out)
    print(text)
    return code


def gains_over(label: str, study: Study, found: Sequence[rows.Row]) -> str:
    """The overview with another reference; ValueError if there are no rows of it."""
    if not any(row["method"] == label for row in found):
        raise ValueError(f"--compare-to {label!r} has no rows yet; run it, or choose another")
    return summary.overview(study.changed(compare_to=label), found)


def _outcome(session: Session) -> int:
    """Says what went wrong; exit code 1 if anything did."""
    for name, reason in session.crops.unreadable.items():
        print(f"benchmark: skipped {name}, which cannot be read: {reason}", file=sys.stderr)
    for name, reason in session.crops.too_small.items():
        print(f"benchmark: skipped {name}: {reason}", file=sys.stderr)
    failed = [row for row in session.rows if "error" in row]
    if failed:
        print(f"benchmark: {len(failed)} restorations failed, see {session.plan.log}",
              file=sys.stderr)  # fmt: skip
    return 1 if failed or session.crops.unreadable else 0
