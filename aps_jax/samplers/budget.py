"""Sizes a sampler to a number of decoder evaluations, so that methods compare at equal cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from aps_jax.config import SharedConfig


def decoder_evaluations(config: SharedConfig) -> int:
    """Runs of decoder and operator per sample, with or without gradient, but the final picture."""
    calls = config.evaluations()
    return calls.decoder + calls.decoder_gradient - 1


def with_budget(
    config: SharedConfig, evaluations: int, *, fixed: Collection[str] = ()
) -> SharedConfig:
    """`config` with as much work as `evaluations` runs of the decoder allow, never more.

    Args:
      config: options of any sampler whose class has a `KNOB`.
      evaluations: limit of `decoder_evaluations`; a run with gradient counts as one, too, though it
        takes about three times as long.
      fixed: names of options that must stay.

    Raises:
      ValueError: the sampler has no such knob, the knob is fixed, or the budget is too small.
    """
    knob = config.KNOB
    name = type(config).__name__
    if knob is None:
        raise ValueError(f"{name} evaluates no decoder before its last picture; it has no budget")
    if knob.name in fixed:
        raise ValueError(f"a budget decides {knob.name}; give one of the two")
    is_free = knob.scales_steps and "num_steps" not in fixed
    if is_free:
        change = math.sqrt(evaluations / decoder_evaluations(config))
        num_steps = getattr(config, "num_steps")  # noqa: B009 - of subclasses
        config = dataclasses.replace(config, num_steps=max(1, round(num_steps * change)))
    value = _largest(config, knob.name, knob.least, evaluations)
    if value is None and is_free:
        value = knob.least
    if value is not None:
        config = dataclasses.replace(config, **{knob.name: value})
    if is_free:  # What the knob's rounding left over.
        num_steps = _largest(config, "num_steps", 1, evaluations)
        config = dataclasses.replace(config, num_steps=num_steps or 1)
    if value is None or decoder_evaluations(config) > evaluations:
        least = decoder_evaluations(dataclasses.replace(config, **{knob.name: knob.least}))
        raise ValueError(
            f"a budget of {evaluations} decoder evaluations is too small for {name}: with its "
            f"other options it needs {least}; raise the budget or lower num_steps"
        )
    return config


def _largest(config: SharedConfig, name: str, least: int, limit: int) -> int | None:
    """Largest value of an option, in which the cost is linear, within the limit."""
    base, step = (
        decoder_evaluations(dataclasses.replace(config, **{name: value}))
        for value in (least, least + 1)
    )
    return None if base > limit else least + (limit - base) // (step - base)
