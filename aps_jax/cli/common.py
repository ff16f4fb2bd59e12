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
      ValueError: the sampler is one on pixels and the model is none, or the other way round; an
        option is unknown, or it has a flag.
    """
    needs_denoiser = presets.config_class(sampler).NEEDS == "denoiser"
    if needs_denoiser and not presets.has_denoiser(options.model):
        raise ValueError(
            f"sampler {sampler!r} needs a model with a denoiser; --model {options.model} "
            "has none: choose another --sampler, or see continuous.md in the documentation for how "
            "to train one, or use your own in Python"
        )
    if not needs_denoiser and presets.has_denoiser(options.model):
        # Imported late: these need jax.
        from aps_jax.samplers import pixel_samplers

        *others, last = pixel_samplers()
        raise ValueError(
            f"sampler {sampler!r} needs a model with a prior over tokens; --model {options.model} "
            f"has a denoiser of pixels: choose --sampler {', '.join(others)} or {last}, or another "
            "model"
        )
    chosen = presets.parse_options(sampler, options.option)
    for name in chosen.keys() & flags.keys():
        raise ValueError(f"--option {name} has a flag of its own; use {flags[name]}")
    return chosen


def flag_of(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")
