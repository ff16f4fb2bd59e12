"""Spreads a sampler call over devices: images over "data", the prior's matrices over "model".

    mesh = sharding.make_mesh()
    params = sharding.shard_params(params, mesh)
    y, keys = sharding.shard_batch((y, image_keys(key, len(y))), mesh)
    result = jax.jit(aps_sample, static_argnames="config")(params, y, keys, config=config)

The sampler itself does not change: XLA partitions the compiled call by where its arguments lie, and
image i depends on its own key and measurement only, so results do not depend on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aps_jax.types import Params, PyTree

DATA, MODEL = "data", "model"

#: Axis of a transformer's matrix that is split over "model", by the name of its module. Inputs of
#: attention and MLP are split by columns and their outputs by rows, so that a block exchanges sums
#: only twice (Megatron-LM, arXiv:1909.08053).
_SPLIT_AXES = {
    "q": -1,
    "k": -1,
    "v": -1,
    "ff_proj": -1,
    "up_proj": -1,
    "attn_out": -2,
    "ff_out": -2,
    "head": -1,
}


def make_mesh(
    num_data: int | None = None,
    num_model: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `num_data` x `num_model` devices.

    Args:
      num_data: groups of devices that images are spread over; None takes all devices there are.
      num_model: devices that share one copy of the prior; more than 1 for a prior that does not
        fit one device.
      devices: devices to use; all of this run's (of every host) by default.

    Raises:
      ValueError: if there are too few devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if num_data is None:
        num_data = len(devices) // max(num_model, 1)
    if num_data < 1 or num_model < 1 or num_data * num_model > len(devices):
        raise ValueError(
            f"a mesh of {num_data} x {num_model} devices does not fit the {len(devices)} there "
            "are; both numbers must be at least 1 and their product no larger than that"
        )
    used = devices[: num_data * num_model]
    return jax.make_mesh(
        (num_data, num_model),
        (DATA, MODEL),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=used,
    )


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Spreads the first axis of every array (images, measurements, keys) over "data".

    Raises:
      ValueError: if a batch is not a multiple of the mesh's "data" size.
    """
    size = mesh.shape[DATA]

    def put(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0 or leaf.shape[0] % size:
            batch = leaf.shape[0] if leaf.ndim else "no axis"
            needed = f"; fill it up to {math.ceil(batch / size) * size}" if leaf.ndim else ""
            raise ValueError(
                f"a batch of {batch} cannot be spread over {size} devices{needed} or use fewer"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA)))

    return jax.tree.map(put, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of an array that every device of the mesh has whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_params(params: Params, mesh: Mesh) -> Params:
    """Splits the prior's matrices over "model" and copies everything else to every device.

    Raises:
      ValueError: if "model" does not divide a matrix that it should split.
    """
    prior = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, _spec(path, leaf, mesh))),
        params.prior.params,
    )
    copied = jax.device_put(params, replicated(mesh))
    return copied.replace(prior=params.prior.replace(params=prior))


def _spec(path: tuple, leaf: jax.Array, mesh: Mesh) -> PartitionSpec:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    size = mesh.shape[MODEL]
    axis = _SPLIT_AXES.get(names[-2]) if len(names) > 1 and names[-1] == "kernel" else None
    if axis is None or size == 1:
        return PartitionSpec()
    if leaf.shape[axis] % size:
        raise ValueError(
            f"{'/'.join(names)} of shape {leaf.shape} cannot be split over {size} devices; choose "
            f"a num_model that divides {leaf.shape[axis]}"
        )
    spec = [None] * leaf.ndim
    spec[axis] = MODEL
    return PartitionSpec(*spec)
