"""What the samples of one photo say: their spread, their means, their anchors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from aps_jax import metrics
from aps_jax.io.rows import Row

#: Standard deviations are pooled between these edges, of images in [-1, 1].
EDGES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25, 0.35, 2.0)
#: Share of clean tokens at which anchors are compared.
ANCHORED = 0.25


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


def row_of(
    samples: np.ndarray,
    tokens: np.ndarray,
    mask: int,
    x: np.ndarray,
    distance: Callable[..., Any] | None = None,
) -> Row:
    """What is said of the samples [S, H, W, 3] of one photo, with their tokens [T, S, L].

    With the LPIPS of images `distance`, also that of the samples, on average, and of their mean.
    """
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
    } | ({} if distance is None else _lpips(samples, x, distance))


def _lpips(samples: np.ndarray, x: np.ndarray, distance: Callable[..., Any]) -> Row:
    images = np.clip(np.concatenate([samples, samples.mean(axis=0, keepdims=True)]), -1, 1)
    found = np.asarray(distance(images, np.broadcast_to(x, images.shape)))
    return {"sample_lpips": float(found[:-1].mean()), "mean_lpips": float(found[-1])}
