"""Times of several functions taken in turns, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleave(
    runs: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = True
) -> dict[str, np.ndarray]:
    """Seconds of every function, in turns.

    Args:
      runs: functions by name; JAX results are waited for.
      repeats: rounds.
      warm: call every function once before, untimed.

    Returns:
      By name, [repeats, 2]: wall-clock seconds, and processor seconds of all threads, which other
      programs on the machine disturb less.
    """
    for function in runs.values() if warm else ():
        jax.block_until_ready(function())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, function in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles of the first axis: of [n], or of the columns (wall, cpu) of [n, 2]."""
    if values.ndim == 2:
        return spread(values[:, 0]) | {"cpu": float(np.median(values[:, 1]))}
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """Spread of the ratio round by round, which cancels what changes slowly on the machine."""
    return spread(numerator / denominator)


#: Products in a row, so that starting one is not what is timed.
_PRODUCTS = 10


def matmuls(side: int, dtype: str = "float32") -> Callable[[], list[jax.Array]]:
    """Products of two square matrices, 2 side³ floating-point operations each."""
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: [product(a) for _ in range(_PRODUCTS)]


def matmul_rate(products: np.ndarray, side: int) -> dict[str, float]:
    """FLOP/s of seconds [n, 2] of `matmuls`."""
    return spread(_PRODUCTS * 2 * side**3 / products[:, 0]) | {"side": side}


def over_matmul(
    flop: float, seconds: np.ndarray, products: np.ndarray, side: int
) -> dict[str, float]:
    """FLOP/s of work over those of `matmuls`, which had its turn in every round, too."""
    return ratio(flop / seconds, _PRODUCTS * 2 * side**3 / products)
