"""Run by test_sharding.py with forced devices; prints one JSON line of comparisons.

With a mesh such as 2x4 it has eight devices of its own, with RANK, PORT and model folders those of
two processes.
"""

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import NUM_BITS, PRIOR_CONFIG, random_params
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import aps_jax
from aps_jax import APSConfig, Params, operators, sharding
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec
from aps_jax.io import checkpoint
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import init_transformer_params
from aps_jax.types import image_keys
from convert.stores import create_store

#: Two levels of the real architecture: each program is compiled several times.
CODEC_CONFIG = CodecConfig(
    num_bits=NUM_BITS, encoder_channels=(8, 16), encoder_blocks=(0, 0),
    decoder_channels=(8, 16), decoder_blocks=(0, 0), num_groups=4,
)  # fmt: skip
#: With a key head for every device, each of which serves two query heads.
WIDE_CONFIG = dataclasses.replace(
    PRIOR_CONFIG, width=64, num_heads=16, num_kv_heads=8, mlp_width=24
)
CONFIG = APSConfig(
    num_steps=3, num_inner_steps=2, warm_start=True, prior_weight=0.1, sensitivity_floor=0.3,
    draw="categorical", encoder_start=0.5,
)  # fmt: skip
SEVERAL = APSConfig(num_steps=2, num_inner_steps=2, draw="categorical", num_samples=8)
sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


def is_same(placed, loaded):
    return (
        placed.sharding.is_equivalent_to(loaded.sharding, placed.ndim)
        and placed.dtype == loaded.dtype
        and all(
            np.array_equal(ours.data, theirs.data)
            for ours, theirs in zip(
                placed.addressable_shards, loaded.addressable_shards, strict=True
            )
        )
    )


@contextlib.contextmanager
def saved(codec, prior):
    """Folders of the model in both formats."""
    with contextlib.ExitStack() as stack:
        folders = []
        for kind in ("safetensors", "orbax"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for section, params in (("codec", codec.params), ("prior", prior.params)):
                flat = traverse_util.flatten_dict(params, sep="/")
                path = folder / checkpoint.weights_name(section, kind)
                stacked = {name for name in flat if name.startswith("blocks")}
                axes = dict.fromkeys(flat, -1 if section == "prior" else None)
                store = create_store(kind, path, flat, stacked=stacked, axes=axes)
                for name, array in flat.items():
                    for layer in range(len(array)) if name in stacked else (None,):
                        slot = store.slot(name, layer)
                        values = np.asarray(array if layer is None else array[layer])
                        for region in slot.regions():
                            slot.write(region, values[region])
                store.flush()
            sections = {"codec": CODEC_CONFIG, "prior": WIDE_CONFIG}
            sections = {name: dataclasses.asdict(config) for name, config in sections.items()}
            checkpoint.update_card(folder, prior_window=4, **sections)
            folders.append(folder)
        yield folders


def compiled(params, y, keys, config=CONFIG):
    return sample.lower(params, y, keys, config=config).compile()


def decoded_rows(text):
    """Batch sizes of the convolutions of one device's program."""
    return sorted({int(rows) for rows in re.findall(r"= f32\[(\d+),[^=]*? convolution\(", text)})


def most_gathered(text):
    """Numbers in the largest array that one device's program gathers from the others."""
    found = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    shapes = [shape for types in found for shape in re.findall(r"\[([\d,]*)\]", types)]
    return max((int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes), default=0)


def whole(x):
    """The values of an array of which other processes may have a part."""
    is_here = x.is_fully_addressable
    return np.asarray(x if is_here else multihost_utils.process_allgather(x, tiled=True))


def difference(result, alone, order=slice(None)):
    """How much a result differs from that of one device, whose images are then in this order."""
    got, want = ([whole(x) for x in (r.tokens, r.samples, r.info.loss)] for r in (result, alone))
    return {
        "same_tokens": bool(np.array_equal(got[0], want[0][order])),
        "image_error": float(np.max(np.abs(got[1] - want[1][order]))),
        "loss_error": float(np.max(np.abs(got[2] / want[2][:, order] - 1))),
    }


def problem(batch):
    codec = make_codec(CODEC_CONFIG, random_params(init_codec_params, CODEC_CONFIG))
    weights = random_params(init_transformer_params, WIDE_CONFIG, seed=1)
    params = Params(
        make_prior(WIDE_CONFIG, weights, window=4), codec, operators.super_resolution(scale=2)
    )
    shape = (batch, 8, 8, 3)
    x = jnp.asarray(np.tanh(np.random.default_rng(0).normal(size=shape)), jnp.float32)
    return params, params.operator(x), image_keys(jax.random.key(0), batch)


def run_mesh(params, y, keys, alone, folders, mesh):
    """One sampler call, placed and loaded."""
    placed = sharding.shard_params(params, mesh)
    batch = sharding.shard_batch((y, keys), mesh)
    program = compiled(placed, *batch)
    result = program(placed, *batch)
    models = [aps_jax.load_pretrained(folder, mesh=mesh) for folder in folders]
    loaded = [(model.prior, model.codec) for model in models]
    # The program takes them only if their functions are the same, too.
    again = program(sharding.shard_params(Params(*loaded[1], placed.operator), mesh), *batch)
    kernel = placed.prior.params["blocks"]["q"]["kernel"]
    facts = difference(result, alone) | {
        "loads_as_placed": [
            jax.tree.all(jax.tree.map(is_same, (placed.prior, placed.codec), model))
            for model in loaded
        ],
        "loaded_samples_same": difference(again, alone)["same_tokens"],
        "image_shards": len(set(map(str, result.images.sharding.devices_indices_map(
            result.images.shape).values()))),
        "kernel_columns": kernel.addressable_shards[0].data.shape[-1],
        "columns": kernel.shape[-1],
        "decoded_rows": decoded_rows(program.as_text()),
        "most_gathered": most_gathered(program.as_text()),
    }  # fmt: skip
    return facts, program, placed


def run_order(program, placed, y, keys, alone, mesh):
    """The same images in another order, which puts each on another device."""
    order = np.random.default_rng(1).permutation(len(y))
    batch = sharding.shard_batch((y[order], keys[order]), mesh)
    moved = np.mean(order != np.arange(len(y)))
    return difference(program(placed, *batch), alone, order) | {"moved": float(moved)}


def run_samples(params, y, keys, mesh, alone):
    """Eight samples of one measurement."""
    placed = sharding.shard_params(params, mesh)
    batch = sharding.shard_batch((y[:1], keys[:1]), mesh, num_samples=SEVERAL.num_samples)
    program = compiled(placed, *batch, config=SEVERAL)
    result = program(placed, *batch)
    return difference(result, alone) | {
        "spread": float(jnp.mean(result.std)),
        "decoded_rows": decoded_rows(program.as_text()),
    }


def run_parts(params, mesh):
    """The networks alone: what a prior without our layout does, and a decoder under vmap."""
    placed = sharding.shard_params(params, mesh)
    both = NamedSharding(mesh, PartitionSpec(("data", "model")))
    tokens = jax.device_put(jnp.zeros((8, 4, 4), jnp.int32), both)
    naive = jax.jit(params.prior.apply, out_shardings=both)
    naive = naive.lower(placed.prior.params, tokens).compile()
    codes = jax.random.normal(jax.random.key(0), (3, 8, 4, 4, 4))
    texts, images = [], []
    for codec, where in ((placed.codec, both), (params.codec, None)):
        decode = jax.jit(jax.vmap(codec.decode, in_axes=(None, 0)))
        given = codes
        if where is not None:
            given = jax.device_put(codes, NamedSharding(mesh, PartitionSpec(None, *where.spec)))
        program = decode.lower(codec.params, given).compile()
        texts.append(program.as_text())
        images.append(np.asarray(program(codec.params, given)))
    return {
        "naive_gathered": most_gathered(naive.as_text()),
        "vmapped_rows": decoded_rows(texts[0]),
        "vmapped_rows_alone": decoded_rows(texts[1]),
        "vmapped_error": float(np.max(np.abs(images[0] - images[1]))),
    }


def main(name):
    params, y, keys = problem(8)
    program = compiled(params, y, keys)
    alone = program(params, y, keys)
    several = compiled(params, y[:1], keys[:1], config=SEVERAL)(params, y[:1], keys[:1])
    mesh = sharding.make_mesh(*map(int, name.split("x")))
    with saved(params.codec, params.prior) as folders:
        found, spread_program, placed = run_mesh(params, y, keys, alone, folders, mesh)
    facts = {
        "devices": len(jax.devices()),
        "decoded_rows": decoded_rows(program.as_text()),
        "smallest_matrix": params.prior.params["head"]["kernel"].size,
        "mesh": found,
        "samples": run_samples(params, y, keys, mesh, several),
    }
    if name == "2x4":
        facts["order"] = run_order(spread_program, placed, y, keys, alone, mesh)
        facts["parts"] = run_parts(params, mesh)
    print(json.dumps(facts))


def main_of_two(rank, port, *folders):
    # Short, so that the failure of one ends the other.
    limits = {"initialization_timeout": 60, "shutdown_timeout_seconds": 60}
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), **limits)
    params, y, keys = problem(4)
    alone = sample(params, y, keys, config=CONFIG)
    facts = {"devices": len(jax.devices()), "own": len(jax.local_devices()), "meshes": {}}
    for num_data, num_model in ((2, 2), (1, 4)):
        mesh = sharding.make_mesh(num_data, num_model)
        found, *_ = run_mesh(params, y, keys, alone, folders, mesh)
        facts["meshes"][f"{num_data}x{num_model}"] = found
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else main_of_two(*sys.argv[1:])
