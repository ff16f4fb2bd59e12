"""What a compiled batch needs of a device's memory beside its arguments, and which batch would fit.

The arguments, above all the weights, are on the devices before anything is compiled: what is free
then is for temporaries and results.
"""

from __future__ import annotations

from typing import Any

import jax

from aps_jax.commands.inputs import free_memory
from aps_jax.sharding import DATA


class MemoryShortage(ValueError):
    """The batch does not fit the devices; the message says which one does."""


def require_fitting(compiled: Any, batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """MemoryShortage if the compiled call needs more memory than a device has left."""
    needed, free = _needs(compiled), free_memory()
    if needed is None or free is None:
        return
    if _sharers(mesh) * needed > free:
        raise MemoryShortage(advice(compiled, batch_size, mesh))


def _needs(compiled: Any) -> int | None:
    """Bytes per device beside the arguments; they grow with the batch."""
    analysis = compiled.memory_analysis() if compiled is not None else None
    if analysis is None:
        return None
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _sharers(mesh: jax.sharding.Mesh) -> int:
    """Devices that take their memory from the same place: forced CPU devices share the host's."""
    return mesh.devices.size if mesh.devices.flat[0].platform == "cpu" else 1


def advice(compiled: Any, batch_size: int, mesh: jax.sharding.Mesh) -> str:
    """What a batch needs, what there is, and the batch that fits; for the user to read."""
    groups = mesh.shape[DATA]
    needed, free = _needs(compiled), free_memory()
    if needed is None:
        return (
            f"out of memory with a batch of {batch_size}; set --batch-size {groups} or restore "
            "smaller images (--size)"
        )
    text = (
        f"a batch of {batch_size} needs about {needed / 2**30:.2f} GiB on each device beside the "
        "models"
    )
    if free is None:
        return f"{text}; set a smaller --batch-size or restore smaller images (--size)"
    share = _sharers(mesh)
    each = needed / (batch_size / groups)
    fitting = groups * int(free / share * 0.9 / each)
    # What ran out in spite of the estimate needs less than the estimate allows.
    fitting = min(fitting, groups * (batch_size // groups // 2))
    text += f" and {free / share / 2**30:.2f} GiB are free"
    if fitting < 1:
        return (
            f"{text}: not even one image per group of devices fits; restore smaller images "
            "(--size) or share the prior with a larger --num-model"
        )
    return f"{text}: about {fitting} images fit; set --batch-size {fitting}"
