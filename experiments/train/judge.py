"""Fits the judge of edits: least squares of attributes on gradient histograms and colours.

    python -m experiments.train.judge --data CELEBA --attributes celeba_attributes.csv \
        --out experiments/results/judges/attributes64

It sees files 4,751 to 9,500, each mirrored too, and the first of them also as the codec of `face64`
shows them, with noise on their codes. The ridge is chosen on the last sixth of the files, then all
are used. The bias of an attribute puts 0 midway between the means of faces with it and without.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import save

from aps_jax.cli.errors import guarded
from aps_jax.images import from_uint8
from aps_jax.io import checkpoint
from aps_jax.io.files import write_atomically
from experiments.judge import WEIGHTS, features
from experiments.train.attributes import ATTRIBUTES, decoded, load_faces, scores_of

#: Candidates for the weight of the squared weights, of standardised features.
RIDGES = (1000.0, 3000.0, 10000.0, 30000.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Command line.

    Attributes:
      data: folder of aligned faces of 64x64 pixels.
      attributes: CSV file with a column `file` and one per attribute of CelebA.
      out: folder of the judge.
      first: number of the first file, counted from 1.
      last: number of the last one.
      num_decoded: faces that are also seen as the codec shows them.
      code_noise: noise on their codes, as for `train_codec`.
      cache: file that keeps the decoded faces, which take longest.
      seed: of the noise.
    """

    data: Path
    attributes: Path
    out: Path
    first: int = 4751
    last: int = 9500
    num_decoded: int = 1600
    code_noise: float = 0.35
    cache: Path | None = None
    seed: int = 1


def fit(x: np.ndarray, labels: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [F, A] and biases [A] of features [N, F] and labels bool [N, A]."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    x = (x - mean) / scale
    signs = 2.0 * labels - 1
    normal = (x.T @ x).astype(np.float64) + ridge * np.eye(x.shape[1])
    weights = np.linalg.solve(normal, x.T.astype(np.float64) @ (signs - signs.mean(axis=0)))
    scores = x @ weights
    middle = [
        (score[has].mean() + score[~has].mean()) / 2
        for score, has in zip(scores.T, labels.T, strict=True)
    ]
    weights = weights / scale[:, None]
    return weights.astype(np.float32), (-np.array(middle) - mean @ weights).astype(np.float32)


def seen(faces: np.ndarray) -> np.ndarray:
    """Features of faces uint8 [N, 64, 64, 3] and of their mirror images, [2 N, F]."""
    both = np.concatenate([faces, faces[:, :, ::-1]])
    parts = [features(from_uint8(both[at : at + 500])) for at in range(0, len(both), 500)]
    return np.concatenate(parts)


def run(config: Config) -> None:
    """Chooses the ridge, fits and writes."""
    faces, labels = load_faces((config.data,), config.attributes, config.first, config.last)
    if config.cache is not None and config.cache.exists():
        shown = np.load(config.cache)
    else:
        shown = decoded(faces[: config.num_decoded], config.seed, config.code_noise)
        if config.cache is not None:
            np.save(config.cache, shown)
    own, of_shown = seen(faces), seen(shown)
    own_labels, shown_labels = np.tile(labels, (2, 1)), np.tile(labels[: len(shown)], (2, 1))
    # The decoded ones are of the first files, so none of them is among the last sixth.
    is_kept = np.tile(np.arange(len(faces)) >= len(faces) * 5 // 6, 2)
    train_x = np.concatenate([own[~is_kept], of_shown])
    train_labels = np.concatenate([own_labels[~is_kept], shown_labels])
    quality = {}
    for ridge in RIDGES:
        weights, bias = fit(train_x, train_labels, ridge)
        auc = scores_of(own[is_kept] @ weights + bias, own_labels[is_kept])["auc"]
        quality[ridge] = round(float(np.nanmean(auc)), 4)
        print(f"ridge {ridge:g}: mean AUC {quality[ridge]}", flush=True)
    best = max(quality, key=lambda ridge: quality[ridge])
    weights, bias = fit(
        np.concatenate([own, of_shown]), np.concatenate([own_labels, shown_labels]), best
    )
    tensors = {"weights": weights.astype(np.float16), "bias": bias}
    write_atomically(config.out / WEIGHTS, save(tensors))
    checkpoint.update_card(
        config.out,
        judge={
            "names": list(ATTRIBUTES), "files": f"{config.first} to {config.last}",
            "faces": len(faces), "decoded": len(shown), "code_noise": config.code_noise,
            "ridge": best, "auc_by_ridge": {f"{key:g}": value for key, value in quality.items()},
        },
        licence="non-commercial research only, as CelebA, to which the weights were fitted",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(tyro.cli(Config)), "judge"))
