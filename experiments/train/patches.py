"""The patch path of a codec, trained alone before everything else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from aps_jax.codec.config import make_quantizer
from aps_jax.codec.magvit2 import PatchPath, space_to_depth
from aps_jax.io import checkpoint
from aps_jax.types import PyTree
from experiments import photos
from experiments.train.codec_loss import codec_loss
from experiments.train.optimizer import init_state, make_optimizer, make_update
from experiments.train.restarts import Restarts


def train_patches(params: PyTree, pictures: Sequence[Image.Image], config: Any) -> PyTree:
    """Trains the patch path of `params` alone; the convolutions' last layers become zero."""
    codec = config.codec
    encoder = PatchPath(codec, codec.num_features)
    decoder = PatchPath(codec, 3 * codec.stride**2)
    settings = dataclasses.replace(
        config,
        steps=config.patch_steps,
        learning_rate=config.patch_learning_rate,
        entropy=config.patch_entropy,
    )
    optimizer = make_optimizer(settings)

    def encode(params, patches):
        x = patches.astype(jnp.float32) / 127.5 - 1
        return codec.features(encoder.apply({"params": params["encoder"]}, x))

    def decode(params, codes):
        return decoder.apply({"params": params["decoder"]}, codec.numbers(codes))

    def loss(params, patches, key):
        x = patches.astype(jnp.float32) / 127.5 - 1
        return codec_loss(
            lambda _: encode(params, patches),
            functools.partial(decode, params),
            make_quantizer(codec, params),
            x,
            key,
            settings,
        )

    update = make_update(loss, optimizer, config.ema_decay, jax.random.key(config.seed + 1))

    rng = np.random.default_rng((config.seed, 1))
    chosen = rng.permutation(len(pictures))
    crops = [photos.random_crop(rng, pictures[index], config.image_size) for index in chosen]
    crops = np.stack([np.asarray(crop) for crop in crops])
    patches = np.asarray(space_to_depth(crops, codec.stride)).reshape(-1, 3 * codec.stride**2)
    halves = {half: params[half]["patch"] for half in ("encoder", "decoder")}
    table = {name: params[name] for name in ("quantizer",) if name in params}
    state = init_state(halves | table, optimizer)
    restarts = Restarts(settings, encode)
    for step in range(config.patch_steps):
        batch = patches[rng.integers(len(patches), size=config.patch_batch)]
        state, terms = update(restarts(state, batch), batch)
        if (step + 1) % 250 == 0:
            values = " ".join(f"{name}={float(value):.4g}" for name, value in terms.items())
            print(f"patch step {step + 1}: {values}", flush=True)
    last = {"encoder": "quant_conv", "decoder": "conv_out"}
    table = {name: state.ema[name] for name in table}
    return table | {
        half: params[half]
        | {"patch": state.ema[half], name: jax.tree.map(jnp.zeros_like, params[half][name])}
        for half, name in last.items()
    }


def with_patches(params: PyTree, pictures: Sequence[Image.Image], config: Any) -> PyTree:
    """`params` after `train_patches`, which a resumed run does not repeat."""
    path = config.out / "patches.safetensors"
    if not path.exists():
        checkpoint.save_params(path, train_patches(params, pictures, config), "float32")
    return checkpoint.load_params(path, params)
