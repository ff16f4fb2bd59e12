"""Options of a run by name: sampler, preset or budget, single options."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aps_jax.config import VARIANTS, APSConfig, SharedConfig
from aps_jax.io.names import choose, suggestion

_OURS: dict[str, Any] = {
    "num_steps": 8,
    "learning_rate": 2.0,
    "learning_rate_schedule": "cosine",
    "keep_best": True,
    "warm_start": True,
    "measurement_term": "gaussian",
    "prior_weight": 0.3,
    "sensitivity_floor": 0.3,
    "encoder_start": 0.5,
    "data_consistency": 0.1,
}

#: Options of `APSConfig` by preset. "paper" is the published setting; the others are ours. "fine"
#: is "draft" decoded twice as large as the picture, with four times as many tokens ("aps-l" of the
#: paper), for about twice the seconds of "balanced". "faces" is for priors that know what belongs
#: into a hole, such as that of `face64`: weak evidence counts less, and the prior term is that of
#: Theorem 3.3. Ours end with a step of data consistency.
PRESETS: dict[str, dict[str, Any]] = {
    "draft": _OURS | {"num_inner_steps": 5},
    "balanced": _OURS | {"num_inner_steps": 15},
    "fine": _OURS | {"num_inner_steps": 5, "decode_scale": 2},
    "faces": _OURS
    | {
        "num_inner_steps": 15,
        "start_where_measured": True,
        "prior_weight": 1.0,
        "prior_weighting": "elbo",
        "sensitivity_floor": 1.0,
    },
    "paper": {"num_steps": 15, "num_inner_steps": 100, "perceptual_weight": 1e-3},
}

#: What makes several samples of a preset differ, where a single one has nothing random. Categorical
#: draws, every other preset's, put tokens of different faces side by side in a large hole; random
#: remasking draws whole faces, each in another order.
DIFFERING: dict[str, dict[str, Any]] = {"faces": {"remasking": "random"}}


def preset_of(model: str | os.PathLike[str]) -> str:
    """The preset for a model: what its card names, else "balanced".

    Args:
      model: an embedded model's name, or a model folder. Whether it can be loaded is not looked at.
    """
    return recommended(_card(model))


#: Parts of a model folder, sections of its card, by what a sampler needs (`SharedConfig.NEEDS`).
PARTS = {
    "prior": ("codec", "prior"),
    "denoiser": ("denoiser",),
    "latent denoiser": ("codec", "latent_denoiser"),
}


def kinds_of(model: str | os.PathLike[str]) -> list[str]:
    """What samplers may need that a model folder's card tells of; nothing if it cannot be read."""
    card = _card(model)
    known = card if isinstance(card, dict) else {}
    return [kind for kind, parts in PARTS.items() if all(name in known for name in parts)]


def _card(model: str | os.PathLike[str]) -> Any:
    """What the card of a model says, empty if it cannot be read."""
    embedded = Path(__file__).parent / "data" / model / "card.json"
    path = embedded if embedded.is_file() else Path(model) / "card.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def recommended(card: Any) -> str:
    """The preset that the card of a model names, else "balanced"."""
    preset = card.get("preset") if isinstance(card, dict) else None
    return preset if preset in PRESETS else "balanced"


def make_config(
    *,
    preset: str | None = None,
    sampler: str = "aps",
    budget: int | None = None,
    **overrides: Any,
) -> SharedConfig:
    """Options of a run, of `APSConfig` or of another sampler's class.

    A variant of APS starts from the preset, changed by the variant, changed by `overrides`. More
    than one sample turns to what makes samples of the preset differ (`DIFFERING`), unless the
    variant or `overrides` say otherwise, and else to categorical draws, unless a `draw` is given.
    Where samples differ anyway nothing changes. Other samplers start from their own defaults and
    take no preset.

    Args:
      preset: key of `PRESETS`, for variants of APS; "balanced" if left out.
      sampler: key of `VARIANTS` or of `aps_jax.samplers.SAMPLERS`.
      budget: decoder evaluations that the run may make (`aps_jax.samplers.budget.with_budget`).
      **overrides: options of the sampler; None leaves an option as it is.

    Raises:
      ValueError: for an unknown name or an option out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    options: dict[str, Any] = {}
    if sampler in VARIANTS:
        options = choose("preset", preset or "balanced", PRESETS) | VARIANTS[sampler]
        kind: type[SharedConfig] = APSConfig
    else:
        kind = config_class(sampler)
        if preset is not None:
            raise ValueError(
                f"presets are of aps and its variants, sampler {sampler!r} has none; leave the "
                "preset out, or size the sampler by a budget"
            )
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"sampler {sampler!r} has no option {name!r}{suggestion(name, known)}; options: "
                f"{', '.join(option_types(kind))}"
            )
    options |= given
    if sampler in VARIANTS and options.get("num_samples", 1) > 1:
        differing = DIFFERING.get(preset or "", {})
        options = _differing(options, differing, fixed=VARIANTS[sampler] | given)
    config = kind(**options)
    if budget is None:
        return config
    from aps_jax.samplers.budget import with_budget

    return with_budget(config, budget, fixed=given)


def _differing(
    options: dict[str, Any], differing: Mapping[str, Any], *, fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of APS with which samples differ, as far as those that are `fixed` allow it."""
    # The presets' own draw is deterministic: all samples would be equal.
    changes: tuple[Mapping[str, Any], ...] = ({}, differing, {"draw": "categorical"})
    for change in changes:
        changed = {**options, **change}
        single: dict[str, Any] = changed | {"num_samples": 1}
        if not fixed.keys() & change.keys() and APSConfig(**single).is_random:
            return changed
    return options


def config_class(sampler: str) -> type[SharedConfig]:
    """Class of options of a sampler or variant by name; ValueError if there is no such name."""
    if sampler in VARIANTS:
        return APSConfig
    # Imported late: these need jax, which the help of the command line does not.
    from aps_jax.samplers import SAMPLERS

    known = dict.fromkeys(VARIANTS, APSConfig)
    known |= {name: entry.config for name, entry in SAMPLERS.items()}
    return choose("sampler", sampler, known)


#: Options that a run sets by itself.
_FIXED = ("image_shape", "trace")


def option_types(kind: type[SharedConfig]) -> dict[str, type[Any]]:
    """Name and type (bool, int, float or str) of every option that a user may choose."""
    fields = dataclasses.fields(kind)
    return {field.name: type(field.default) for field in fields if field.name not in _FIXED}


def parse_options(sampler: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Values of options given as words NAME=VALUE, in the types of the sampler's options.

    Raises:
      ValueError: for a word of another form, an unknown option or a value of another type.
    """
    types = option_types(config_class(sampler))
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--option {pair} must have the form NAME=VALUE")
        kind = choose(f"option of sampler {sampler!r},", name, types)
        if name in values:
            raise ValueError(f"--option {name} is given twice")
        try:
            values[name] = _BOOLS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f"--option {name} cannot be {text!r}; it is {_KINDS[kind]}") from None
    return values


_BOOLS = {"true": True, "false": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
