"""How far every sampler is from a posterior that can be enumerated, against compute.

    python -m experiments.exactness [--out experiments/results/exactness]

Priors are perfect tables (`experiments.toy_priors`), so all error is the sampler's. For each of a
few measurements, or labels that a reward asks for, many samples are drawn; their frequencies are
compared with the exact posterior by total variation and KL(samples || posterior). `floor` is what
as many perfect samples would score. A run may be killed; the same command goes on. Options are as
in `METHODS`, not tuned.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from rich.progress import track

import aps_jax
from aps_jax import energies
from aps_jax.io import rows as rows_of
from aps_jax.io.files import write_atomically
from aps_jax.io.names import choose
from aps_jax.presets import config_class
from aps_jax.samplers import sample_target
from aps_jax.samplers.budget import with_budget
from aps_jax.sampling.target import Target, make_target, measurement_target
from experiments.bench.identity import described, digest
from experiments.command import command
from experiments.figures import figure, save_figure
from experiments.studies import toy_priors
from experiments.studies.exactness_methods import METHODS
from experiments.studies.toy_priors import Toy
from experiments.tables import markdown

#: Toy and whether absolute values are measured, by name. Nothing is measured in "reward".
CASES = {
    "4 codes, 3 tokens, linear": ("4x3", False),
    "4 codes, 3 tokens, amplitudes": ("4x3", True),
    "8 codes, 2 tokens, linear": ("8x2", False),
    "2x9 photo patches, linear": ("patches", False),
    "2x9 photo patches, amplitudes": ("patches", True),
    "4 codes, 3 tokens, reward": ("reward", False),
}
BUDGETS = (4, 16, 64)
#: What a row must have.
NEEDED = (
    "case", "method", "budget", "config", "fingerprint", "version", "total_variation", "kl",
    "floor", "kl_floor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows, the table and the plot.
      num_measurements: measurements per case; of a reward, labels.
      num_draws: samples per measurement.
      sigma: noise standard deviation.
      seed: of the truths, the noise and the samples.
      toys: only the cases of these toys, to run in pieces.
      table: only rewrite table and plot from existing rows.
      smoke: a tiny run of one case that proves that everything works.
    """

    out: Path = Path("experiments/results/exactness")
    num_measurements: int = 3
    num_draws: int = 1000
    sigma: float = 0.5
    seed: int = 0
    toys: tuple[str, ...] = ("4x3", "8x2", "patches", "reward")
    table: bool = False
    smoke: bool = False


def config_of(method: str, length: int, budget: int | None, sigma: float) -> Any:
    """Configuration of a method, or None if the budget is too small for it."""
    sampler, options = METHODS[method]
    options = {name: length if value == "L" else value for name, value in options.items()}
    config = config_class(sampler)(sigma=sigma, **options)
    if budget is None or config.KNOB is None:
        return config
    try:
        return with_budget(config, budget, fixed=options)
    except ValueError:
        return None


def fingerprint(config: dict[str, Any], arguments: Arguments) -> str:
    """Names what decides a row: a configuration as `described`, and the run."""
    facts = [arguments.num_measurements, arguments.num_draws, arguments.sigma, arguments.seed]
    return digest([config, facts])


def mark(method: str, length: int, budget: int | None, arguments: Arguments) -> dict[str, Any]:
    """What a row says of how it was made: `config` and `fingerprint`."""
    config = config_of(method, length, budget, arguments.sigma)
    said = described(METHODS[method][0], config)
    return {"config": said, "fingerprint": fingerprint(said, arguments)}


def is_own(row: dict[str, Any], arguments: Arguments) -> bool:
    """Whether a row is one that this run would write, or a record that it would once have been."""
    if row["method"] not in METHODS:
        return False
    said = row["config"]
    if METHODS[row["method"]] is not None:
        length = toy_priors.length_of(CASES[row["case"]][0])
        said = mark(row["method"], length, row["budget"], arguments)["config"]
    expected = (fingerprint(said, arguments), aps_jax.__version__)
    return (row["fingerprint"], row["version"]) == expected


def measurements(toy: Toy, arguments: Arguments) -> np.ndarray:
    """Noisy measurements [n, m] of truths drawn from the prior."""
    rng = np.random.default_rng(arguments.seed)
    truths = rng.choice(len(toy.joint), p=toy.joint, size=arguments.num_measurements)
    clean = toy.predicted[truths]
    return clean + arguments.sigma * rng.normal(size=clean.shape)


class Problem(NamedTuple):
    """What samplers draw from in one case, and what they should find.

    Attributes:
      exact: posterior of every measurement or label [n, K^L].
      targets: energies of n * draws rows, in the order of the measurements.
      num_codes: K.
      length: L.
    """

    exact: np.ndarray
    targets: Callable[[Any], Target]
    num_codes: int
    length: int


def make_problem(case: str, arguments: Arguments) -> Problem:
    """The problem of a case; its targets take the options of a sampler."""
    name, is_amplitude = CASES[case]
    if name == "reward":
        return _reward_problem(arguments)
    toy = toy_priors.make_toy(name, is_amplitude=is_amplitude)
    y = measurements(toy, arguments)
    batch = jnp.asarray(np.repeat(y, arguments.num_draws, axis=0), jnp.float32)
    laws = [toy_priors.exact_posterior(toy.joint, toy.predicted, row, arguments.sigma) for row in y]
    return Problem(
        np.stack(laws),
        lambda config: measurement_target(toy.params, batch, config=config),
        toy.params.codec.num_codes,
        toy.length,
    )


def _reward_problem(arguments: Arguments) -> Problem:
    toy = toy_priors.make_reward_toy()
    labels = np.arange(arguments.num_measurements) % len(toy.net.names)
    names = [toy.net.names[label] for label in np.repeat(labels, arguments.num_draws)]
    energy = energies.scaled(energies.text_reward(toy.net, names), toy.weight)
    target = make_target(toy.prior, toy.codec, energy, grid=toy.grid, batch=len(names))
    exact = np.stack([toy.posterior(label) for label in labels])
    return Problem(exact, lambda config: target, toy.codec.num_codes, target.tokens.shape[1])


def distances(exact: np.ndarray, tokens: np.ndarray, num_codes: int) -> dict[str, float]:
    """Means over measurements of the distances between samples and exact posteriors.

    Args:
      exact: posteriors [n, K^L].
      tokens: samples [n * draws, L], in the order of the measurements.
      num_codes: K.
    """
    rng = np.random.default_rng(0)
    found = {"total_variation": [], "kl": [], "floor": [], "kl_floor": []}
    for law, drawn in zip(exact, np.split(tokens, len(exact)), strict=True):
        shares = toy_priors.frequencies(drawn, num_codes)
        perfect = rng.multinomial(len(drawn), law, size=20) / len(drawn)
        found["total_variation"].append(toy_priors.total_variation(shares, law))
        found["kl"].append(toy_priors.kl_divergence(shares, law))
        found["floor"] += [toy_priors.total_variation(shares, law) for shares in perfect]
        found["kl_floor"] += [toy_priors.kl_divergence(shares, law) for shares in perfect]
    return {name: round(float(np.mean(values)), 5) for name, values in found.items()}


def jobs(arguments: Arguments) -> list[tuple[str, str, int | None]]:
    """Case, method and budget of every row; those of one compilation follow each other."""
    for kind in arguments.toys:
        choose("toy", kind, {toy: None for toy, _ in CASES.values()})
    cases = dict(list(CASES.items())[:1]) if arguments.smoke else CASES
    budgets = BUDGETS[:1] if arguments.smoke else BUDGETS
    found = []
    for kind in arguments.toys:
        for method, options in METHODS.items():
            if options is None:
                continue
            for budget in budgets if config_class(options[0]).KNOB else (None,):
                if config_of(method, toy_priors.length_of(kind), budget, arguments.sigma) is None:
                    continue
                found += [(case, method, budget) for case in cases if cases[case][0] == kind]
    return found


def run(arguments: Arguments) -> None:
    """Computes the missing rows; nobody else may write to the log meanwhile."""
    log = arguments.out / "rows.jsonl"
    rows = rows_of.read(log, NEEDED)
    if not all(is_own(row, arguments) for row in rows):
        raise ValueError(
            f"{log} holds rows of other settings or another version; choose another --out"
        )
    done = {(row["case"], row["method"], row["budget"]) for row in rows}
    missing = [job for job in jobs(arguments) if job not in done]
    problems: dict[str, Problem] = {}
    draw = jax.jit(sample_target, static_argnames="config")
    for case, method, budget in track(missing, "samplers", disable=not sys.stderr.isatty()):
        if case not in problems:
            problems[case] = make_problem(case, arguments)
        problem = problems[case]
        config = config_of(method, problem.length, budget, arguments.sigma)
        began = time.perf_counter()
        result = draw(problem.targets(config), jax.random.key(arguments.seed), config=config)
        tokens = np.asarray(result.tokens)
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"case": case, "method": method, "budget": budget}
        row["version"] = aps_jax.__version__
        row |= mark(method, problem.length, budget, arguments)
        row |= {f"{name}_evaluations": n for name, n in config.evaluations()._asdict().items()}
        row |= distances(problem.exact, tokens, problem.num_codes)
        rows_of.append(log, [row | {"seconds": round(seconds, 2)}])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: total variation (KL in nats) by case, method and budget."""
    done = {(row["case"], row["method"], row["budget"]) for row in rows}
    missing = [job for job in jobs(Arguments()) if job not in done]
    parts = [f"Incomplete: {len(missing)} results are still missing.\n"] if missing else []
    found = pd.DataFrame(rows)
    found["budget"] = found["budget"].fillna(0)
    found["cell"] = found.apply(lambda row: f"{row.total_variation:.3f} ({row.kl:.2f})", axis=1)
    for case in CASES:
        chosen = found[found["case"] == case]
        if chosen.empty:
            continue
        cells = chosen.pivot(index="method", columns="budget", values="cell")
        # Methods without a budget have one result for all.
        cells = cells.reindex(columns=[0, *BUDGETS]).astype(object)
        cells = pd.DataFrame({budget: cells[budget].fillna(cells[0]) for budget in BUDGETS})
        cells.columns = [f"{budget} decodes" for budget in BUDGETS]
        first = chosen.iloc[0]
        cells = cells.reindex(METHODS)
        cells.loc["perfect samples"] = f"{first.floor:.3f} ({first.kl_floor:.2f})"
        parts.append(f"### {case}\n\n{markdown(cells.reset_index(names='sampler'))}\n")
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Total variation against decoder evaluations, one panel per case."""
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    picture, axes = figure(1, len(cases), (3.6, 4.2))
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = [row for row in rows if row["case"] == case]
        for index, method in enumerate(METHODS):
            own = {r["budget"]: r["total_variation"] for r in chosen if r["method"] == method}
            style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "-."}
            if None in own:
                axis.axhline(own[None], label=method, **style)
            elif own:
                axis.plot(
                    *zip(*sorted(own.items()), strict=True), marker="o", label=method, **style
                )
        axis.axhline(chosen[0]["floor"], color="black", linestyle=":", label="perfect samples")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("decoder evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("total variation to the exact posterior")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    axes[0][-1].legend(
        lines.values(), lines.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
    )
    save_figure(picture, path)


@command(
    "exactness",
    after_interrupt="finished rows are kept, run the same command to go on",
    memory_cure="lower --num-draws",
)
def main(arguments: Arguments) -> None:
    """Computes what is missing, then writes table and plot."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, num_measurements=1, num_draws=20)
    if not arguments.table:
        with rows_of.alone(arguments.out / "rows.jsonl"):
            run(arguments)
    rows = rows_of.read(arguments.out / "rows.jsonl", NEEDED)
    if not rows:
        raise ValueError(f"{arguments.out} has no rows; leave out --table")
    text = table(rows)
    write_atomically(arguments.out / "table.md", (text + "\n").encode())
    plot(rows, arguments.out / "total_variation.png")
    print(text)
