"""Copies one tensor to its place, piece by piece, and compares it with what was written."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from .rules import Place
from .sources import ConversionError, is_float
from .stores import Slot, squares

#: Side of the square pieces that are copied; a transposed copy in large strides is five times
#: slower.
_TILE = 256


def copy(name: str, array: np.ndarray, slot: Slot, place: Place) -> None:
    """Writes tensor `name` to its slot, in the slot's dtype.

    Raises:
      ConversionError: it is no floating-point tensor, or not finite in that dtype.
    """
    if not is_float(array):
        raise ConversionError(f"tensor {name!r} holds {array.dtype}, not floating-point numbers")
    moved = place.transform(array)
    for region in slot.regions():
        part = moved[region]
        values = np.empty(part.shape, slot.dtype)
        for tile in squares(part.shape, _TILE):
            with np.errstate(over="ignore", invalid="ignore"):
                values[tile] = part[tile]
                is_finite = np.isfinite(values[tile]).all()
            if not is_finite:
                raise ConversionError(
                    f"tensor {name!r} has numbers that are not finite in {slot.dtype}; "
                    "fetch it again, or choose another --dtype"
                )
        slot.write(region, values)


def check_value(name: str, array: np.ndarray, expected: np.ndarray) -> None:
    """ConversionError if tensor `name` is anything else than `expected`."""
    if array.shape != expected.shape:
        raise ConversionError(
            f"tensor {name!r} has shape {array.shape}; this model needs {expected.shape}"
        )
    if not np.array_equal(array, expected):
        raise ConversionError(f"tensor {name!r} has other values than this model needs")


def compare(name: str, array: np.ndarray, slot: Slot, place: Place) -> float:
    """Largest difference to the slot, relative to the largest number of the tensor.

    Raises:
      ConversionError: it is more than rounding to the slot's dtype explains.
    """
    moved = place.transform(array)
    difference = peak = 0.0
    for region in slot.regions():
        part, written = moved[region], slot.read(region)
        for tile in squares(part.shape, _TILE):
            if part.dtype == written.dtype and np.array_equal(part[tile], written[tile]):
                continue
            exact, got = (x[tile].astype(np.float64) for x in (part, written))
            peak = max(peak, np.abs(exact).max(initial=0))
            difference = max(difference, np.abs(exact - got).max(initial=0))
    limits = jnp.finfo(slot.dtype)
    if difference > peak * float(limits.eps) + float(limits.smallest_subnormal):
        raise ConversionError(f"tensor {name!r} was written wrongly, off by {difference:.1e}")
    return difference / peak if peak else 0.0
