"""What the options of all commands that sample have in common: their looks and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from aps_jax import presets

MAX_SEED = 2**32

Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def named(metavar: str) -> Any:
    """An option whose value is shown by this name."""
    return tyro.conf.arg(metavar=metavar)


def optional(metavar: str) -> Any:
    """Likewise, without a word on its default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def check_run(options: Any, *, not_negative: Sequence[str] = ()) -> None:
    """ValueError for a seed out of range, --resume with --overwrite, or a number below 0.

    Args:
      options: with `seed`, `resume` and `overwrite`.
      not_negative: options that are finite and at least 0, where there are such and they are given.
    """
    if not 0 <= options.seed < MAX_SEED:
        raise ValueError(f"--seed must be from 0 to {MAX_SEED - 1}, got {options.seed}")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; choose one")
    for name in not_negative:
        value = getattr(options, name, None)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{flag_of(name)} must be a number >= 0, got {value}")


def chosen_options(options: Any, sampler: str, flags: Mapping[str, str]) -> dict[str, Any]:
    """What --option says, in the types of the sampler's options.

    Args:
      options: with `option` and `model`.
      sampler: name of the sampler.
      flags: flags by the option of the sampler that they set.

    Raises:
      ValueError: the sampler needs what the model has not; an option is unknown, or it has a flag.
    """
    needed, kinds = presets.config_class(sampler).NEEDS, presets.kinds_of(options.model)
    # Of a model without any of the three its loader says more.
    if needed not in kinds and (kinds or needed != "prior"):
        raise ValueError(_other_model(sampler, needed, options.model, kinds))
    chosen = presets.parse_options(sampler, options.option)
    for name in chosen.keys() & flags.keys():
        raise ValueError(f"--option {name} has a flag of its own; use {flags[name]}")
    return chosen


def _other_model(sampler: str, needed: str, model: Any, kinds: Sequence[str]) -> str:
    """Why a sampler cannot draw from a model, and which can."""
    # Imported late: these need jax.
    from aps_jax.samplers import MODELS, samplers_of

    has = " and ".join(MODELS[kind] for kind in kinds) or "none"
    names = [name for kind in kinds for name in samplers_of(kind)]
    choices = (
        f"choose --sampler {', '.join(names)}, or another model" if names else "choose another"
    )
    if needed != "prior":
        choices += ", or see continuous.md in the documentation for how to train one"
    return (
        f"sampler {sampler!r} needs a model with {MODELS[needed]}; --model {model} has {has}: "
        f"{choices}"
    )


def flag_of(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")
