"""Fits the score that tells aligned faces from other pictures, and counts its errors.

    python -m experiments.train.framing --faces CELEBA LFW --photos PHOTOS --eval-faces HELD_OUT \
        --eval-photos OTHER_PHOTOS --out aps_jax/data/framing64

Least squares on the gradient histograms of aligned faces (also slightly moved and enlarged)
against crops of photos and faces that are out of place; both kinds weigh the same.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from safetensors.numpy import save

from aps_jax.cli.errors import guarded
from aps_jax.faces.framing import NUM_FEATURES, gradient_histograms, seen_grey
from aps_jax.images import from_uint8
from aps_jax.io import checkpoint
from aps_jax.io.files import write_atomically
from experiments import photos

#: Moves of held-out faces whose misses are counted: (right, down) in sides, and enlargement.
MOVES = {
    "moved by 0.1 of the side": ((0.1, 0.0, 1.0), (0.0, 0.1, 1.0)),
    "moved by 0.2 of the side": ((0.2, 0.0, 1.0), (0.0, 0.2, 1.0)),
    "enlarged 1.3 times": ((0.0, 0.0, 1.3),),
    "enlarged 1.6 times": ((0.0, 0.0, 1.6),),
    "reduced 0.8 times": ((0.0, 0.0, 0.8),),
    "reduced 0.7 times": ((0.0, 0.0, 0.7),),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the fit.

    Attributes:
      faces: folders of aligned faces.
      photos: folders of other pictures.
      eval_faces: folder of held-out aligned faces.
      eval_photos: folder of held-out pictures.
      out: folder for the weights and their card.
      max_faces: faces taken of each folder, evenly spread.
      num_crops: crops of photos.
      ridge: weight of the squared weights.
      seed: of crops and moves.
      description: what the data are, for the card.
    """

    faces: tuple[Path, ...]
    photos: tuple[Path, ...]
    eval_faces: Path
    eval_photos: Path
    out: Path
    max_faces: int = 4000
    num_crops: int = 6000
    ridge: float = 1e-3
    seed: int = 0
    description: str = ""


def moved(face: np.ndarray, right: float, down: float, zoom: float) -> np.ndarray:
    """A face uint8 [H, H, 3] off its place, its edge repeated."""
    side = len(face)
    at = (np.arange(side) + 0.5) / zoom + side / 2 * (1 - 1 / zoom)
    rows, columns = (np.clip(at + move * side, 0, side - 1).astype(int) for move in (down, right))
    return face[rows[:, None], columns]


def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Gradient histograms of square uint8 pictures."""
    return gradient_histograms(np.stack([seen_grey(from_uint8(picture)) for picture in pictures]))


def load_faces(folder: Path, count: int) -> list[np.ndarray]:
    """At most `count` faces of a folder, evenly spread."""
    paths = photos.spread(photos.list_images([folder]), count)
    return [np.asarray(photos.load_rgb(path)) for path in paths]


def crops(rng: np.random.Generator, folders: Sequence[Path], count: int) -> list[np.ndarray]:
    """Random square crops of photos, 64x64."""
    pictures: list[Image.Image] = photos.load_photos(folders, min_side=64, max_short_side=256)
    chosen = rng.integers(len(pictures), size=count)
    return [np.asarray(photos.random_crop(rng, pictures[index], 64)) for index in chosen]


def out_of_place(rng: np.random.Generator, face: np.ndarray) -> np.ndarray:
    """A face moved, enlarged or reduced so far that it is no longer aligned."""
    kind, sign, size = rng.integers(4), rng.choice([-1, 1]), rng.uniform(0.12, 0.35)
    moves = (
        (sign * size, 0, 1), (0, sign * size, 1), (0, 0, rng.uniform(1.35, 2)),
        (0, 0, rng.uniform(0.4, 0.75)),
    )  # fmt: skip
    return moved(face, *moves[kind])


def fit(aligned: np.ndarray, others: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Weights and bias whose score is near 1 for aligned faces and near -1 for others."""
    rows = np.concatenate([aligned, others]).astype(np.float64)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    labels = np.repeat([1.0, -1.0], [len(aligned), len(others)])
    weights = np.repeat([1 / len(aligned), 1 / len(others)], [len(aligned), len(others)])
    normal = (rows * weights[:, None]).T @ rows + ridge * np.eye(NUM_FEATURES + 1)
    solution = np.linalg.solve(normal, (rows * weights[:, None]).T @ labels)
    return solution[:-1].astype(np.float32), float(solution[-1])


def run(config: Config) -> None:
    """Fits, counts the errors and writes both."""
    rng = np.random.default_rng(config.seed)
    faces = [face for folder in config.faces for face in load_faces(folder, config.max_faces)]
    near = [moved(face, *rng.uniform(-0.03, 0.03, 2), rng.uniform(0.93, 1.07)) for face in faces]
    far = [out_of_place(rng, face) for face in faces]
    other = crops(rng, config.photos, config.num_crops)
    weights, bias = fit(features(faces + near), features(other + far), config.ridge)

    def accepted(pictures: Sequence[np.ndarray]) -> float:
        return round(float(np.mean(features(pictures) @ weights + bias > 0)), 4)

    held_out = load_faces(config.eval_faces, config.max_faces)
    misplaced = {
        name: accepted([moved(face, *move) for move in moves for face in held_out])
        for name, moves in MOVES.items()
    }
    errors = {
        "held_out_faces": len(held_out),
        "aligned_faces_refused": round(1 - accepted(held_out), 4),
        "photo_crops_taken_for_faces": accepted(crops(rng, (config.eval_photos,), 2000)),
        "faces_out_of_place_accepted": misplaced,
    }
    tensors = {"weights": weights, "bias": np.float32([bias]).reshape(())}
    write_atomically(config.out / "weights.safetensors", save(tensors))
    checkpoint.update_card(
        config.out,
        framing={
            "features": NUM_FEATURES, "faces": len(faces), "photo_crops": config.num_crops,
            "data": config.description,
        },
        errors=errors,
    )  # fmt: skip
    print(errors)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(tyro.cli(Config)), "framing"))
