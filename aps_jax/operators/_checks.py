"""Argument checks shared by the operator factories."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from aps_jax.types import Array


def whole(name: str, value: Any, *, low: int, high: int | None = None, odd: bool = False) -> int:
    """Returns `value` as an int, or raises ValueError unless it is a whole number in range."""
    bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
    required = f"{'an odd' if odd else 'a whole'} number {bounds}"
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if (
        not is_whole
        or value < low
        or (high is not None and value > high)
        or (odd and not value % 2)
    ):
        raise ValueError(f"{name} must be {required}, got {value!r}")
    return int(value)


def real(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Returns `value` as a float, or raises ValueError unless it is a finite number in range."""
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
    is_real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    above = is_real and (value > low or (value == low and not open_low))
    below = is_real and (value < high or (value == high and not open_high))
    if not (above and below):
        raise ValueError(
            f"{name} must be a number in {left}{low:g}, {high:g}{right}, got {value!r}"
        )
    return float(value)


def channels(name: str, x: Array, *allowed: int) -> None:
    """Raises ValueError unless images `x` [B, H, W, C] have an allowed number of channels."""
    if x.ndim != 4 or x.shape[-1] not in allowed:
        required = " or ".join(map(str, allowed))
        raise ValueError(f"{name} needs images [B, H, W, {required}], got shape {x.shape}")
