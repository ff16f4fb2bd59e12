"""Whether the spread of posterior samples tells their error, and whether they agree on anchors.

    python -m experiments.spread --data PHOTOS --out experiments/results/spread
    python -m experiments.spread --study faces --data FACES --out experiments/results/spread_faces

Several samples of every measurement are drawn. Of a calibrated sampler the mean's error at a pixel
has the samples' standard deviation times sqrt(1 + 1/S) as its root mean square; the plot compares
the two, and the table has their rank correlation over the pixels of a photo. Another plot says what
the mean of more samples is worth.

Anchors are the positions that are clean once a quarter of the tokens is: the overlap of a sample is
the mean Jaccard index of its anchors with those of the other samples, which for random positions
would be about 1/7. Whether samples that agree are better is asked within each photo, by the rank
correlation of overlap and PSNR over its samples: between photos both depend on the photo.

Rows are appended to `OUT/rows.jsonl` batch by batch; the same command does only what is missing.
Photos that cannot be read are recorded in `OUT/unreadable.json` and left out; the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax.config import SharedConfig
from aps_jax.io import rows
from aps_jax.io.files import write_atomically, write_json
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.pretrained import Model, model_folder
from aps_jax.sampler import SampleResult
from aps_jax.samplers import sample
from experiments import photos
from experiments.bench import restoring
from experiments.bench.identity import described, model_facts
from experiments.command import command
from experiments.studies import spread_report
from experiments.studies.spread_measures import row_of


@dataclasses.dataclass(frozen=True)
class Study:
    """What is sampled.

    Attributes:
      model: embedded model.
      methods: what differs between them, as options of `make_config`.
      tasks: name and options of the tasks, by what they are called.
      shrink: how many times larger the photos are before they are cut.
      lpips: whether rows have LPIPS, too.
    """

    model: str
    methods: dict[str, dict[str, Any]]
    tasks: dict[str, tuple[str, dict[str, Any]]]
    shrink: int = 2
    lpips: bool = False


#: As many gradients of a sample as the preset "faces", which has 8 steps of 15: refinements after
#: the first are of every particle: 4 + 7 x 4 x 4.
_SMC = {
    "sampler": "aps-smc",
    "num_steps": 8,
    "num_refinements": 8,
    "num_particles": 4,
    "num_inner_steps": 4,
    "learning_rate": 2.0,
    "encoder_start": 0.5,
}
STUDIES = {
    "photos": Study(
        model="photo64",
        methods={
            "categorical draws": {"preset": "draft", "draw": "categorical"},
            # A falling rate would leave later cold starts at the prior.
            "categorical draws, cold start": {
                "preset": "draft",
                "draw": "categorical",
                "warm_start": False,
                "learning_rate": 1.0,
                "learning_rate_schedule": "constant",
            },
            "random remasking": {"preset": "draft", "draw": "quantized", "remasking": "random"},
        },
        tasks={name: (name, {}) for name in ("super_resolution", "inpainting_box")},
    ),
    "faces": Study(
        model="face64",
        methods={
            "aps": {"preset": "balanced", "start_where_measured": True, "remasking": "random"},
            "aps-smc": _SMC,
            "aps-smc, APS's draws alone": _SMC | {"prior_share": 0.0},
        },
        tasks={
            "box 32x32": ("inpainting_box", {"box_size": (32, 32)}),
            "super-resolution x8": ("super_resolution", {"scale": 8}),
        },
        shrink=1,
        lpips=True,
    ),
}
#: What a row must have.
NEEDED = (
    "task", "method", "image", "psnr_of_means", "predicted", "error", "correlation", "overlap",
    "sample_psnr", "sample_overlap", "pixels", "squared_predicted", "squared_error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows, the table and the plots.
      data: folder of held-out photos; not needed with `--table`.
      study: key of `STUDIES`.
      model: embedded model or folder; the study's if left out.
      count: photos, spread evenly over the folder.
      size: their side in pixels.
      num_samples: samples per measurement, at least 2.
      batch_size: photos at once; each has `num_samples` samples in memory.
      sigma: noise standard deviation.
      seed: of the noise and of the samples.
      table: only rewrite table and plots.
      smoke: a tiny run.
    """

    out: Path
    data: Path | None = None
    study: Literal["photos", "faces"] = "photos"
    model: str | None = None
    count: int = 8
    size: int = 64
    num_samples: int = 8
    batch_size: int = 2
    sigma: float = 0.05
    seed: int = 0
    table: bool = False
    smoke: bool = False


def _by_photo(result: SampleResult) -> tuple[np.ndarray, np.ndarray]:
    """Samples [B, S, H, W, 3] and the tokens of every step [B, T, S, L]."""
    return np.asarray(result.samples), np.moveaxis(np.asarray(result.info.trace.tokens), 1, 0)


def model_of(arguments: Arguments) -> str:
    """Name or folder of the model."""
    return arguments.model or STUDIES[arguments.study].model


def config_of(method: str, arguments: Arguments) -> SharedConfig:
    """Configuration of a method."""
    options = STUDIES[arguments.study].methods[method]
    if arguments.smoke:
        options = options | {"num_steps": 3, "num_inner_steps": 1}
        options |= {"num_refinements": 3} if "num_refinements" in options else {}
    # 0 leaves the sampler's own.
    options |= {"sigma": arguments.sigma} if arguments.sigma else {}
    return make_config(
        trace=True, num_samples=arguments.num_samples, data_consistency=0.0, **options
    )


def _described(method: str, arguments: Arguments) -> dict[str, Any]:
    sampler = STUDIES[arguments.study].methods[method].get("sampler", "aps")
    return described(sampler, config_of(method, arguments))


def identity(arguments: Arguments) -> dict[str, Any]:
    """Everything that decides the rows but the photos."""
    names = ("count", "size", "num_samples", "sigma", "seed", "smoke")
    model, methods = model_of(arguments), STUDIES[arguments.study].methods
    return (
        {"model": model}
        | {name: getattr(arguments, name) for name in names}
        | {
            "version": aps_jax.__version__,
            "weights": model_facts(model_folder(model)),
            "methods": {name: _described(name, arguments) for name in methods},
        }
    )


def run(arguments: Arguments) -> int:
    """Computes the missing rows; exit code 1 if a photo could not be read."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of photos")
    if arguments.num_samples < 2:
        raise ValueError("--num-samples must be at least 2: a spread needs two samples")
    study = STUDIES[arguments.study]
    crops = photos.evaluation_crops(
        arguments.data, size=arguments.size, shrink=study.shrink, count=arguments.count
    )
    log = arguments.out / "rows.jsonl"
    with rows.alone(log):
        rows.claim(arguments.out / "run.json", identity(arguments))
        found = rows.read(log, NEEDED)
        photos.require_own(log, (row["image"] for row in found), crops, arguments.data)
        write_json(arguments.out / "unreadable.json", crops.left_out)
        done = {(row["task"], row["method"], row["image"]) for row in found}
        model = aps_jax.load_pretrained(model_of(arguments))
        distance = functools.partial(_distance, aps_jax.load_lpips()) if study.lpips else None
        for task, method in itertools.product(study.tasks, study.methods):
            missing = [i for i, name in enumerate(crops.names) if (task, method, name) not in done]
            _run_method(task, method, missing, crops, model, distance, arguments)
    for name, reason in crops.left_out.items():
        print(f"spread: skipped {name}: {reason}", file=sys.stderr)
    return 1 if crops.unreadable else 0


def _run_method(
    task: str,
    method: str,
    missing: Sequence[int],
    crops: photos.Crops,
    model: Model,
    distance: Callable[..., jax.Array] | None,
    arguments: Arguments,
) -> None:
    """Appends the rows of a task and method for the photos of these indices."""
    config, shape = config_of(method, arguments), (arguments.size,) * 2
    for start in range(0, len(missing), arguments.batch_size):
        index = missing[start : start + arguments.batch_size]
        # Filled up, so that every batch has one shape.
        padded = np.resize(index, arguments.batch_size)
        x = crops.images[padded]
        key, noise, keys = restoring.keys_of(arguments.seed, crops.positions[padded])
        name, options = STUDIES[arguments.study].tasks[task]
        operator = make_operator(name, **options).init(key, shape)
        y = restoring.measured(operator, noise, jnp.asarray(x), arguments.sigma)
        params = aps_jax.Params(model.prior, model.codec, operator)
        result = _sample(params, y, keys, config=config)
        samples, tokens = _by_photo(result)
        found = [
            {"task": task, "method": method, "image": crops.names[i]}
            | row_of(samples[place], tokens[place], model.codec.num_codes, x[place], distance)
            for place, i in enumerate(index)
        ]
        rows.append(arguments.out / "rows.jsonl", found)
        print(f"{task}, {method}: {start + len(index)} of {len(missing)}", flush=True)


_sample = jax.jit(sample, static_argnames="config")
_distance = jax.jit(lambda perceptual, a, b: perceptual(a, b))


@command(
    "spread",
    after_interrupt="finished batches are kept, run the same command to go on",
    memory_cure="lower --batch-size or --num-samples",
)
def main(arguments: Arguments) -> int:
    """Computes what is missing, then writes table and plots; returns the exit code."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, count=2, num_samples=2, size=32)
    code = 0 if arguments.table else run(arguments)
    found = rows.read(arguments.out / "rows.jsonl", NEEDED)
    if not found:
        raise ValueError(f"{arguments.out} has no rows; leave out --table and give --data")
    count = len(found[0]["sample_psnr"])
    text = f"{count} samples per photo.\n\n{spread_report.table(found)}"
    write_atomically(arguments.out / "table.md", text.encode())
    spread_report.plot_calibration(found, arguments.out / "calibration.png")
    spread_report.plot_samples(found, arguments.out / "samples.png")
    print(text)
    return code
