"""Sizes a sampler to a limit of its cost, such as decoder evaluations, to compare at equal cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from aps_jax.config import Knob, SharedConfig


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
    if config.KNOB is None:
        name = type(config).__name__
        raise ValueError(f"{name} evaluates no decoder before its last picture; it has no budget")
    return sized(config, evaluations, decoder_evaluations, knob=config.KNOB, fixed=fixed)


def sized(
    config: SharedConfig,
    limit: float,
    cost: Callable[[Any], float],
    *,
    knob: Knob,
    fixed: Collection[str] = (),
    unit: str = "decoder evaluations",
) -> SharedConfig:
    """`config` with as much work as a limit of its cost allows, never more.

    Args:
      config: options of any sampler.
      limit: of the cost.
      cost: of such options; linear in the knob.
      knob: what is changed.
      fixed: names of options that must stay.
      unit: of the cost, for messages.

    Raises:
      ValueError: the knob is fixed, or the limit too small.
    """
    name = type(config).__name__
    if knob.name in fixed:
        raise ValueError(f"a budget decides {knob.name}; give one of the two")
    is_free = knob.scales_steps and "num_steps" not in fixed
    if is_free:
        change = math.sqrt(limit / cost(config))
        num_steps = getattr(config, "num_steps")  # noqa: B009 - of subclasses
        config = dataclasses.replace(config, num_steps=max(1, round(num_steps * change)))
    value = _largest(config, knob.name, knob.least, limit, cost)
    if value is None and is_free:
        value = knob.least
    if value is not None:
        config = dataclasses.replace(config, **{knob.name: value})
    if is_free:  # What the knob's rounding left over.
        num_steps = _largest(config, "num_steps", 1, limit, cost)
        config = dataclasses.replace(config, num_steps=num_steps or 1)
    if value is None or cost(config) > limit:
        least = cost(dataclasses.replace(config, **{knob.name: knob.least}))
        raise ValueError(
            f"a budget of {limit:g} {unit} is too small for {name}: with its "
            f"other options it needs {least:g}; raise the budget or lower num_steps"
        )
    return config


def _largest(
    config: SharedConfig, name: str, least: int, limit: float, cost: Callable[[Any], float]
) -> int | None:
    """Largest value of an option, in which the cost is linear, within the limit."""
    base, step = (
        cost(dataclasses.replace(config, **{name: value})) for value in (least, least + 1)
    )
    return None if base > limit else least + int((limit - base) // (step - base))
