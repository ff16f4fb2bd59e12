"""Run by test_sharding.py with eight forced devices; prints one JSON line of comparisons."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import CODEC_CONFIG, PRIOR_CONFIG, make_tiny_codec, random_params
from flax import traverse_util

import aps_jax
from aps_jax import APSConfig, Params, checkpoint, operators, sharding
from aps_jax.prior import make_prior
from aps_jax.transformer import init_transformer_params
from aps_jax.types import image_keys
from convert.stores import create_store

#: With a head for every device.
WIDE_CONFIG = dataclasses.replace(PRIOR_CONFIG, width=32, num_heads=8)


def is_same(placed, loaded):
    return (
        placed.sharding.is_equivalent_to(loaded.sharding, placed.ndim)
        and placed.dtype == loaded.dtype
        and bool(jnp.array_equal(placed, loaded))
    )


def load(codec, prior, mesh):
    """The model from folders of both formats, straight to the mesh."""
    models = []
    for kind in ("safetensors", "orbax"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
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
            models.append(aps_jax.load_pretrained(folder, mesh=mesh))
    return models


def main():
    codec, weights = make_tiny_codec(), random_params(init_transformer_params, WIDE_CONFIG, seed=1)
    prior = make_prior(WIDE_CONFIG, weights, window=4)
    config = APSConfig(
        num_steps=3, num_inner_steps=2, warm_start="logits", prior_weight=0.1, evidence_floor=0.3,
        draw="categorical", encoder_start=0.5,
    )  # fmt: skip
    params = Params(prior, codec, operators.super_resolution(scale=4))
    x = jnp.asarray(np.tanh(np.random.default_rng(0).normal(size=(8, 16, 16, 3))), jnp.float32)
    y = params.operator(x)
    keys = image_keys(jax.random.key(0), 8)
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
    alone = sample(params, y, keys, config=config)

    facts = {"devices": len(jax.devices()), "meshes": {}}
    for num_data, num_model in ((8, 1), (4, 2), (1, 8)):
        mesh = sharding.make_mesh(num_data, num_model)
        placed = sharding.shard_params(params, mesh)
        result = sample(placed, *sharding.shard_batch((y, keys), mesh), config=config)
        kernel = placed.prior.params["blocks"]["q"]["kernel"]
        loaded = load(codec, prior, mesh)
        facts["meshes"][f"{num_data}x{num_model}"] = {
            "loads_as_placed": [
                jax.tree.all(jax.tree.map(is_same, (placed.prior, placed.codec), model[:2]))
                for model in loaded
            ],
            "loaded_samples_same": bool(
                jnp.array_equal(
                    sample(
                        Params(*loaded[1][:2], placed.operator),
                        *sharding.shard_batch((y, keys), mesh),
                        config=config,
                    ).tokens,
                    alone.tokens,
                )
            ),
            "same_tokens": bool(jnp.array_equal(result.tokens, alone.tokens)),
            "image_error": float(jnp.max(jnp.abs(result.images - alone.images))),
            "loss_error": float(jnp.max(jnp.abs(result.info.loss / alone.info.loss - 1))),
            "image_shards": len({str(s.index) for s in result.images.addressable_shards}),
            "kernel_columns": kernel.addressable_shards[0].data.shape[-1],
            "columns": kernel.shape[-1],
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
