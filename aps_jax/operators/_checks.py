"""Checks of images shared by the operators."""

from __future__ import annotations

from aps_jax.types import Array


def channels(name: str, x: Array, *allowed: int) -> None:
    """Raises ValueError unless images `x` [B, H, W, C] have an allowed number of channels."""
    if x.ndim != 4 or x.shape[-1] not in allowed:
        required = " or ".join(map(str, allowed))
        raise ValueError(f"{name} needs images [B, H, W, {required}], got shape {x.shape}")
