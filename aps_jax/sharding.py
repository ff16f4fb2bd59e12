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
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aps_jax.types import Params, PyTree

DATA, MODEL = "data", "model"

#: Axis of a parameter that is split over "model", None for whole copies, by the pattern that its
#: path matches; the first that matches counts.
Rules = Sequence[tuple[str, int | None]]

#: Rules of `aps_jax.transformer`, prompt ids included. Inputs of attention and MLP are split by
#: columns and their outputs by rows, so that a block exchanges sums only twice (Megatron-LM,
#: arXiv:1909.08053). Biases and norms are too small to be worth a split.
PRIOR_RULES: Rules = (
    (r"(.*/)?(q|k|v|ff_proj|up_proj|ff_in|head)/kernel", -1),
    (r"(.*/)?(attn_out|ff_out)/kernel", -2),
    (r"(.*/)?project/kernel", None),
    (r"(.*/)?(scale|bias|embedding|special|table)", None),
    (r"(uncond_)?prompt", None),
)


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


def shard_params(params: Params, mesh: Mesh, *, rules: Rules = PRIOR_RULES) -> Params:
    """Splits the prior's matrices over "model" and copies everything else to every device.

    Args:
      params: what the sampler reads.
      mesh: as from `make_mesh`.
      rules: axis by pattern of the path, for a prior of other parameters than this library's.

    Raises:
      ValueError: if "model" is more than 1 and no rule matches a parameter of the prior, or it does
        not divide a matrix that it should split.
    """
    shardings = prior_shardings(params.prior.params, mesh, rules=rules)
    prior = params.prior.replace(params=jax.device_put(params.prior.params, shardings))
    others = params.replace(prior=None)
    return jax.device_put(others, replicated(mesh)).replace(prior=prior)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def prior_shardings(prior_params: PyTree, mesh: Mesh, *, rules: Rules = PRIOR_RULES) -> PyTree:
    """Where every parameter of a prior lies; takes arrays or their shapes.

    Raises:
      ValueError: as for `shard_params`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh, rules)),
        prior_params,
    )


def require_whole_heads(num_heads: int, num_kv_heads: int | None, mesh: Mesh) -> None:
    """ValueError if the devices that share a prior cannot share its attention heads evenly."""
    size = mesh.shape[MODEL]
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads and heads % size:
            raise ValueError(
                f"{size} devices cannot share the prior's {name} = {heads}; choose a divisor of "
                f"{heads} for the mesh's axis {MODEL!r} (--num-model)"
            )


def split_axis(name: str, *, rules: Rules = PRIOR_RULES) -> int | None:
    """Axis of parameter `name` (path with slashes) that is split, counted from the end, or None.

    Raises:
      ValueError: if no rule matches.
    """
    for pattern, axis in rules:
        if re.fullmatch(pattern, name):
            return axis
    raise ValueError(
        f"no rule says how to lay parameter {name!r} out over a mesh; give `rules` that do, such "
        "as (*aps_jax.sharding.PRIOR_RULES, ('.*', None)) to copy whatever is left to every device"
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    size = mesh.shape[MODEL]
    if size == 1:  # Nothing to split, so that priors of any make need no rules.
        return PartitionSpec()
    axis = split_axis(name, rules=rules)
    if axis is None:
        return PartitionSpec()
    if shape[axis] % size:
        raise ValueError(
            f"{name} of shape {shape} cannot be split over {size} devices; choose a num_model that "
            f"divides {shape[axis]}"
        )
    spec = [None] * len(shape)
    spec[axis] = MODEL
    return PartitionSpec(*spec)
