"""Whether the spread of posterior samples tells their error, and whether they agree on anchors.

    python -m experiments.spread --data PHOTOS --out experiments/results/spread

Several samples of every measurement are drawn. Of a calibrated sampler the mean's error at a pixel
has the samples' standard deviation times sqrt(1 + 1/S) as its root mean square; the plot compares
the two, and the table has their rank correlation over the pixels of a photo. Anchors are the
positions that are clean once a quarter of the tokens is: their overlap is the mean Jaccard index of
pairs of samples, which for random positions would be about 1/7.

Rows are appended to `OUT/rows.jsonl` batch by batch; the same command does only what is missing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy import stats

import aps_jax
from aps_jax import metrics
from aps_jax.cli import guarded
from aps_jax.files import write_atomically
from aps_jax.presets import make_config
from aps_jax.pretrained import model_folder
from aps_jax.sampler import SampleResult
from aps_jax.tasks import make_operator
from experiments import photos, rows
from experiments.bench import restoring, study, summary

PRESET = "draft"
#: What differs between samples, as options of the preset.
METHODS: dict[str, dict[str, Any]] = {
    "categorical draws": {"draw": "categorical"},
    # A falling rate would leave later cold starts at the prior.
    "categorical draws, cold start": {
        "draw": "categorical",
        "warm_start": "none",
        "learning_rate": 1.0,
        "learning_rate_schedule": "constant",
    },
    "Gumbel noise 1 on confidence": {"draw": "quantized", "gumbel_temperature": 1.0},
    "random remasking": {"draw": "quantized", "remasking": "random"},
}
TASKS = ("super_resolution", "inpainting_box")
#: Standard deviations are pooled between these edges, of images in [-1, 1].
EDGES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25, 0.35, 2.0)
#: Share of clean tokens at which anchors are compared.
ANCHORED = 0.25


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder of the rows, the table and the plot.
      data: folder of held-out photos; not needed with `--table`.
      model: embedded model or folder.
      count: photos, spread evenly over the folder.
      size: their side in pixels.
      num_samples: samples per measurement, at least 2.
      batch_size: photos at once; each has `num_samples` samples in memory.
      sigma: noise standard deviation.
      seed: of the noise and of the samples.
      table: only rewrite table and plot.
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


def anchor_overlap(tokens: np.ndarray, mask: int) -> float:
    """Mean Jaccard index of the anchors of all pairs of samples.

    Args:
      tokens: [T, S, L], tokens of each sample after every timestep.
      mask: the mask token.
    """
    is_clean = tokens != mask
    steps = np.argmax(is_clean.mean(axis=-1) >= ANCHORED, axis=0)
    sets = is_clean[steps, np.arange(tokens.shape[1])]
    pairs = itertools.combinations(sets, 2)
    return float(np.mean([np.sum(a & b) / np.sum(a | b) for a, b in pairs]))


def row_of(
    samples: np.ndarray, tokens: np.ndarray, mask: int, x: np.ndarray
) -> dict[str, float | list[float]]:
    """What is said of the samples [S, H, W, 3] of one photo, with their tokens [T, S, L]."""
    predicted, error = spread_and_error(samples, x)
    bins = np.clip(np.digitize(predicted, EDGES) - 1, 0, len(EDGES) - 2)
    last = len(EDGES) - 1
    # Samples that do not differ have no order.
    correlation = stats.spearmanr(predicted, error).statistic if np.ptp(predicted) else 0.0
    means = {
        f"psnr_mean_{n}": float(metrics.psnr(samples[:n].mean(axis=0)[None], x[None])[0])
        for n in sorted({1, 2, 4, len(samples)})
        if n <= len(samples)
    }
    return means | {
        "psnr": float(jnp.mean(metrics.psnr(samples, np.broadcast_to(x, samples.shape)))),
        "predicted": float(np.sqrt(np.mean(predicted**2))),
        "error": float(np.sqrt(np.mean(error**2))),
        "correlation": float(correlation),
        "overlap": anchor_overlap(tokens, mask),
        "pixels": np.bincount(bins, minlength=last).tolist(),
        "squared_predicted": np.bincount(bins, predicted**2, minlength=last).tolist(),
        "squared_error": np.bincount(bins, error**2, minlength=last).tolist(),
    }


def _by_photo(result: SampleResult, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples [B, S, H, W, 3] and the tokens of every step [B, T, S, L]."""
    tokens = np.asarray(result.info.trace.tokens)
    tokens = tokens.reshape(tokens.shape[0], -1, batch, tokens.shape[-1])
    return np.asarray(result.samples), np.moveaxis(tokens, 2, 0)


def run(arguments: Arguments) -> None:
    """Computes the missing rows."""
    if arguments.data is None:
        raise ValueError("--data is needed to compute rows; name a folder of photos")
    if arguments.num_samples < 2:
        raise ValueError("--num-samples must be at least 2: a spread needs two samples")
    weights = study.model_facts(model_folder(arguments.model))
    identity = {
        name: getattr(arguments, name)
        for name in ("model", "count", "size", "num_samples", "sigma", "seed", "smoke")
    }
    identity |= {"preset": PRESET, "version": aps_jax.__version__, "weights": weights}
    rows.claim(arguments.out / "run.json", identity)
    model = aps_jax.load_pretrained(arguments.model)
    count, shape = arguments.count, (arguments.size,) * 2
    crops = photos.evaluation_crops(arguments.data, size=arguments.size, shrink=2, count=count)
    log = arguments.out / "rows.jsonl"
    done = {(row["task"], row["method"], row["image"]) for row in rows.read(log)}
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
    for task, (method, options) in itertools.product(TASKS, METHODS.items()):
        missing = [i for i, name in enumerate(crops.names) if (task, method, name) not in done]
        options = options | ({"num_steps": 3, "num_inner_steps": 1} if arguments.smoke else {})
        config = make_config(
            preset=PRESET, trace=True, num_samples=arguments.num_samples, **options
        )
        for start in range(0, len(missing), arguments.batch_size):
            index = missing[start : start + arguments.batch_size]
            padded = np.resize(index, arguments.batch_size)
            x = crops.images[padded]
            key, noise, keys = restoring.keys_of(arguments.seed, crops.positions[padded])
            operator = make_operator(task, shape).init(key, shape)
            y = restoring.measured(operator, noise, jnp.asarray(x), arguments.sigma)
            params = aps_jax.Params(model.prior, model.codec, operator)
            result = sample(params, y, keys, config=config)
            samples, tokens = _by_photo(result, len(padded))
            found = [
                {"task": task, "method": method, "image": crops.names[i]}
                | row_of(samples[place], tokens[place], model.codec.num_codes, x[place])
                for place, i in enumerate(index)
            ]
            rows.append(log, found)
            print(f"{task}, {method}: {start + len(index)} of {len(missing)}", flush=True)


def table(found: Iterable[rows.Row]) -> str:
    """Markdown: means and standard deviations over photos, by task."""
    found = list(found)
    largest = max(int(name[10:]) for name in found[0] if name.startswith("psnr_mean_"))
    columns = {
        "PSNR of a sample, dB": ("psnr", 2),
        f"PSNR of the mean of {largest}, dB": (f"psnr_mean_{largest}", 2),
        "predicted error": ("predicted", 3),
        "error": ("error", 3),
        "rank correlation": ("correlation", 2),
        "overlap of anchors": ("overlap", 2),
    }
    lines = []
    for task in TASKS:
        heads = ["method", "photos", *columns, "correlation of overlap and PSNR over photos"]
        lines += [f"### {task}", "", summary.line(heads), "|" + "---|" * len(heads)]
        for method in METHODS:
            chosen = [row for row in found if (row["task"], row["method"]) == (task, method)]
            if not chosen:
                continue
            cells = [method, str(len(chosen))]
            for name, digits in columns.values():
                values = [row[name] for row in chosen]
                cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}")
            overlap, psnr = ([row[name] for row in chosen] for name in ("overlap", "psnr"))
            is_constant = len(set(overlap)) < 2
            cells.append("–" if is_constant else f"{stats.spearmanr(overlap, psnr).statistic:+.2f}")
            lines.append(summary.line(cells))
        lines.append("")
    return "\n".join(lines)


def plot(found: Iterable[rows.Row], path: Path) -> None:
    """Error against predicted error, pooled over photos; the diagonal is calibration."""
    found = list(found)
    picture, axes = summary.figure(1, len(TASKS), (5, 4.5))
    for axis, task in zip(axes[0], TASKS, strict=True):
        for method in METHODS:
            chosen = [row for row in found if (row["task"], row["method"]) == (task, method)]
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
    summary.save_figure(picture, path)


def spread(arguments: Arguments) -> None:
    """Computes what is missing, then writes table and plot."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, count=2, num_samples=2, size=32)
    if not arguments.table:
        run(arguments)
    found = rows.read(arguments.out / "rows.jsonl", ("task", "method", "image"))
    if not found:
        raise ValueError(f"{arguments.out} has no rows; leave out --table and give --data")
    claimed = json.loads((arguments.out / "run.json").read_text())
    text = f"{claimed['num_samples']} samples per photo.\n\n{table(found)}"
    write_atomically(arguments.out / "table.md", text.encode())
    plot(found, arguments.out / "calibration.png")
    print(text)


def main(arguments: Arguments) -> int:
    """Runs the study; whatever a user can get wrong ends as one line and exit code 2."""
    return guarded(
        lambda: spread(arguments),
        "spread",
        after_interrupt="finished batches are kept, run the same command to go on",
        memory_cure="lower --batch-size or --num-samples",
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
