"""Tables that say where each tensor of a published checkpoint goes, and what is done to it.

A table is strict in both directions: every tensor of the source has a place, and every weight of
the target is filled exactly once, in its shape.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from .sources import ConversionError, Source

Transform = Callable[[np.ndarray], np.ndarray]


def keep(array: np.ndarray) -> np.ndarray:
    """The array as it is."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """Weight of a torch linear layer [out, in] as a kernel [in, out]."""
    return array.T


def hwio(array: np.ndarray) -> np.ndarray:
    """Weight of a torch convolution [out, in, h, w] as a kernel [h, w, in, out]."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      source: name in the checkpoint, with placeholders such as `{half}`. A placeholder stands for
        one piece between dots. `{layer}`, a number, that the target does not repeat means that the
        tensor is one slice of a target whose leading axis runs over layers.
      target: path in the parameters, with the same placeholders.
      transform: what is done to the tensor; it may only move axes, and drop those of length 1.
    """

    source: str
    target: str
    transform: Transform = keep


class Place(NamedTuple):
    """Where one tensor goes: a target, and the slice along its leading axis if there is one."""

    target: str
    layer: int | None
    transform: Transform


def _pattern(text: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", text)
    for index in range(0, len(pieces), 2):
        pieces[index] = re.escape(pieces[index])
    for index in range(1, len(pieces), 2):
        kind = "[0-9]+" if pieces[index] == "layer" else "[^./]+?"
        pieces[index] = f"(?P<{pieces[index]}>{kind})"
    return re.compile("".join(pieces))


def place_tensors(
    source: Source,
    rules: Sequence[Rule],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    *,
    optional: Iterable[str] = (),
) -> dict[str, Place]:
    """A place for every tensor, proved to fill every target exactly.

    Args:
      source: checkpoint.
      rules: the table; the first line that matches a name counts.
      targets: shapes of all weights that the model needs, by path.
      optional: names of tensors that have no place and may be there.

    Raises:
      ConversionError: naming the first tensor that is unknown, missing or of another shape.
    """
    patterns = [(_pattern(rule.source), rule) for rule in rules]
    places: dict[str, Place] = {}
    filled: dict[tuple[str, int | None], str] = {}
    skipped = set(optional)
    for name, shape in source.shapes.items():
        if name in skipped:
            continue
        place = _place(name, patterns)
        if place is None or place.target not in targets or not _fits(place, targets):
            raise ConversionError(
                f"tensor {name!r} of shape {shape} has no place in this model; "
                "is it a checkpoint of another kind or version?"
            )
        needed = targets[place.target].shape
        needed = needed if place.layer is None else needed[1:]
        # A view of one number: transforms only move axes, so this costs no memory.
        moved = place.transform(np.broadcast_to(np.float32(0), shape)).shape
        if moved != needed:
            raise ConversionError(
                f"tensor {name!r} has shape {shape}, which gives {moved}; "
                f"{place.target!r} needs {needed}"
            )
        slot = (place.target, place.layer)
        if slot in filled:
            raise ConversionError(f"tensors {filled[slot]!r} and {name!r} have the same place")
        filled[slot] = name
        places[name] = place
    _check_complete(rules, targets, filled)
    return places


def _place(name: str, patterns: Sequence[tuple[re.Pattern[str], Rule]]) -> Place | None:
    for pattern, rule in patterns:
        if match := pattern.fullmatch(name):
            values = match.groupdict()
            is_stacked = "layer" in values and "{layer}" not in rule.target
            layer = int(values["layer"]) if is_stacked else None
            return Place(rule.target.format(**values), layer, rule.transform)
    return None


def _fits(place: Place, targets: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    return place.layer is None or place.layer < targets[place.target].shape[0]


def _check_complete(
    rules: Sequence[Rule],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    filled: Mapping[tuple[str, int | None], str],
) -> None:
    for target, spec in targets.items():
        for rule in rules:
            match = _pattern(rule.target).fullmatch(target)
            if match is None:
                continue
            is_stacked = "{layer}" in rule.source and "{layer}" not in rule.target
            for layer in range(spec.shape[0]) if is_stacked else (None,):
                if (target, layer) not in filled:
                    name = rule.source.format(**match.groupdict(), layer=layer)
                    shape = spec.shape if layer is None else spec.shape[1:]
                    raise ConversionError(
                        f"tensor {name!r}, for {target!r} of shape {shape}, is missing"
                    )
            break
        else:
            raise LookupError(f"no rule fills {target!r}")
