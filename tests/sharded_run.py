"""Run by test_sharding.py with eight forced devices; prints one JSON line of comparisons."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_tiny_codec, make_tiny_prior

import aps_jax
from aps_jax import APSConfig, Params, operators, sharding
from aps_jax.types import image_keys


def main():
    codec, prior = make_tiny_codec(), make_tiny_prior()
    config = APSConfig(
        num_steps=3, num_inner_steps=2, warm_start="logits", prior_weight=0.1, evidence_floor=0.3,
        draw="categorical",
    )  # fmt: skip
    params = Params(prior, codec, operators.super_resolution(scale=4))
    x = jnp.asarray(np.tanh(np.random.default_rng(0).normal(size=(8, 16, 16, 3))), jnp.float32)
    y = params.operator(x)
    keys = image_keys(jax.random.key(0), 8)
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")
    alone = sample(params, y, keys, config=config)

    facts = {"devices": len(jax.devices()), "meshes": {}}
    for num_data, num_model in ((8, 1), (4, 2)):
        mesh = sharding.make_mesh(num_data, num_model)
        placed = sharding.shard_params(params, mesh)
        result = sample(placed, *sharding.shard_batch((y, keys), mesh), config=config)
        kernel = placed.prior.params["blocks"]["q"]["kernel"]
        facts["meshes"][f"{num_data}x{num_model}"] = {
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
