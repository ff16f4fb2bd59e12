"""What prompts and rewards are worth for edits of faces, at equal decoder evaluations.

    python -m experiments.edits --data HELD_OUT_FACES --out experiments/results/edits

A box over the eyes or over the mouth is drawn anew, everything else is given. An edit succeeds if
the judge (`experiments.judge`), which is of another kind than the reward and was fitted to other
faces, says that the wish is fulfilled. Each wish is asked of faces that do not fulfil it yet,
neither for the judge nor for the reward's network, so that nothing succeeds by itself; what the
judge says after the codec alone is in the table. What an edit costs the rest is said by the change
outside the box, in decibels: to the original, beside the codec's own, and to the codec's picture,
which is what the edit itself has moved. LPIPS to the original is of the whole picture.

Rows are appended to `OUT/rows.jsonl` batch by batch; the same command does only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import energies
from aps_jax.codec.magvit2 import reconstruct
from aps_jax.faces import attributes
from aps_jax.faces.attributes import Attributes
from aps_jax.images import save_image
from aps_jax.io import checkpoint, rows
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import load_codec, load_prior, model_folder
from aps_jax.samplers import sample_target
from aps_jax.sampling.edits import part_target
from aps_jax.types import Array, Codec, Energy, Key, Perceptual, Prior
from experiments import photos
from experiments.bench.identity import model_facts
from experiments.command import command
from experiments.studies.edit_methods import (
    BUDGET,
    CASES,
    METHODS,
    REWARD_WEIGHT,
    STEPS,
    UNTOUCHED,
    Case,
    Method,
    config_of,
    kept,
)
from experiments.studies.edit_pictures import ask_judge, draw_grids, needing, picture_path
from experiments.studies.edit_table import table

MODEL = "face64"
NEEDED = ("case", "method", "image", "reward", "outside", "codec_outside", "moved", "lpips")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows and the table.
      data: folder of held-out aligned faces; not needed with `--table`.
      count: faces of each case, spread evenly over those of the folder that need the edit.
      batch_size: faces at once.
      seed: of the samples.
      reward_weight: of the reward, beside the prior.
      cases: only these.
      methods: only these.
      table: only rewrite the table.
      minutes: stop, to go on later, after the batch that ends after so many; 0 for no limit.
      smoke: a tiny run.
    """

    out: Path
    data: Path | None = None
    count: int = 16
    batch_size: int = 4
    seed: int = 0
    reward_weight: float = REWARD_WEIGHT
    cases: tuple[str, ...] = tuple(CASES)
    methods: tuple[str, ...] = tuple(METHODS)
    table: bool = False
    minutes: float = 0.0
    smoke: bool = False


@functools.partial(jax.jit, static_argnames=("case", "method", "config"))
def edit(
    prior: Prior,
    codec: Codec,
    reward: Energy | None,
    x: Array,
    keys: Key,
    *,
    case: Case,
    method: Method,
    config: Any,
) -> Array:
    """Edited faces [B, H, W, 3]; of the case only the box is looked at."""
    target = part_target(
        prior, codec, x, kept(case, x.shape[1]), reward=reward,
        guidance_scale=method.guidance_scale or None,
    )  # fmt: skip
    return sample_target(target, keys, config=config).images


def reward_of(net: Attributes, case: Case, weight: float) -> Energy:
    """The wish of a case as an energy; the same function for the same attribute, other arrays."""
    return energies.scaled(energies.classifier(net, {case.attribute: case.value}), weight)


def decibels(difference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """PSNR [B] of differences [B, H, W, 3] of images in [-1, 1], where the mask is 1."""
    squares = np.sum(difference**2 * mask[..., None], axis=(1, 2, 3)) / (3 * mask.sum())
    return 10 * np.log10(4 / np.maximum(squares, 1e-10))


class _Lab(NamedTuple):
    """What every batch needs."""

    codec: Codec
    priors: dict[str | None, Prior]
    reward: Attributes
    perceptual: Perceptual
    compiled: dict[Any, Any]


def _lab(arguments: Arguments) -> _Lab:
    folder = model_folder(MODEL)
    priors: dict[str | None, Prior] = {
        name: load_prior(folder, prompt=CASES[name].prompt, negative=CASES[name].negative)
        for name in arguments.cases
    }
    priors[None] = load_prior(folder)
    return _Lab(
        load_codec(folder), priors, aps_jax.load_attributes(), aps_jax.load_lpips(), {}
    )  # fmt: skip


_scored = jax.jit(lambda net, x: net(x))
_distance = jax.jit(lambda perceptual, a, b: perceptual(a, b))
_shown = jax.jit(reconstruct)


def _rows_of(
    lab: _Lab, case: str, method: str, names: Sequence[str], x: np.ndarray, found: np.ndarray
) -> list[rows.Row]:
    mask, wanted = kept(CASES[case], x.shape[1]), CASES[case].attribute
    shown = np.clip(np.asarray(_shown(lab.codec, x)), -1, 1)
    values = {
        "reward": np.asarray(_scored(lab.reward, found))[:, lab.reward.index(wanted)],
        "outside": decibels(found - x, mask),
        "codec_outside": decibels(shown - x, mask),
        "moved": decibels(found - shown, mask),
        "lpips": np.asarray(_distance(lab.perceptual, found, x)),
    }
    return [
        {"case": case, "method": method, "image": name}
        | {key: round(float(value[place]), 5) for key, value in values.items()}
        for place, name in enumerate(names)
    ]


def identity(arguments: Arguments) -> dict[str, Any]:
    """Everything that decides the rows but the faces."""
    names = ("count", "seed", "reward_weight", "smoke")
    return {name: getattr(arguments, name) for name in names} | {
        "version": aps_jax.__version__,
        "weights": model_facts(model_folder(MODEL)),
        "reward": checkpoint.fingerprint(attributes.EMBEDDED / "attributes.safetensors"),
        "cases": {name: case._asdict() for name, case in CASES.items()},
        "methods": {
            name: method._asdict()
            | {"config": dataclasses.asdict(config_of(method, _budget(arguments)))}
            for name, method in METHODS.items()
        },
    }  # fmt: skip


def _budget(arguments: Arguments) -> int:
    return 2 * STEPS if arguments.smoke else BUDGET


def run(arguments: Arguments) -> None:
    """Computes the missing rows."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of aligned faces")
    began = time.monotonic()
    names, faces = photos.center_crops(arguments.data, size=64, shrink=1)
    log = arguments.out / "rows.jsonl"
    with rows.alone(log):
        rows.claim(arguments.out / "run.json", identity(arguments))
        done = {(r["case"], r["method"], r["image"]) for r in rows.read(log, NEEDED)}
        lab = _lab(arguments)
        scores = np.asarray(_scored(lab.reward, faces))
        chosen = {
            name: needing(CASES[name], faces, scores[:, lab.reward.index(CASES[name].attribute)])
            for name in arguments.cases
        }
        chosen = {name: photos.spread(some, arguments.count) for name, some in chosen.items()}
        # Faces are the outer loop: a run that ends early has all methods on the first faces.
        starts = range(0, arguments.count, arguments.batch_size)
        for start, case, method in itertools.product(
            starts, arguments.cases, (*UNTOUCHED, *arguments.methods)
        ):
            index = np.asarray(chosen[case][start : start + arguments.batch_size], int)
            batch = [names[i] for i in index]
            if all((case, method, name) in done for name in batch):
                continue
            _run_batch(lab, case, method, batch, faces[index], index, arguments)
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"stopped after {arguments.minutes:g} minutes; start again to go on")
                return


def _run_batch(
    lab: _Lab,
    case: str,
    method: str,
    names: Sequence[str],
    x: np.ndarray,
    index: np.ndarray,
    arguments: Arguments,
) -> None:
    seconds = 0.0
    if method == "original":
        found = x
    elif method == "codec":
        found = np.clip(np.asarray(_shown(lab.codec, x)), -1, 1)
    else:
        found, seconds = _edited(lab, case, METHODS[method], x, index, arguments)
    made = _rows_of(lab, case, method, names, x, found)
    for row, picture in zip(made, found, strict=True):
        row["seconds"] = round(seconds, 3)
        save_image(picture_path(arguments.out, row), picture)
    rows.append(arguments.out / "rows.jsonl", made)
    print(f"{case}, {method}: {', '.join(names)}", flush=True)


def _edited(
    lab: _Lab, name: str, method: Method, x: np.ndarray, index: np.ndarray, arguments: Arguments
) -> tuple[np.ndarray, float]:
    """Edited faces, and the seconds of one, those of compilation left out."""
    # Filled up, so that every batch has one shape.
    padded = np.resize(np.arange(len(x)), arguments.batch_size)
    positions = jnp.asarray(np.resize(index, arguments.batch_size))
    key = jax.random.key(arguments.seed)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(positions)
    case, prior = CASES[name], lab.priors[name if method.is_prompted else None]
    reward = None
    if method.is_rewarded:
        reward = reward_of(lab.reward, case, arguments.reward_weight)
    given = (prior, lab.codec, reward, jnp.asarray(x[padded]), keys)
    # Both directions of an edit share a program where their prompts are equally long: prompts and
    # wishes are arrays.
    form = (case.attribute, method, *map(jnp.shape, jax.tree.leaves(prior)))
    if form not in lab.compiled:
        config = config_of(method, _budget(arguments))
        lab.compiled[form] = edit.lower(*given, case=case, method=method, config=config).compile()
    clock = time.perf_counter()
    found = np.asarray(lab.compiled[form](*given))[: len(x)]
    return found, (time.perf_counter() - clock) / arguments.batch_size


@command(
    "edits",
    after_interrupt="finished batches are kept, run the same command to go on",
    memory_cure="lower --batch-size",
)
def main(arguments: Arguments) -> int:
    """Computes what is missing, then writes the table; returns the exit code."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, count=1, batch_size=1)
    if not arguments.table:
        run(arguments)
    found = rows.read(arguments.out / "rows.jsonl", NEEDED)
    if not found:
        raise ValueError(f"{arguments.out} has no rows; leave out --table and give --data")
    text = table(found, ask_judge(arguments.out, found))
    write_atomically(arguments.out / "table.md", text.encode())
    draw_grids(arguments.out, found)
    print(text)
    return 0
