"""What a prior is worth for photos painted in a style: distances at equal gradients.

    python -m experiments.styles --data PHOTOS --out experiments/results/styles

Every method lowers the same energy, 10 (content + 10 strength · style) per token, that of
`aps-jax stylize`, with equally many gradients: APS with the prior, the same without it, and Adam on
pixels without any model, whose learning rate is chosen by that energy on another photo. What is
reported is how far the style is from the reference and how far the picture from the photo (LPIPS,
and the content that was lowered).

Rows are appended to `OUT/rows.jsonl` batch by batch; the same command does only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import energies
from aps_jax.cli import stylize
from aps_jax.codec.magvit2 import reconstruct
from aps_jax.images import load_image, save_image
from aps_jax.io import checkpoint, rows
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import Model, model_folder
from aps_jax.sampling.edits import whole_target
from aps_jax.sampling.target import Target
from aps_jax.scores.lpips import vgg_features
from aps_jax.types import Array, Energy, Features, Perceptual
from experiments import photos
from experiments.bench.identity import model_facts
from experiments.bench.restoring import uniform_prior
from experiments.command import command
from experiments.studies.style_methods import (
    METHODS,
    STRENGTHS,
    config_of,
    descended,
    painted,
)
from experiments.studies.style_report import MEASURES, UNTOUCHED, draw_grid, plot, table

MODEL = "photo64"
NEEDED = ("split", "method", "rate", "style", "strength", "image", *MEASURES, "seconds")
#: Photos that learning rates are chosen on.
_TUNING = 1


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows, the table and the pictures.
      data: folder of held-out photos; not needed with `--table`.
      count: photos, spread evenly over the folder; another one chooses the learning rates.
      size: their side in pixels.
      seed: of the samples.
      table: only rewrite the table and the pictures.
      minutes: stop, to go on later, after the batch that ends after so many; 0 for no limit.
      smoke: a tiny run.
    """

    out: Path
    data: Path | None = None
    count: int = 4
    size: int = 64
    seed: int = 0
    table: bool = False
    minutes: float = 0.0
    smoke: bool = False


class Job(NamedTuple):
    """A batch: all photos of a split, in one style."""

    split: str
    method: str
    rate: float
    style: str
    strength: float

    def of(self, row: rows.Row) -> bool:
        """Whether a row is of this batch."""
        return all(row[name] == value for name, value in self._asdict().items())


class _Lab(NamedTuple):
    """What every batch needs."""

    model: Model
    features: Features
    perceptual: Perceptual


def wanted(lab: _Lab, x: Array, style: str) -> tuple[Energy, Energy]:
    """Style and content as energies of pictures of the photos x [B, H, W, 3]."""
    reference = jnp.asarray(load_image(stylize.style_path(style)))[None]
    return energies.style(lab.features, reference), energies.content(lab.features, x)


def target_of(lab: _Lab, x: Array, pair: tuple[Energy, Energy], job: Job) -> Target:
    """What `aps-jax stylize` samples from, or the same without a prior."""
    prior = lab.model.prior
    prior = prior if METHODS[job.method].has_prior else uniform_prior(prior)
    energy = stylize.painting(*pair, job.strength)
    return whole_target(prior, lab.model.codec, x, energy)


@jax.jit
def _measured(
    pair: tuple[Energy, Energy], perceptual: Perceptual, x: Array, found: Array
) -> tuple[Array, ...]:
    return pair[0](found), pair[1](found), perceptual(found, x)


_shown = jax.jit(reconstruct)


def identity(arguments: Arguments) -> dict[str, Any]:
    """Everything that decides the rows but the photos."""
    names = ("count", "size", "seed", "smoke")
    return {name: getattr(arguments, name) for name in names} | {
        "version": aps_jax.__version__,
        "weights": model_facts(model_folder(MODEL)),
        "styles": {s: checkpoint.fingerprint(stylize.style_path(s)) for s in stylize.STYLES},
        "nats": stylize.NATS,
        "style_weight": stylize.STYLE_WEIGHT,
        "config": dataclasses.asdict(_config(arguments)),
    }


def _config(arguments: Arguments) -> Any:
    return config_of(1, 2) if arguments.smoke else config_of()


def jobs(arguments: Arguments, found: Sequence[rows.Row]) -> Iterator[Job]:
    """All batches in their order; `found` must have those of tuning once the test begins."""
    styles, strengths = stylize.STYLES, STRENGTHS
    if arguments.smoke:
        styles, strengths = styles[:1], strengths[1:2]
    for name, method in METHODS.items():
        if len(method.rates) > 1:
            yield from (Job("tuning", name, rate, styles[0], 1.0) for rate in method.rates)
    for style in styles:
        yield from (Job("test", name, 0.0, style, 0.0) for name in UNTOUCHED)
    # The default first: a run that ends early has all methods there.
    first = sorted(strengths, key=lambda strength: strength != 1.0)
    for strength, style, name in itertools.product(first, styles, METHODS):
        yield Job("test", name, chosen_rate(name, found), style, strength)


def chosen_rate(name: str, found: Sequence[rows.Row]) -> float:
    """The learning rate of the least mean energy on the photos of tuning."""

    def energy(rate: float) -> float:
        mine = [
            row for row in found
            if (row["split"], row["method"], row["rate"]) == ("tuning", name, rate)
        ]  # fmt: skip
        return float(np.mean([_energy(row) for row in mine])) if mine else np.inf

    return min(METHODS[name].rates, key=energy)


def _energy(row: Mapping[str, Any]) -> float:
    return row["content"] + stylize.STYLE_WEIGHT * row["strength"] * row["style distance"]


def run(arguments: Arguments) -> None:
    """Computes the missing rows."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of photos")
    began = time.monotonic()
    crop = functools.partial(
        photos.evaluation_crops, arguments.data, size=arguments.size, shrink=2
    )  # fmt: skip
    own: dict[str, Any] = {"count": arguments.count, "offset": 0}
    crops = {"test": crop(**own), "tuning": crop(count=_TUNING, without=own)}
    log = arguments.out / "rows.jsonl"
    with rows.alone(log):
        rows.claim(arguments.out / "run.json", identity(arguments))
        found = rows.read(log, NEEDED)
        perceptual = aps_jax.load_lpips()
        lab = _Lab(aps_jax.load_pretrained(MODEL), vgg_features(perceptual), perceptual)
        for job in jobs(arguments, found):
            if any(job.of(row) for row in found):
                continue
            made = _rows_of(lab, job, crops[job.split], arguments)
            rows.append(log, made)
            found += made
            print(*job, f"{made[0]['seconds']} s", flush=True)
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"stopped after {arguments.minutes:g} minutes; start again to go on")
                return


def _rows_of(lab: _Lab, job: Job, crops: photos.Crops, arguments: Arguments) -> list[rows.Row]:
    x = jnp.asarray(crops.images)
    pair = wanted(lab, x, job.style)
    began = time.perf_counter()
    picture = np.asarray(_picture(lab, job, x, pair, arguments))
    seconds = (time.perf_counter() - began) / len(x)
    values = np.asarray(_measured(pair, lab.perceptual, x, jnp.asarray(picture)))
    made = []
    for place, name in enumerate(crops.names):
        scores = zip(MEASURES, values[:, place].tolist(), strict=True)
        row = job._asdict() | {"image": name, "seconds": round(seconds, 2)}
        made.append(row | {key: round(value, 5) for key, value in scores})
        if job.split == "test":
            save_image(picture_path(arguments.out, made[-1]), picture[place])
    return made


def _picture(
    lab: _Lab, job: Job, x: Array, pair: tuple[Energy, Energy], arguments: Arguments
) -> Array:
    """Pictures [B, H, W, 3] of a batch; seconds of the first of a method have its compilation."""
    if job.method in UNTOUCHED:
        return x if job.method == "photo" else jnp.clip(_shown(lab.model.codec, x), -1, 1)
    target = target_of(lab, x, pair, job)
    config = dataclasses.replace(_config(arguments), learning_rate=job.rate)
    if METHODS[job.method].moves == "codes":
        return painted(target, jax.random.key(arguments.seed), config=config)
    count = config.evaluations().decoder_gradient
    return descended(target, x, jnp.float32(job.rate), num_gradients=count)


def picture_path(out: Path, row: Mapping[str, Any]) -> Path:
    """Where the picture of a row is."""
    name = f"{row['style']}-{row['strength']:g}-{row['method']}".replace(" ", "_").replace(",", "")
    return out / "pictures" / name / f"{Path(row['image']).stem}.png"


@command(
    "styles",
    after_interrupt="finished batches are kept, run the same command to go on",
    memory_cure="lower --count",
)
def main(arguments: Arguments) -> None:
    """Computes what is missing, then writes the table, the plot and the grid."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, count=1)
    if not arguments.table:
        run(arguments)
    found = rows.read(arguments.out / "rows.jsonl", NEEDED)
    if not found:
        raise ValueError(f"{arguments.out} has no rows; leave out --table and give --data")
    text = table(found)
    write_atomically(arguments.out / "table.md", text.encode())
    plot(found, arguments.out / "frontier.png")
    draw_grid(found, lambda row: picture_path(arguments.out, row), arguments.out / "grid.png")
    print(text)
