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
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import aps_jax
from aps_jax import metrics
from aps_jax.config import APSConfig
from aps_jax.io import rows
from aps_jax.io.files import write_atomically, write_json
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.pretrained import Model, model_folder
from aps_jax.sampler import SampleResult
from experiments import photos
from experiments.bench import plots, restoring, summary
from experiments.bench.identity import described, model_facts
from experiments.command import command

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
#: Standard deviations are pooled between these edges, of images in [-1, 1].
EDGES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25, 0.35, 2.0)
#: Share of clean tokens at which anchors are compared.
ANCHORED = 0.25
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


def spread_and_error(samples: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and real error of the mean at every pixel and channel.

    Args:
      samples: [S, H, W, 3], S of at least 2.
      x: the photo [H, W, 3].

    Returns:
      sqrt(1 + 1/S) times the unbiased standard deviation, and |mean - x|, both flat.
    """
    count = len(samples)
    predicted = np.std(samples, axis=0, ddof=1) * math.sqrt(1 + 1 / count)
    return predicted.ravel(), np.abs(np.mean(samples, axis=0) - x).ravel()


def anchor_overlaps(tokens: np.ndarray, mask: int) -> np.ndarray:
    """Mean Jaccard index of the anchors of each sample with those of the others, [S].

    Args:
      tokens: [T, S, L], tokens of each sample after every timestep.
      mask: the mask token.
    """
    is_clean = tokens != mask
    steps = np.argmax(is_clean.mean(axis=-1) >= ANCHORED, axis=0)
    sets = is_clean[steps, np.arange(tokens.shape[1])]
    shared = np.sum(sets[:, None] & sets, axis=-1)
    index = shared / np.sum(sets[:, None] | sets, axis=-1)
    return (index.sum(axis=1) - 1) / (len(sets) - 1)


def psnr_of_means(samples: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """PSNR of the mean of n samples by n, powers of two and S, over groups without overlap.

    Args:
      samples: [S, H, W, 3].
      x: the photo [H, W, 3].
    """
    count = len(samples)
    found = {}
    for n in sorted({2**power for power in range(count.bit_length())} | {count}):
        groups = samples[: count // n * n].reshape(count // n, n, *x.shape).mean(axis=1)
        found[str(n)] = float(np.mean(_psnr(groups, x)))
    return found


def _psnr(images: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(metrics.psnr(images, np.broadcast_to(x, images.shape)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, or None where one of the two does not vary and has no order."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else None


def row_of(samples: np.ndarray, tokens: np.ndarray, mask: int, x: np.ndarray) -> rows.Row:
    """What is said of the samples [S, H, W, 3] of one photo, with their tokens [T, S, L]."""
    predicted, error = spread_and_error(samples, x)
    bins = np.clip(np.digitize(predicted, EDGES) - 1, 0, len(EDGES) - 2)
    last = len(EDGES) - 1
    overlaps = anchor_overlaps(tokens, mask)
    return {
        "psnr_of_means": psnr_of_means(samples, x),
        "predicted": float(np.sqrt(np.mean(predicted**2))),
        "error": float(np.sqrt(np.mean(error**2))),
        "correlation": rank_correlation(predicted, error) or 0.0,
        "overlap": float(np.mean(overlaps)),
        "sample_psnr": _psnr(samples, x).tolist(),
        "sample_overlap": overlaps.tolist(),
        "pixels": np.bincount(bins, minlength=last).tolist(),
        "squared_predicted": np.bincount(bins, predicted**2, minlength=last).tolist(),
        "squared_error": np.bincount(bins, error**2, minlength=last).tolist(),
    }


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


def _chosen(found: Iterable[rows.Row], task: str, method: str) -> list[rows.Row]:
    return [row for row in found if (row["task"], row["method"]) == (task, method)]


def agreement(found: Iterable[rows.Row]) -> tuple[list[float], summary.Gain | None]:
    """Rank correlations, per photo, of its samples' overlap and PSNR; their mean and interval."""
    values = [rank_correlation(row["sample_overlap"], row["sample_psnr"]) for row in found]
    values = [value for value in values if value is not None]
    return values, summary.interval(values)


def table(found: Iterable[rows.Row]) -> str:
    """Markdown: means and standard deviations over photos, by task."""
    found = list(found)
    most = max(int(n) for row in found for n in row["psnr_of_means"])
    columns = {
        "PSNR of a sample, dB": (lambda row: row["psnr_of_means"]["1"], 2),
        f"PSNR of the mean of {most}, dB": (lambda row: row["psnr_of_means"][str(most)], 2),
        "predicted error": (lambda row: row["predicted"], 3),
        "error": (lambda row: row["error"], 3),
        "rank correlation": (lambda row: row["correlation"], 2),
        "overlap of anchors": (lambda row: row["overlap"], 2),
    }
    lines = []
    for task in TASKS:
        heads = ["method", "photos", *columns, "overlap and PSNR of a photo's samples, 95 %"]
        lines += [f"### {task}", "", summary.line(heads), "|" + "---|" * len(heads)]
        for method in METHODS:
            chosen = _chosen(found, task, method)
            if not chosen:
                continue
            cells = [method, str(len(chosen))]
            for value_of, digits in columns.values():
                values = [value_of(row) for row in chosen]
                cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}")
            values, mean = agreement(chosen)
            fewer = f" ({len(values)})" if len(values) < len(chosen) else ""
            cells.append(f"{mean.mean:+.2f} ± {mean.half_width:.2f}{fewer}" if mean else "–")
            lines.append(summary.line(cells))
        lines.append("")
    return "\n".join(lines)


def plot_calibration(found: Iterable[rows.Row], path: Path) -> None:
    """Error against predicted error, pooled over photos; the diagonal is calibration."""
    found = list(found)
    picture, axes = plots.figure(1, len(TASKS), (5, 4.5))
    for axis, task in zip(axes[0], TASKS, strict=True):
        for method in METHODS:
            chosen = _chosen(found, task, method)
            if not chosen:
                continue
            pixels, predicted, error = (
                np.sum([row[name] for row in chosen], axis=0)
                for name in ("pixels", "squared_predicted", "squared_error")
            )
            # Fewer pixels than these say nothing.
            is_full = pixels >= 100
            x, y = (np.sqrt(sums[is_full] / pixels[is_full]) for sums in (predicted, error))
            axis.plot(x, y, marker="o", markersize=4, label=method)
        limit = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, limit], [0, limit], color="grey", linewidth=1, linestyle="--")
        axis.set_xlabel("predicted error (spread of the samples)")
        axis.set_ylabel("error of their mean")
        axis.set_title(task, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    plots.save_figure(picture, path)


def gains_of_means(found: Iterable[rows.Row]) -> list[tuple[int, float, float]]:
    """By n: n, the mean PSNR of the mean of n samples, the interval of its gain over n = 1."""
    scores = [row["psnr_of_means"] for row in found]
    level = np.mean([photo["1"] for photo in scores])
    curve = []
    for n in sorted(map(int, scores[0])):
        gains = [photo[str(n)] - photo["1"] for photo in scores]
        between = summary.interval(gains)
        curve.append((n, float(level + np.mean(gains)), between.half_width if between else 0.0))
    return curve


def plot_samples(found: Iterable[rows.Row], path: Path) -> None:
    """PSNR of the mean of n samples against n, with intervals of the gain over one sample."""
    found = list(found)
    picture, axes = plots.figure(1, len(TASKS), (5, 4))
    for axis, task in zip(axes[0], TASKS, strict=True):
        numbers = set()
        for method in METHODS:
            chosen = _chosen(found, task, method)
            if chosen:
                xs, means, errors = zip(*gains_of_means(chosen), strict=True)
                numbers |= set(xs)
                axis.errorbar(xs, means, yerr=errors, marker="o", capsize=3, label=method)
        if numbers:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(numbers), sorted(numbers))
            axis.legend(fontsize=8)
        axis.set_xlabel("samples in the mean")
        axis.set_title(f"{task}: PSNR, dB", fontsize=9)
        axis.grid(alpha=0.3)
    picture.suptitle("intervals are of the gain over one sample", fontsize=9)
    plots.save_figure(picture, path)


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
    text = f"{count} samples per photo.\n\n{table(found)}"
    write_atomically(arguments.out / "table.md", text.encode())
    plot_calibration(found, arguments.out / "calibration.png")
    plot_samples(found, arguments.out / "samples.png")
    print(text)
    return code
