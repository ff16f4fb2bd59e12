"""What changes from step to step, foremost how many tokens stay masked; decided before tracing.

Progress r = i/T runs from 0 (all masked) to 1 (all clean); gamma(r) is the share still masked.
In the paper's time t = 1 - r, and alpha_t = 1 - gamma(1 - t) is the probability of being clean.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

#: gamma(r) by name: 1 at r = 0, 0 at r = 1, never increasing.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "sqrt": lambda r: 1 - math.sqrt(r),
}


def masked_share(name: str, num_steps: int) -> np.ndarray:
    """Masked share gamma at progress 0, 1/T, ..., 1; float64 [num_steps + 1].

    Raises:
      ValueError: unknown name or num_steps < 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose from {sorted(SCHEDULES)}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    shares = np.array([SCHEDULES[name](i / num_steps) for i in range(num_steps + 1)])
    shares[-1] = 0.0
    return shares


def masked_counts(name: str, num_steps: int, num_tokens: int) -> np.ndarray:
    """Tokens still masked after each step, int32 [num_steps]; the last is 0 (count rule).

    The sampler lowers a count further wherever a step would otherwise reveal nothing.
    """
    # The small term undoes rounding: 10 * (1 - 0.9) falls just short of 1.
    return np.floor(num_tokens * masked_share(name, num_steps)[1:] + 1e-6).astype(np.int32)


def elbo_weights(name: str, num_steps: int) -> np.ndarray:
    """w_t = (alpha_s - alpha_t) / (1 - alpha_t) of each step t -> s, float32 [num_steps]."""
    shares = masked_share(name, num_steps)
    return ((shares[:-1] - shares[1:]) / shares[:-1]).astype(np.float32)


def cosine_thresholds(num_steps: int) -> np.ndarray:
    """Share of the threshold that a token needs to be kept at each step, float32 [num_steps].

    It falls from 1 to 0 (ours).
    """
    values = np.cos(np.pi / 2 * np.arange(num_steps) / max(num_steps - 1, 1))
    return np.clip(values, 0, 1).astype(np.float32)


def cosine_rates(num_steps: int, num_inner_steps: int) -> np.ndarray:
    """Share of the learning rate at every inner step, float32 [num_steps, num_inner_steps] (ours).

    It falls from 1 to near 0 over all inner steps of all timesteps.
    """
    progress = np.arange(num_steps * num_inner_steps) / max(num_steps * num_inner_steps, 1)
    values = (1 + np.cos(np.pi * progress)) / 2
    return values.reshape(num_steps, num_inner_steps).astype(np.float32)
