"""Says whether a picture shows a face in the framing of `face64`.

A linear score of histograms of oriented gradients (Dalal and Triggs, "Histograms of Oriented
Gradients for Human Detection", CVPR 2005), fitted by `python -m experiments.train.framing`. It sees
a tenth of a side by which a face is off its place, but not whether its eyes are open.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from aps_jax.io.checkpoint import CheckpointError
from aps_jax.io.tensors import TensorFileError, open_tensors

#: Where the weights and their card are.
FOLDER = Path(__file__).parents[1] / "data" / "framing64"
#: Side of the grey picture that is looked at, cells along a side, and directions of gradients.
_SIDE, _CELLS, _BINS = 32, 8, 8
#: Number of features.
NUM_FEATURES = _CELLS**2 * _BINS
#: Added to the mean strength of gradients near a cell, in steps of 0..255, so that flat ground,
#: which has only noise, does not count as much as edges.
_FLOOR = 2.0
#: Shares of red, green and blue in luma (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def gradient_histograms(grey: np.ndarray, cells: int = _CELLS) -> np.ndarray:
    """Features float32 [B, 8 * cells**2] of square grey pictures [B, H, H] on the scale 0..255.

    Per cell, of which there are `cells` along a side, the strength of gradients in eight
    directions, each gradient shared between its two nearest ones, relative to the mean strength of
    the cell and its neighbours.
    """
    grey = np.asarray(grey, np.float32)
    rows, columns = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(rows, columns)
    turn = np.arctan2(rows, columns) / (2 * np.pi) * _BINS
    below = np.floor(turn)
    histogram = np.zeros((*grey.shape, _BINS), np.float32)
    for offset, share in ((0, 1 - (turn - below)), (1, turn - below)):
        which = (below.astype(int) + offset) % _BINS
        part = np.zeros_like(histogram)
        np.put_along_axis(part, which[..., None], (strength * share)[..., None], axis=-1)
        histogram += part
    pixels = grey.shape[1] // cells
    pooled = histogram.reshape(len(grey), cells, pixels, cells, pixels, _BINS).sum(axis=(2, 4))
    energy = np.sqrt(np.sum(pooled**2, axis=-1))
    padded = np.pad(energy, ((0, 0), (1, 1), (1, 1)), mode="edge")
    near = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))
    return (pooled / (near[..., None] + _FLOOR)).reshape(len(grey), -1)


def seen_grey(photo: np.ndarray) -> np.ndarray:
    """What is looked at of a picture [H, H, 3] in [-1, 1]: its luma, [32, 32] on 0..255."""
    luma = (np.asarray(photo, np.float32) @ _LUMA + 1) * 127.5
    small = Image.fromarray(luma).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small)


@functools.cache
def _weights() -> tuple[np.ndarray, float]:
    path = FOLDER / "weights.safetensors"
    try:
        tensors = open_tensors(path)
        return np.array(tensors["weights"]), float(np.array(tensors["bias"]))
    except (OSError, KeyError, TensorFileError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); install again") from None


def alignment_score(photo: np.ndarray) -> float:
    """Above 0 if a picture [H, W, 3] in [-1, 1] looks like an aligned face, else below.

    Pictures that are not square score minus infinity. How often it errs is in the card of the
    weights, `aps_jax/data/framing64/card.json`.
    """
    if photo.shape[0] != photo.shape[1]:
        return -np.inf
    weights, bias = _weights()
    return float(gradient_histograms(seen_grey(photo)[None])[0] @ weights + bias)
