"""Whether the spread of posterior samples tells their error, and whether they agree on anchors.

    python -m experiments.spread --data PHOTOS --out experiments/results/spread

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
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax.config import APSConfig
from aps_jax.io import rows
from aps_jax.io.files import write_atomically, write_json
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.pretrained import Model, model_folder
from aps_jax.sampler import SampleResult
from experiments import photos
from experiments.bench import restoring
from experiments.bench.identity import described, model_facts
from experiments.command import command
from experiments.studies import spread_report
from experiments.studies.spread_measures import row_of

PRESET = "draft"
#: What differs between samples, as options of the preset.
METHODS: dict[str, dict[str, Any]] = {
    "categorical draws": {"draw": "categorical"},
    # A falling rate would leave later cold starts at the prior.
    "categorical draws, cold start": {
        "draw": "categorical",
        "warm_start": False,
        "learning_rate": 1.0,
        "learning_rate_schedule": "constant",
    },
    "random remasking": {"draw": "quantized", "remasking": "random"},
}
TASKS = ("super_resolution", "inpainting_box")
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
      model: embedded model or folder.
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
    model: str = "photo64"
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


def config_of(method: str, arguments: Arguments) -> APSConfig:
    """Configuration of a method."""
    options = METHODS[method] | ({"num_steps": 3, "num_inner_steps": 1} if arguments.smoke else {})
    # 0 leaves the sampler's own.
    options |= {"sigma": arguments.sigma} if arguments.sigma else {}
    return make_config(preset=PRESET, trace=True, num_samples=arguments.num_samples, **options)


def identity(arguments: Arguments) -> dict[str, Any]:
    """Everything that decides the rows but the photos."""
    names = ("model", "count", "size", "num_samples", "sigma", "seed", "smoke")
    return {name: getattr(arguments, name) for name in names} | {
        "version": aps_jax.__version__,
        "weights": model_facts(model_folder(arguments.model)),
        "methods": {name: described("aps", config_of(name, arguments)) for name in METHODS},
    }


def run(arguments: Arguments) -> int:
    """Computes the missing rows; exit code 1 if a photo could not be read."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of photos")
    if arguments.num_samples < 2:
        raise ValueError("--num-samples must be at least 2: a spread needs two samples")
    crops = photos.evaluation_crops(
        arguments.data, size=arguments.size, shrink=2, count=arguments.count
    )
    log = arguments.out / "rows.jsonl"
    with rows.alone(log):
        rows.claim(arguments.out / "run.json", identity(arguments))
        found = rows.read(log, NEEDED)
        photos.require_own(log, (row["image"] for row in found), crops, arguments.data)
        write_json(arguments.out / "unreadable.json", crops.left_out)
        done = {(row["task"], row["method"], row["image"]) for row in found}
        model = aps_jax.load_pretrained(arguments.model)
        for task, method in itertools.product(TASKS, METHODS):
            missing = [i for i, name in enumerate(crops.names) if (task, method, name) not in done]
            _run_method(task, method, missing, crops, model, arguments)
    for name, reason in crops.left_out.items():
        print(f"spread: skipped {name}: {reason}", file=sys.stderr)
    return 1 if crops.unreadable else 0


def _run_method(
    task: str,
    method: str,
    missing: Sequence[int],
    crops: photos.Crops,
    model: Model,
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
        operator = make_operator(task).init(key, shape)
        y = restoring.measured(operator, noise, jnp.asarray(x), arguments.sigma)
        params = aps_jax.Params(model.prior, model.codec, operator)
        result = _sample(params, y, keys, config=config)
        samples, tokens = _by_photo(result)
        found = [
            {"task": task, "method": method, "image": crops.names[i]}
            | row_of(samples[place], tokens[place], model.codec.num_codes, x[place])
            for place, i in enumerate(index)
        ]
        rows.append(arguments.out / "rows.jsonl", found)
        print(f"{task}, {method}: {start + len(index)} of {len(missing)}", flush=True)


_sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


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
