"""Spreads a sampler call over devices: rows over all of them, the prior's matrices over "model".

    mesh = sharding.make_mesh()
    params = sharding.shard_params(params, mesh)
    y, keys = sharding.shard_batch((y, image_keys(key, len(y))), mesh)
    result = jax.jit(aps_sample, static_argnames="config")(params, y, keys, config=config)

Rows are samples of measurements. The devices along "model" hold one copy of the prior together, so
they call it together, with the rows of their group. In everything else, which is nine tenths of the
work (decoder, operator, logits and their optimiser), each of them has rows of its own, wherever the
number of rows can be divided so.

The sampler itself does not change: XLA partitions the compiled call by where its arguments lie and
by the layout that `shard_params` asks for around the calls of both networks. Image i depends on its
own key and measurement only, so results do not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aps_jax.prior.config import TransformerConfig
from aps_jax.types import Array, Bound, Codec, Params, Prior, PyTree, bind

DATA, MODEL = "data", "model"

#: Axis of a parameter that is split over "model", None for whole copies, by the pattern that its
#: path matches; the first that matches counts.
Rules = Sequence[tuple[str, int | None]]

#: Rules of `prior.transformer`, prompt ids included. Inputs of attention and MLP are split by
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
    # A class, which JAX re-exports as a variable.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh of `num_data` x `num_model` devices.

    Args:
      num_data: groups of devices that rows are spread over; None takes all devices there are.
      num_model: devices of a group, which share one copy of the prior; more than 1 for a prior that
        does not fit one device.
      devices: devices to use; all of this run's (of every host) by default.

    Raises:
      ValueError: if there are too few devices, or some would be left over unasked.
    """
    devices = jax.devices() if devices is None else list(devices)
    if num_data is None:
        if num_model > 0 and len(devices) % num_model:
            raise ValueError(
                f"{len(devices)} devices cannot be divided into groups of num_model = {num_model}; "
                f"choose a divisor of {len(devices)}, or give num_data too and leave some unused"
            )
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


def shard_batch(tree: PyTree, mesh: Mesh, *, num_samples: int = 1) -> PyTree:
    """Spreads the first axis of every array (images, measurements, keys) over the mesh.

    Over both axes where they divide it, else over "data" alone. A batch that is smaller than
    that is copied whole to every device where its samples can be spread instead.

    Args:
      tree: arrays of the whole batch; on several hosts, the same ones on each.
      mesh: as from `make_mesh`.
      num_samples: S, samples that the sampler draws of every measurement.

    Raises:
      ValueError: if neither the batch nor its S samples are a multiple of the mesh's "data" size.
    """

    def put(leaf: Array) -> Array:
        where = batch_sharding(leaf.shape, mesh, num_samples)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, where)
        # JAX 0.10 puts only plain arrays on devices of other processes.
        data = jax.device_put(jax.random.key_data(leaf), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, tree)


def batch_sharding(shape: tuple[int, ...], mesh: Mesh, num_samples: int = 1) -> NamedSharding:
    """Where `shard_batch` puts an array of this shape; arguments and errors are its own."""
    size = mesh.shape[DATA]
    if not shape:
        raise ValueError(
            f"a scalar has no batch to be spread over {mesh.size} devices; give every array one as "
            "its first axis (keys: one per image, by aps_jax.types.image_keys)"
        )
    batch = shape[0]
    axes = row_axes(batch, mesh)
    if axes:
        return NamedSharding(mesh, PartitionSpec(axes))
    if batch * num_samples % size == 0:
        return replicated(mesh)
    times = f" with {num_samples} samples of each" if num_samples > 1 else ""
    step = size // math.gcd(size, num_samples)
    raise ValueError(
        f"a batch of {batch}{times} cannot be spread over {size} devices; fill it up to "
        f"{math.ceil(batch / step) * step} or use fewer devices"
    )


def shard_params(params: Params, mesh: Mesh, *, rules: Rules = PRIOR_RULES) -> Params:
    """Splits the prior's matrices over "model" and copies everything else to every device.

    The functions of prior and codec then lay their rows out over the mesh, too, each call by the
    number of its rows.

    Args:
      params: what the sampler reads.
      mesh: as from `make_mesh`.
      rules: axis by pattern of the path, for a prior of other parameters than this library's.

    Raises:
      ValueError: if "model" is more than 1 and no rule matches a parameter of the prior, or it does
        not divide a matrix that it should split or the attention heads.
    """
    return jax.device_put(*plan_params(params, mesh, rules=rules))


def plan_params(params: Params, mesh: Mesh, *, rules: Rules = PRIOR_RULES) -> tuple[Params, Params]:
    """What `shard_params` does without doing it: the bundle, and where every array of it lies.

    Takes arrays or their shapes; arguments and errors are those of `shard_params`.
    """
    params = dataclasses.replace(
        params, prior=spread_prior(params.prior, mesh), codec=spread_codec(params.codec, mesh)
    )
    where = jax.tree.map(lambda _: replicated(mesh), dataclasses.replace(params, prior=None))
    weights = prior_shardings(params.prior.params, mesh, rules=rules)
    return params, dataclasses.replace(
        where, prior=dataclasses.replace(params.prior, params=weights)
    )


def spread_prior(prior: Prior, mesh: Mesh) -> Prior:
    """The same prior and weights, whose calls lay their rows out over the mesh.

    Raises:
      ValueError: if the devices that share it cannot share its attention heads evenly.
    """
    functions = {}
    for name in ("apply", "apply_unconditional"):
        apply = _plain(getattr(prior, name))
        config = dict(getattr(apply, "settings", ())).get("config")
        if isinstance(config, TransformerConfig):
            require_whole_heads(config.num_heads, config.num_kv_heads, mesh)
        functions[name] = _on_mesh(_apply_together, apply, mesh)
    return dataclasses.replace(prior, **functions)


def spread_codec(codec: Codec, mesh: Mesh) -> Codec:
    """The same codec, whose decoder lays its rows out over the mesh."""
    return dataclasses.replace(codec, decode=_on_mesh(_decode_apart, _plain(codec.decode), mesh))


def row_axes(rows: int, mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh that `rows` rows are spread over: both, "data" alone, or neither."""
    if rows % mesh.size == 0:
        return (DATA, MODEL)
    return (DATA,) if rows % mesh.shape[DATA] == 0 else ()


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
    if axis is None or shape[axis] == 1:  # The head of a reward model has one number.
        return PartitionSpec()
    if shape[axis] % size:
        raise ValueError(
            f"{name} of shape {shape} cannot be split over {size} devices; choose a num_model that "
            f"divides {shape[axis]}"
        )
    spec: list[str | None] = [None] * len(shape)
    spec[axis] = MODEL
    return PartitionSpec(*spec)


def _apply_together(params: PyTree, tokens: Array, *, inner: Callable, mesh: Mesh) -> Array:
    """Logits of a prior that a group of devices shares: its rows are the same on all of them."""
    rows = tokens.shape[0]
    groups = (DATA,) if rows % mesh.shape[DATA] == 0 else ()
    # Rows over "model" inside, on which what comes before and after insists, would leave the
    # weights no axis, and XLA would gather them on every device.
    tokens = _constrain(tokens, mesh, groups)
    logits = _constrain(inner(params, tokens), mesh, groups)
    return _constrain(logits, mesh, row_axes(rows, mesh))


def _constrain(x: Array, mesh: Mesh, axes: tuple[str, ...]) -> Array:
    """Rows over `axes` and no others; what becomes of the other dimensions is left to XLA."""
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    spec = PartitionSpec(axes or None, *free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _decode_apart(params: PyTree, codes: Array, *, inner: Callable, mesh: Mesh) -> Array:
    """Images of a codec of which every device has a copy: each decodes rows of its own."""
    axes = row_axes(codes.shape[0], mesh)
    if not axes:
        return inner(params, codes)
    # Not a constraint: under vmap XLA joins the new axis and the rows into the batch of each
    # convolution, in an order whose parts are no blocks, and every device would decode everything.
    rows = PartitionSpec(axes)
    decode = jax.shard_map(
        inner, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )
    return decode(params, codes)


def _on_mesh(fn: Callable, inner: Callable | None, mesh: Mesh) -> Callable | None:
    if inner is None or mesh.size == 1:
        return inner
    return bind(fn, inner=inner, mesh=mesh)


def _plain(fn: Any) -> Any:
    """A network's own function, if it was laid out before, perhaps over another mesh."""
    if isinstance(fn, Bound) and fn.fn in (_apply_together, _decode_apart):
        return dict(fn.settings)["inner"]
    return fn
