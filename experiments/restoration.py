"""Restores held-out photos with several methods and tabulates their scores.

    python -m experiments.restoration experiments/configs/restoration.json \
        --data PHOTOS --out experiments/results/restoration

A run may be killed at any point: finished batches are rows in `OUT/rows.jsonl`, and the same
command does only what is missing. `--table` rewrites the Markdown table from the rows alone. The
configuration file holds everything that decides a number: images, tasks, methods, seed. A method
may name the `tasks` it is for and the `count` of photos, the first of the study's, that it gets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

import aps_jax
from aps_jax import metrics, report
from aps_jax.checkpoint import read_card
from aps_jax.files import write_atomically
from aps_jax.likelihood import absolute_error
from aps_jax.pretrained import model_folder
from aps_jax.tasks import make_operator
from aps_jax.tokenizer import reconstruct
from aps_jax.types import Array, Operator, Params, Perceptual, Prior, PyTree, bind
from experiments import photos, training

#: Methods that need no sampler.
REFERENCES = ("codec", "measurement")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      config: JSON file of the study.
      data: folder of held-out photos.
      out: folder of the rows, the table and the pictures.
      table: only rewrite the table from existing rows.
      limit: use only the first so many photos of the configuration; 0 for all.
    """

    config: tyro.conf.Positional[Path]
    out: Path
    data: Path | None = None
    table: bool = False
    limit: int = 0


def uniform_prior(prior: Prior) -> Prior:
    """A prior without an opinion, for the same optimisation without a prior."""
    # The zeros are an argument: as a constant, XLA would spend a minute folding what follows.
    zeros = jnp.zeros(prior.num_codes)
    return Prior(params=zeros, apply=bind(_uniform), num_codes=prior.num_codes)


def _uniform(params: Array, tokens: Array) -> Array:
    return jnp.broadcast_to(params, (*tokens.shape, params.shape[0]))


def run_method(
    method: dict[str, Any], params: Params, x: Array, y: PyTree, keys: Array
) -> tuple[Array, dict[str, float]]:
    """Images of one method for one batch, and its cost per image."""
    kind = method.get("kind", "aps")
    if kind == "codec":
        return jnp.clip(reconstruct(params.codec, x), -1, 1), {}
    if kind == "measurement":
        shown = (report.baseline(one[None], params.operator, x.shape[1:3]) for one in y)
        return jnp.stack([image for _, image in shown]), {}
    config = aps_jax.APSConfig(**method["config"])
    if method.get("prior") == "none":
        params = params.replace(prior=uniform_prior(params.prior))
    result = _sample(params, y, keys, config=config)
    if not bool(jnp.all(result.info.is_finite)):
        raise FloatingPointError(f"{method} met a non-finite loss")
    return result.images, {
        "denoiser_evaluations": config.num_steps,
        "decoder_evaluations": float(jnp.mean(jnp.sum(result.info.num_inner_steps, axis=0))),
    }


_sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


@jax.jit
def _scores(
    operator: Operator, perceptual: Perceptual | None, images: Array, x: Array, y: PyTree
) -> dict[str, Array]:
    scores = {
        "psnr": metrics.psnr(images, x),
        "ssim": metrics.ssim(images, x),
        "residual": absolute_error(operator, operator(images), y),
    }
    if perceptual is not None:
        scores["lpips"] = perceptual(jnp.clip(images, -1, 1), x)
    return scores


def run(arguments: Arguments) -> None:
    """Computes the missing rows of a study."""
    study = json.loads(arguments.config.read_text())
    if arguments.data is None:
        raise SystemExit("restoration: --data is needed to compute rows")
    names, images = photos.center_crops(arguments.data, **study["images"])
    if arguments.limit:
        names, images = names[: arguments.limit], images[: arguments.limit]
    model = aps_jax.load_pretrained(study["model"])
    perceptual = aps_jax.load_lpips() if study["lpips"] else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "rows.jsonl"
    done = {(r["task"], r["method"], r["fingerprint"], r["image"]) for r in _read_rows(log)}
    key = jax.random.key(study["seed"])

    for task, options in study["tasks"].items():
        operator = make_operator(task, images.shape[1:3], **options)
        operator = operator.init(jax.random.fold_in(key, 1), images.shape[1:3])
        for name, method in study["methods"].items():
            if task not in method.get("tasks", study["tasks"]):
                continue
            fingerprint = _fingerprint(study, task, method)
            params = Params(model.prior, model.codec, operator, perceptual)
            chosen = names[: method.get("count")]
            starts = range(0, len(chosen), study["batch_size"])
            for start in track(starts, f"{task} {name}"):
                batch = chosen[start : start + study["batch_size"]]
                if all((task, name, fingerprint, image) in done for image in batch):
                    continue
                # The last batch is filled up, so that every batch has one shape.
                index = np.minimum(np.arange(start, start + study["batch_size"]), len(names) - 1)
                x = jnp.asarray(images[index])
                keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index) + 2)
                keys = jax.vmap(jax.random.split)(keys)
                y = aps_jax.measure(keys[:, 0], x, operator=operator, sigma=study["sigma"])
                began = time.perf_counter()
                restored, cost = run_method(method, params, x, y, keys[:, 1])
                restored = jax.block_until_ready(restored)
                seconds = (time.perf_counter() - began) / len(index)
                scores = jax.device_get(_scores(operator, perceptual, restored, x, y))
                for row, image in enumerate(batch):
                    values = {metric: round(float(v[row]), 5) for metric, v in scores.items()}
                    training.append_row(
                        log,
                        {"task": task, "method": name, "fingerprint": fingerprint, "image": image}
                        | values | cost | {"seconds": round(seconds, 3)},
                    )  # fmt: skip
                if start == 0:
                    pictures = arguments.out / "pictures" / f"{task}-{name}.npy"
                    pictures.parent.mkdir(exist_ok=True)
                    np.save(pictures, np.stack([np.asarray(restored), np.asarray(x)]))


def _fingerprint(study: dict[str, Any], task: str, method: dict[str, Any]) -> str:
    """Names everything that decides a row, so that rows of another configuration are not reused."""
    card = read_card(model_folder(study["model"]))
    facts = [study["images"], study["sigma"], study["seed"], study["tasks"][task]]
    where = ("tasks", "count")
    facts.append({name: value for name, value in method.items() if name not in where})
    facts += [card.get("codec_training"), card.get("prior_training")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _read_rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def table(study: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over images, and the paired gain over `compare_to`.

    The gain is the mean difference in PSNR and LPIPS to the same images restored by the reference
    method of the study, with its 95 % confidence half-width (normal approximation).
    """
    lines = []
    for task in study["tasks"]:
        lines += [f"### {task}", ""]
        lines += [
            "| method | photos | PSNR, dB | SSIM | LPIPS | residual | decoder evaluations | "
            f"PSNR gain over {study['compare_to']} | LPIPS gain |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        reference = _select(study, rows, task, study["compare_to"])
        for name in study["methods"]:
            chosen = _select(study, rows, task, name)
            if not chosen:
                continue
            cells = [_spread(chosen, metric, digits) for metric, digits in
                     (("psnr", 2), ("ssim", 3), ("lpips", 3), ("residual", 4))]  # fmt: skip
            evaluations = next(iter(chosen.values())).get("decoder_evaluations")
            cells.append("–" if evaluations is None else f"{evaluations:.0f}")
            if name == study["compare_to"]:
                cells += ["–", "–"]
            else:
                cells += [_gain(chosen, reference, "psnr", 2), _gain(chosen, reference, "lpips", 3)]
            lines.append(f"| {name} | {len(chosen)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _select(study: dict, rows: list[dict], task: str, name: str) -> dict[str, dict]:
    fingerprint = _fingerprint(study, task, study["methods"][name])
    wanted = (task, name, fingerprint)
    return {r["image"]: r for r in rows if (r["task"], r["method"], r["fingerprint"]) == wanted}


def _spread(rows: dict[str, dict], metric: str, digits: int) -> str:
    values = [row[metric] for row in rows.values() if metric in row]
    if not values:
        return "–"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _gain(rows: dict[str, dict], reference: dict[str, dict], metric: str, digits: int) -> str:
    pairs = [
        rows[image][metric] - reference[image][metric]
        for image in rows.keys() & reference.keys()
        if metric in rows[image]
    ]
    if len(pairs) < 2:
        return "–"
    half_width = 1.96 * np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return f"{np.mean(pairs):+.{digits}f} ± {half_width:.{digits}f}"


def main(arguments: Arguments) -> None:
    """Computes what is missing, then writes the table."""
    if not arguments.table:
        run(arguments)
    study = json.loads(arguments.config.read_text())
    text = table(study, _read_rows(arguments.out / "rows.jsonl"))
    write_atomically(arguments.out / "table.md", (text + "\n").encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
