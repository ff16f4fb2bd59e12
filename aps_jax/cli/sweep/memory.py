"""What weights and a compiled batch need of a device's memory, and what would fit.

A batch's arguments, above all the weights, are on the devices before anything is compiled: what is
free then is for temporaries and results.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from aps_jax import pretrained
from aps_jax.cli.errors import is_out_of_memory
from aps_jax.cli.inputs import free_memory
from aps_jax.io import checkpoint
from aps_jax.sharding import DATA, MODEL

#: Share of the free memory that a proposal may fill; holes and workspace take the rest.
_USABLE = 0.9
_SMALLER = "restore smaller images (--size) or share the prior with a larger --num-model"


class MemoryShortage(ValueError):
    """The weights or a batch do not fit the devices; the message says what would."""


@contextlib.contextmanager
def loading(model: str | os.PathLike[str], mesh: jax.sharding.Mesh) -> Iterator[None]:
    """MemoryShortage if memory runs out while the weights of a model are loaded to a mesh."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortage(_loading_advice(model, mesh)) from error


def _loading_advice(model: str | os.PathLike[str], mesh: jax.sharding.Mesh) -> str:
    """What the weights need, what there is, and how many devices should share the prior."""
    device, devices, now = mesh.devices.flat[0], len(jax.local_devices()), mesh.shape[MODEL]
    prior, codec = (_weight_bytes(model, section) for section in ("prior", "codec"))
    needed = prior / now + codec
    if device.platform == "cpu":  # Its devices share one memory: nothing is gained by more.
        total = mesh.devices.size * needed / 2**30
        return (
            f"out of memory while the weights of {model} were loaded, about {total:.2f} GiB; "
            "close other programs, set a smaller --num-data or use a smaller model"
        )
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    text = (
        f"out of memory while the weights of {model} were loaded, about {needed / 2**30:.2f} GiB "
        "on each device"
    )
    if room < math.inf:
        text += f", which has {room / 2**30:.2f} GiB in all"
    for count in range(now + 1, devices + 1):
        if devices % count == 0 and prior / count + codec < _USABLE * room:
            return f"{text}; share the prior among more devices: --num-model {count}"
    return (
        f"{text}; not even a larger --num-model makes it fit the {devices} device(s) of this host: "
        "take larger ones or a smaller model"
    )


def _weight_bytes(model: str | os.PathLike[str], section: str) -> int:
    folder = pretrained.model_folder(model)
    count, _ = checkpoint.count_weights(checkpoint.weights_path(folder, section))
    kept = checkpoint.read_card(folder)[section].get("param_dtype", "float32")
    return count * jnp.dtype(kept).itemsize


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
    # Where all devices divide the batch, they share it; a smaller one may need more on each.
    groups = mesh.size if batch_size % mesh.size == 0 else mesh.shape[DATA]
    needed, free = _needs(compiled), free_memory()
    if needed is None:
        text = f"out of memory with a batch of {batch_size}"
        if batch_size > groups:
            return f"{text}; set --batch-size {groups} or restore smaller images (--size)"
        return f"{text}; {_SMALLER}"
    text = (
        f"a batch of {batch_size} needs about {needed / 2**30:.2f} GiB on each device beside the "
        "models"
    )
    if free is None:
        return f"{text}; set a smaller --batch-size or restore smaller images (--size)"
    share = _sharers(mesh)
    each = needed / (batch_size / groups)
    fitting = groups * int(free / share * _USABLE / each)
    # What ran out in spite of the estimate needs less than the estimate allows.
    fitting = min(fitting, groups * (batch_size // groups // 2))
    text += f" and {free / share / 2**30:.2f} GiB are free"
    if fitting < 1:
        return f"{text}: not even one image per group of devices fits; {_SMALLER}"
    return f"{text}: about {fitting} images fit; set --batch-size {fitting}"
