"""LPIPS for a command: as a score, and as a term of the objective where it can be computed."""

from __future__ import annotations

import dataclasses

from aps_jax.cli.inputs import Problem
from aps_jax.config import SharedConfig
from aps_jax.scores.lpips import CURE, MIN_SIDE, PerceptualUnavailable, load_lpips
from aps_jax.types import Perceptual

#: Where nothing can be installed that would help.
_WITHOUT = "to say so yourself: --option perceptual_weight=0"


def weight(config: SharedConfig) -> float:
    """Weight of LPIPS in the sampler's objective, 0 for those without it."""
    return getattr(config, "perceptual_weight", 0.0)


def load(problem: Problem, config: SharedConfig, notes: list[str]) -> Perceptual | None:
    """LPIPS where something asks for it; a note says why not."""
    if problem.photo is None and weight(config) == 0:
        return None
    if min(problem.image_shape) < MIN_SIDE:
        notes.append(
            f"LPIPS was left out: the image is smaller than {MIN_SIDE} pixels; give a larger one"
        )
        return None
    try:
        return load_lpips()
    except PerceptualUnavailable as error:
        notes.append(f"LPIPS was left out: {error}")
        return None


def settle(
    config: SharedConfig, problem: Problem, distance: Perceptual | None, notes: list[str]
) -> SharedConfig:
    """Drops the perceptual term where it cannot be computed, with a note."""
    if weight(config) == 0:
        return config
    if not problem.operator.is_image:
        reason = f"the measurement is not an image; {_WITHOUT}"
    elif min(problem.y.shape[1:3]) < MIN_SIDE:
        reason = f"the measurement is smaller than {MIN_SIDE} pixels; {_WITHOUT}"
    elif distance is None:
        reason = f"it needs LPIPS; {CURE}"
    else:
        return config
    notes.append(f"the perceptual term was left out: {reason}")
    return dataclasses.replace(config, perceptual_weight=0.0)
