"""Presets of the command line: how much work to spend on an image."""

from __future__ import annotations

from typing import Any

from aps_jax.config import VARIANTS, APSConfig
from aps_jax.names import choose

#: Options of `APSConfig` by preset. "paper" is the published setting; the others are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "draft": {
        "num_steps": 8,
        "num_inner_steps": 5,
        "warm_start": "logits",
        "measurement_term": "gaussian",
        "prior_weight": 1.0,
        "evidence_floor": 0.3,
    },
    "balanced": {
        "num_steps": 15,
        "num_inner_steps": 8,
        "warm_start": "logits",
        "measurement_term": "gaussian",
        "prior_weight": 1.0,
        "evidence_floor": 0.3,
    },
    "paper": {"num_steps": 15, "num_inner_steps": 100, "perceptual_weight": 1e-3},
}


def make_config(*, preset: str = "balanced", sampler: str = "aps", **overrides: Any) -> APSConfig:
    """Options of a run: the preset, changed by the sampler's variant, changed by `overrides`.

    More than one sample turns to categorical draws unless a `draw` is given.

    Args:
      preset: key of `PRESETS`.
      sampler: key of `VARIANTS`.
      **overrides: options of `APSConfig`; None leaves an option as it is.

    Raises:
      ValueError: for an unknown name or an option out of range.
    """
    options = choose("preset", preset, PRESETS) | choose("sampler", sampler, VARIANTS)
    options |= {name: value for name, value in overrides.items() if value is not None}
    if options.get("num_samples", 1) > 1:
        # The presets' own draw is deterministic: all samples would be equal.
        options.setdefault("draw", "categorical")
    return APSConfig(**options)
