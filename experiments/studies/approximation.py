"""How far the law that the quantized expectation implies is from posteriors by enumeration.

    python -m experiments.approximation [--out experiments/results/approximation]

APS takes the energy at the nearest code to the mean code for the mean energy, and softmax(phi),
independent over tokens, for the posterior. On problems of two tokens both can be compared with the
truth, over codebook sizes and operators from linear to amplitudes. The prior is independent over
tokens, too, so that it is the same at the first timestep as later, and what the tokens have to do
with each other is all due to the measurement. About a minute; the folder is written anew.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from rich.progress import track

from aps_jax.codec import lfq
from aps_jax.config import APSConfig
from aps_jax.io import rows as rows_of
from aps_jax.io.files import write_atomically
from aps_jax.sampling import objective
from aps_jax.sampling.inner_loop import descend
from aps_jax.sampling.target import Target, measurement_target
from aps_jax.types import Array, Params
from experiments.bench.summary import interval
from experiments.command import command
from experiments.figures import figure, save_figure
from experiments.studies import toy_priors
from experiments.tables import markdown

LENGTH, STRIDE, NUM_MEASURED = 2, 2, 4
SHAPE = (STRIDE, STRIDE * LENGTH)
CODEBOOKS = (2, 4, 8, 16, 32, 64)
#: Of `toy_priors.projection`: linear, a leaky rectifier, a rectifier, the same with a leak of the
#: other sign, amplitudes.
FOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: What the tables show besides the whole: codebook sizes at one fold, folds at one size.
SHOWN_FOLD, SHOWN_SIZE = 0.0, 16
#: Inner steps of APS, at its rate of 1, and those of the law with the least exact bound.
STEPS, EXACT_STEPS, EXACT_RATE = 100, 500, 0.1
NEEDED = ("num_codes", "fold", "law", "num_problems", "kl_token", "tv_token", "kl_joint")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows, the tables and the plot.
      num_problems: random codecs, operators and priors for each codebook size.
      num_measurements: measurements of each.
      sigma: noise standard deviation.
      seed: of the problems, the truths and the noise.
      table: only rewrite tables and plot from existing rows.
      smoke: two problems of the smallest codebook.
    """

    out: Path = Path("experiments/results/approximation")
    num_problems: int = 24
    num_measurements: int = 4
    sigma: float = 0.5
    seed: int = 0
    table: bool = False
    smoke: bool = False


class Problem(NamedTuple):
    """A codec, an operator and a prior of independent tokens, with measurements.

    Attributes:
      params: codec and operator; its prior is not called.
      marginals: prior [L, K], float64.
      y: measurements [n, m].
      energies: of all fields [n, K^L], float64.
      posterior: exact, likewise.
    """

    params: Params
    marginals: np.ndarray
    y: np.ndarray
    energies: np.ndarray
    posterior: np.ndarray


def make_problem(num_codes: int, fold: float, index: int, arguments: Arguments) -> Problem:
    """A random problem; those of the same index and size differ in their fold only."""
    rng = np.random.default_rng([arguments.seed, num_codes, index])
    num_bits = num_codes.bit_length() - 1
    size = 3 * math.prod(SHAPE)
    marginals = 0.9 * rng.dirichlet(np.ones(num_codes), size=LENGTH) + 0.1 / num_codes
    weights = rng.normal(size=(LENGTH * num_bits, size)) * 0.8 / np.sqrt(LENGTH * num_bits)
    matrix = rng.normal(size=(size, NUM_MEASURED)) * 1.5 / np.sqrt(size)
    codec = toy_priors.mixing_codec(weights, lfq.LFQ(num_bits), STRIDE)
    operator = toy_priors.projection(matrix, SHAPE, fold=fold).replace(is_linear=False)
    codes = codec.codebook[toy_priors.fields(num_codes, LENGTH)].reshape(-1, 1, LENGTH, num_bits)
    predicted = np.float64(operator(codec.decode(codec.params, codes)))
    joint = np.outer(*marginals).ravel()
    truths = rng.choice(len(joint), p=joint, size=arguments.num_measurements)
    noise = rng.normal(size=(arguments.num_measurements, NUM_MEASURED))
    y = predicted[truths] + arguments.sigma * noise
    energies = np.array([toy_priors.energies(predicted, row, arguments.sigma) for row in y])
    exact = [toy_priors.exact_posterior(joint, predicted, row, arguments.sigma) for row in y]
    params = Params(toy_priors.table_prior(joint, num_codes, LENGTH), codec, operator)
    return Problem(params, marginals, y, energies, np.array(exact))


def token_laws(joint: np.ndarray, num_codes: int) -> np.ndarray:
    """Marginals [n, L, K] of laws of fields [n, K^L]."""
    cube = joint.reshape(-1, num_codes, num_codes)
    return np.stack([cube.sum(axis=2), cube.sum(axis=1)], axis=1)


def distances(exact: np.ndarray, log_law: np.ndarray) -> dict[str, np.ndarray]:
    """Of posteriors [n, K^L] from independent tokens of log-probabilities [n, L, K], each [n].

    `kl_token` and `tv_token` are means over tokens of what separates their laws, `kl_joint` is
    KL(posterior || product). It is the sum of `kl_token` over tokens and of what no product has.
    """
    log_law = np.float64(log_law)
    own = token_laws(exact, log_law.shape[-1])
    log_product = (log_law[:, 0, :, None] + log_law[:, 1, None, :]).reshape(len(exact), -1)
    return {
        "kl_token": np.sum(_weighted(own, log_law), axis=-1).mean(axis=-1),
        "tv_token": 0.5 * np.abs(own - np.exp(log_law)).sum(axis=-1).mean(axis=-1),
        "kl_joint": np.sum(_weighted(exact, log_product), axis=-1),
    }


def _weighted(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """The terms p (log p - log q), 0 where p is."""
    return p * (np.log(np.maximum(p, 1e-300)) - log_q)


#: Of a target, log x_theta [R, L, K] and the energies of all pairs of codes [R, K, K]: the losses
#: [R] of logits phi [R, L, K].
Losses = Callable[[Target, Array, Array, Array], Array]


def _published(target: Target, log_prior: Array, pairs: Array, phi: Array) -> Array:
    return objective.loss(target, phi, log_prior, target.tokens)


def _bound(target: Target, log_prior: Array, pairs: Array, phi: Array) -> Array:
    return objective.loss(target, phi, log_prior, target.tokens, 1.0)


def _kl(phi: Array, log_prior: Array) -> Array:
    return jnp.sum(objective.kl_term(phi, log_prior, is_exact=True), axis=-1)


def _quantized(target: Target, log_prior: Array, pairs: Array, phi: Array) -> Array:
    return _published(target, log_prior, pairs, phi) + _kl(phi, log_prior)


def _mean_code(target: Target, log_prior: Array, pairs: Array, phi: Array) -> Array:
    return target.objective_of(target.expected_code(phi)) + _kl(phi, log_prior)


def _mean_energy(target: Target, log_prior: Array, pairs: Array, phi: Array) -> Array:
    first, second = jnp.moveaxis(jax.nn.softmax(phi, axis=-1), 1, 0)
    return jnp.einsum("ra,rab,rb->r", first, pairs, second) + _kl(phi, log_prior)


#: What phi is optimised for, with its steps and rate, by the name of the law softmax(phi).
LAWS: dict[str, tuple[Losses, int, float]] = {
    "quantized expectation, no prior term (Algorithm 1)": (_published, STEPS, 1.0),
    "quantized expectation, prior term (Theorem 3.3)": (_bound, STEPS, 1.0),
    "quantized expectation, KL to the prior": (_quantized, STEPS, 1.0),
    "the same, 5 inner steps": (_quantized, 5, 1.0),
    "mean code, KL to the prior": (_mean_code, STEPS, 1.0),
    "mean energy, KL to the prior (mean field)": (_mean_energy, EXACT_STEPS, EXACT_RATE),
}
PRIOR, MARGINALS = "prior, which saw no measurement", "exact marginals, independent"
ORDER = (PRIOR, *LAWS, MARGINALS)


@jax.jit
def optimised(target: Target, log_prior: Array, pairs: Array) -> dict[str, Array]:
    """Log softmax(phi) [R, L, K] by law, each phi optimised from the prior's logits."""
    found = {}
    for name, (losses, steps, rate) in LAWS.items():
        refined = descend(
            lambda phi, _, losses=losses: losses(target, log_prior, pairs, phi),
            log_prior, optax.adam(rate), steps,
        )  # fmt: skip
        found[name] = jax.nn.log_softmax(refined.phi, axis=-1)
    return found


def fitted(problem: Problem, arguments: Arguments) -> dict[str, np.ndarray]:
    """Log-probabilities [n, L, K] of all laws for the measurements of a problem."""
    num_codes, rows = problem.marginals.shape[1], len(problem.y)
    config = APSConfig(sigma=arguments.sigma, measurement_term="gaussian")
    y = jnp.asarray(problem.y, jnp.float32)
    target = measurement_target(problem.params, y, config=config)
    log_prior = np.broadcast_to(np.log(problem.marginals), (rows, LENGTH, num_codes))
    pairs = problem.energies - problem.energies.min(axis=1, keepdims=True)
    found = optimised(
        target,
        jnp.asarray(log_prior, jnp.float32),
        jnp.asarray(pairs.reshape(rows, num_codes, num_codes), jnp.float32),
    )
    own = token_laws(problem.posterior, num_codes)
    laws = {name: np.asarray(law) for name, law in found.items()}
    return laws | {PRIOR: log_prior, MARGINALS: np.log(np.maximum(own, 1e-300))}


def measured(problem: Problem, arguments: Arguments) -> dict[str, dict[str, float]]:
    """Distances of all laws, means over the measurements of a problem."""
    laws = fitted(problem, arguments)
    return {
        name: {key: float(v.mean()) for key, v in distances(problem.posterior, law).items()}
        for name, law in laws.items()
    }


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """A row per codebook size, fold and law: means over problems with half-widths of intervals."""
    sizes, folds = (CODEBOOKS[:1], FOLDS[:1]) if arguments.smoke else (CODEBOOKS, FOLDS)
    cases = [(num_codes, fold) for num_codes in sizes for fold in folds]
    found = []
    for num_codes, fold in track(cases, "cases", disable=not sys.stderr.isatty()):
        problems = (
            make_problem(num_codes, fold, index, arguments)
            for index in range(2 if arguments.smoke else arguments.num_problems)
        )
        per_problem = [measured(problem, arguments) for problem in problems]
        for law in ORDER:
            row: dict[str, Any] = {"num_codes": num_codes, "fold": fold, "law": law}
            row |= {"num_problems": len(per_problem), "seed": arguments.seed}
            for key in ("kl_token", "tv_token", "kl_joint"):
                gain = interval([values[law][key] for values in per_problem])
                assert gain is not None
                row[key] = [round(gain.mean, 4), round(gain.half_width, 4)]
            found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: distances by law, against codebook sizes and against folds."""
    found = pd.DataFrame(rows)
    parts = []
    for key, words in (
        ("kl_token", "KL(exact marginal || law) per token, nats"),
        ("tv_token", "Total variation of the marginals, mean over tokens"),
        ("kl_joint", "KL(exact posterior || product of the law), nats"),
    ):
        digits = 3 if key == "tv_token" else 2
        found["cell"] = [f"{mean:.{digits}f} ± {half:.{digits}f}" for mean, half in found[key]]
        for chosen, column, label in (
            (found[found["fold"] == SHOWN_FOLD], "num_codes", "linear, {} codes"),
            (found[found["num_codes"] == SHOWN_SIZE], "fold", f"{SHOWN_SIZE} codes, fold {{:g}}"),
        ):
            if chosen.empty:
                continue
            cells = chosen.pivot(index="law", columns=column, values="cell").reindex(ORDER)
            cells.columns = [label.format(value) for value in cells.columns]
            title = f"### {words}: {label.split(', ')[0]}"
            parts.append(f"{title}\n\n{markdown(cells.reset_index(names='law'))}\n")
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL per token and of the joint law, against codebook size and against fold."""
    found = pd.DataFrame(rows)
    by_size = found[found["fold"] == SHOWN_FOLD], "num_codes"
    by_fold = found[found["num_codes"] == SHOWN_SIZE], "fold"
    panels = (
        (by_size, "kl_token", "per token, linear operator", "codes K"),
        (by_fold, "kl_token", f"per token, {SHOWN_SIZE} codes", "fold: 0 linear, 1 amplitudes"),
        (by_size, "kl_joint", "all tokens together, linear operator", "codes K"),
    )
    panels = [panel for panel in panels if not panel[0][0].empty]
    picture, axes = figure(1, len(panels), (4.2, 4.0))
    for axis, ((chosen, column), key, title, label) in zip(axes[0], panels, strict=True):
        for index, law in enumerate(ORDER):
            if law == MARGINALS and key == "kl_token":
                continue  # 0, which has no place on a log scale.
            own = chosen[chosen["law"] == law].sort_values(column)
            means, halves = np.array(own[key].tolist()).reshape(-1, 2).T
            axis.plot(own[column], means, marker="o", color=f"C{index}", label=law)
            low = np.maximum(means - halves, 1e-3 * means)
            axis.fill_between(own[column], low, means + halves, color=f"C{index}", alpha=0.15)
        axis.set(title=title, xlabel=label, yscale="log", ylim=(0.01, 30))
        axis.grid(alpha=0.3)
        if column == "num_codes":
            axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("KL from the exact posterior, nats")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(picture, path)


@command("approximation")
def main(arguments: Arguments) -> None:
    """Computes all rows, then writes tables and plot."""
    log = arguments.out / "rows.jsonl"
    if arguments.table:
        rows = rows_of.read(log, NEEDED)
        if not rows:
            raise ValueError(f"{arguments.out} has no rows; leave out --table")
    else:
        rows = run(arguments)
        log.unlink(missing_ok=True)
        rows_of.append(log, rows)
    text = table(rows)
    write_atomically(arguments.out / "table.md", (text + "\n").encode())
    plot(rows, arguments.out / "kl.png")
    print(text)
