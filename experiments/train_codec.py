"""Trains a small MagVIT-v2 LFQ codec on any folder of photos.

    python -m experiments.train_codec --data PHOTOS --eval-data HELD_OUT --out runs/codec

A run that is interrupted goes on where it stopped when started again with the same `--out`. The
averaged weights are exported at every held-out score to `OUT/model` (`codec.safetensors` in half
precision and `card.json`), next to the log, the loss curves and a grid of reconstructions.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

import aps_jax
from aps_jax.codec import lfq
from aps_jax.codec.expectation import straight_through
from aps_jax.codec.magvit2 import (
    CodecConfig,
    PatchPath,
    init_codec_params,
    make_codec,
    reconstruct,
    space_to_depth,
)
from aps_jax.io import checkpoint
from aps_jax.pretrained import model_folder
from aps_jax.types import Array, Key, Perceptual, PyTree
from experiments import photos, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      codec: sizes of the codec; with `init` those of its codec.
      image_size: side of the training crops.
      commitment: weight of the distance between features and their codes.
      entropy: weight of the missing entropy of the codebook, log K - H(mean code distribution). A
        penalty on single bits is not enough: they stay correlated and most codes go unused.
      entropy_tokens: tokens per batch that the entropy is estimated from.
      bit_flips: probability that the decoder sees a bit of a code flipped while training. Codes
        that differ in few bits then decode alike, which is what gradients through codes need to
        find their way: samplers gain far more than the codec loses.
      perceptual: weight of LPIPS, which needs the `lpips` extra; 0 for none.
      perceptual_images: images of a step that LPIPS is taken of, 0 for all. On a CPU it costs as
        much per image as the codec does.
      freeze_encoder: train the decoder alone (with `init`). Tokens stay what they are, so priors
        that were trained on them stay valid.
      patch_steps: steps that the patch path is trained alone before, from random weights, with the
        same loss; the convolutions then start from a contribution of zero.
      patch_batch: patches per step of that.
      patch_learning_rate: its peak learning rate.
      patch_entropy: its weight of the missing entropy. Patches from many photos fill the codebook;
        those of a few crops cannot, and a large weight would punish them for that.
    """

    codec: CodecConfig = CodecConfig(
        num_bits=13,
        encoder_channels=(32, 64, 128),
        encoder_blocks=(1, 1, 2),
        decoder_channels=(32, 64, 128),
        decoder_blocks=(1, 1, 3),
        num_groups=16,
        patch_width=256,
    )
    image_size: int = 64
    commitment: float = 0.05
    entropy: float = 0.005
    entropy_tokens: int = 2048
    bit_flips: float = 0.03
    perceptual: float = 0.0
    perceptual_images: int = 0
    freeze_encoder: bool = False
    patch_steps: int = 1500
    patch_batch: int = 4096
    patch_learning_rate: float = 4e-3
    patch_entropy: float = 0.02

    def resolved(self) -> Config:
        """With the sizes of `init`, and the settings of a smoke run if one was asked for."""
        config = self
        if self.init is not None:
            sizes = training.initial_sizes(self, "codec", CodecConfig)
            config = dataclasses.replace(self, codec=dataclasses.replace(sizes, dtype="float32"))
        if not self.smoke:
            return config
        tiny = CodecConfig(
            num_bits=6,
            encoder_channels=(8, 8, 16),
            encoder_blocks=(0, 0, 1),
            decoder_channels=(8, 8, 16),
            decoder_blocks=(0, 0, 1),
            num_groups=4,
            patch_width=16,
        )
        return dataclasses.replace(
            config, codec=config.codec if self.init else tiny, image_size=32, steps=6,
            batch_size=4, warmup=2, eval_every=3, save_every=3, num_eval=4, patch_steps=3,
            patch_batch=64,
        )  # fmt: skip


def flip_bits(key: Key, codes: Array, share: float) -> Array:
    """Codes [..., d] with every bit flipped with probability `share`."""
    return jnp.where(jax.random.bernoulli(key, share, codes.shape), -codes, codes)


def codec_loss(
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
    x: Array,
    key: Key,
    config: Config,
    perceptual: Perceptual | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the reconstruction plus the two quantiser terms, and LPIPS if given.

    The reconstruction is that of codes with some bits flipped, by `config.bit_flips`.
    """
    features = encode(x)
    codes, _ = lfq.quantize(features)
    flipped = flip_bits(key, codes, config.bit_flips)
    restored = decode(straight_through(features, flipped))
    mse = jnp.mean((restored - x) ** 2)
    commitment = jnp.mean((features - jax.lax.stop_gradient(codes)) ** 2)
    missing = missing_entropy(features, lfq.codebook(config.codec.num_bits), config.entropy_tokens)
    loss = mse + config.commitment * commitment + config.entropy * missing
    terms = {"mse": mse, "commitment": commitment, "missing_entropy": missing}
    if perceptual is not None:
        seen = slice(config.perceptual_images or None)
        terms["lpips"] = jnp.mean(perceptual(restored[seen], x[seen]))
        loss += config.perceptual * terms["lpips"]
    return loss, {"loss": loss} | terms


def missing_entropy(features: Array, codebook: Array, num_tokens: int) -> Array:
    """Nats by which the average code distribution falls short of the uniform one.

    Every feature z stands for independent bits with P(bit = 1) = sigmoid(4 z); the distributions
    over whole codes are averaged over `num_tokens` tokens spread over the batch.
    """
    flat = features.reshape(-1, features.shape[-1])
    flat = flat[:: max(1, flat.shape[0] // num_tokens)]
    mean = jnp.mean(jax.nn.softmax(2 * flat @ codebook.T, axis=-1), axis=0)
    return jnp.log(codebook.shape[0]) + jnp.sum(mean * jnp.log(mean + 1e-9))


def evaluate(
    params: PyTree, images: np.ndarray, config: CodecConfig, perceptual: Perceptual | None = None
) -> dict[str, float]:
    """Mean PSNR over `images` (clipped, per image), LPIPS if given, and codes in use.

    "eval_psnr_flipped" is the PSNR after 3 % of all bits were flipped: how smooth the codes are.
    """
    codec = make_codec(config, params)

    @jax.jit
    def restore(params, x):
        tokens = codec.quantizer.nearest(codec.encode(params, x))
        codes = codec.quantizer.lookup(tokens)
        flipped = flip_bits(jax.random.key(0), codes, 0.03)
        restored = codec.decode(params, codes)
        distance = perceptual(jnp.clip(restored, -1, 1), x) if perceptual else jnp.zeros(len(x))
        return restored, codec.decode(params, flipped), tokens, distance

    def psnr(restored, x):
        mse = np.mean((np.clip(restored, -1, 1) - x) ** 2, axis=(1, 2, 3))
        return 10 * np.log10(4 / np.maximum(mse, 1e-12))

    scores, flipped_scores, used, distances = [], [], [], []
    for start in range(0, len(images), 8):
        batch = images[start : start + 8]
        restored, flipped, tokens, distance = jax.device_get(restore(params, batch))
        distances.append(distance)
        scores.append(psnr(restored, batch))
        flipped_scores.append(psnr(flipped, batch))
        used.append(np.unique(tokens))
    scores = np.concatenate(scores)
    lpips = {"eval_lpips": float(np.concatenate(distances).mean())} if perceptual else {}
    return lpips | {
        "eval_psnr": float(scores.mean()),
        "eval_psnr_std": float(scores.std()),
        "eval_psnr_flipped": float(np.concatenate(flipped_scores).mean()),
        "eval_photos": len(images),
        "eval_codes_used": len(np.unique(np.concatenate(used))),
    }


def export(params: PyTree, config: Config, row: dict, num_photos: int) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    checkpoint.save_params(folder / "codec.safetensors", params, "float16")
    facts = {
        "data": config.description or [str(path) for path in config.data],
        "photos": num_photos,
        "steps": row["step"],
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "bit_flips": config.bit_flips,
        "perceptual": config.perceptual,
        "freeze_encoder": config.freeze_encoder,
        "optimizer": config.optimizer,
        "seconds": round(row["seconds"]),
        "device": training.device_name(),
        "eval_photos": row["eval_photos"],
        "eval_psnr": round(row["eval_psnr"], 2),
        "eval_psnr_flipped": round(row["eval_psnr_flipped"], 2),
        "eval_codes_used": row["eval_codes_used"],
    }
    if "eval_lpips" in row:
        facts["eval_lpips"] = round(row["eval_lpips"], 3)
    facts |= training.origin(config, "codec_training")
    checkpoint.update_card(folder, codec=dataclasses.asdict(config.codec), codec_training=facts)


def train_patches(params: PyTree, pictures: Sequence[Image.Image], config: Config) -> PyTree:
    """Trains the patch path of `params` alone; the convolutions' last layers become zero."""
    codec = config.codec
    encoder = PatchPath(codec, codec.num_bits)
    decoder = PatchPath(codec, 3 * codec.stride**2)
    settings = dataclasses.replace(
        config,
        steps=config.patch_steps,
        learning_rate=config.patch_learning_rate,
        entropy=config.patch_entropy,
    )
    optimizer = training.make_optimizer(settings)

    flip_key = jax.random.key(config.seed + 1)

    def loss(params, x, key):
        return codec_loss(
            lambda x: encoder.apply({"params": params["encoder"]}, x),
            lambda codes: decoder.apply({"params": params["decoder"]}, codes),
            x,
            key,
            settings,
        )

    @jax.jit
    def update(state, patches):
        x = patches.astype(jnp.float32) / 127.5 - 1
        key = jax.random.fold_in(flip_key, state.step)
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, x, key)
        return training.apply_gradients(state, grads, optimizer, config.ema_decay), terms

    rng = np.random.default_rng((config.seed, 1))
    chosen = rng.permutation(len(pictures))
    crops = [photos.random_crop(rng, pictures[index], config.image_size) for index in chosen]
    crops = np.stack([np.asarray(crop) for crop in crops])
    patches = np.asarray(space_to_depth(crops, codec.stride)).reshape(-1, 3 * codec.stride**2)
    halves = {half: params[half]["patch"] for half in ("encoder", "decoder")}
    state = training.init_state(halves, optimizer)
    for step in range(config.patch_steps):
        batch = patches[rng.integers(len(patches), size=config.patch_batch)]
        state, terms = update(state, batch)
        if (step + 1) % 250 == 0:
            values = " ".join(f"{name}={float(value):.4g}" for name, value in terms.items())
            print(f"patch step {step + 1}: {values}", flush=True)
    last = {"encoder": "quant_conv", "decoder": "conv_out"}
    return {
        half: params[half]
        | {"patch": state.ema[half], name: jax.tree.map(jnp.zeros_like, params[half][name])}
        for half, name in last.items()
    }


def _with_patches(params: PyTree, pictures: Sequence[Image.Image], config: Config) -> PyTree:
    """`params` after `train_patches`, which a resumed run does not repeat."""
    path = config.out / "patches.safetensors"
    if not path.exists():
        checkpoint.save_params(path, train_patches(params, pictures, config), "float32")
    return checkpoint.load_params(path, params)


def initial_params(config: Config, pictures: Sequence[Image.Image]) -> PyTree:
    """Weights of the codec in `config.init`, or random ones with a trained patch path."""
    random = init_codec_params(jax.random.key(config.seed), config.codec)
    if config.init is None and config.codec.patch_width:
        return _with_patches(random, pictures, config)
    if config.init is None:
        return random
    return checkpoint.load_params(model_folder(config.init) / "codec.safetensors", random)


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    if config.freeze_encoder and config.init is None:
        raise ValueError("--freeze-encoder needs --init: a random encoder would stay random")
    training.claim(config)
    _, held_out = photos.center_crops(
        config.eval_data,
        size=config.image_size,
        shrink=config.eval_shrink,
        count=config.num_eval,
    )
    pictures = photos.load_photos(config.data, min_side=config.image_size, max_short_side=256)
    num_found = len(photos.list_images(config.data))
    print(
        f"{len(pictures)} of {num_found} training photos are at least {config.image_size} pixels "
        f"on a side; {len(held_out)} photos are held out",
        flush=True,
    )
    sample = held_out[:8]
    optimizer = training.make_optimizer(config)
    perceptual = aps_jax.load_lpips() if config.perceptual else None

    sizes = dataclasses.replace(config.codec, dtype=config.dtype)

    flip_key = jax.random.key(config.seed + 2)
    trained = initial_params(config, pictures)
    frozen = {"encoder": trained.pop("encoder")} if config.freeze_encoder else {}

    def loss(params, frozen, x, key):
        params = frozen | params
        codec = make_codec(sizes, params)
        return codec_loss(
            functools.partial(codec.encode, params),
            functools.partial(codec.decode, params),
            x,
            key,
            config,
            perceptual,
        )

    @jax.jit
    def step(state, frozen, batch):
        key = jax.random.fold_in(flip_key, state.step)
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        return training.apply_gradients(state, grads, optimizer, config.ema_decay), terms

    def update(state, batch):
        return step(state, frozen, batch)

    def batches(steps):
        return photos.prefetched_batches(
            pictures, config.seed, steps, batch_size=config.batch_size, size=config.image_size
        )

    def score(state, row):
        params = frozen | state.ema
        scores = evaluate(params, held_out, config.codec, perceptual)
        export(params, config, row | scores, len(pictures))
        restored = np.asarray(jax.jit(reconstruct)(make_codec(config.codec, params), sample))
        training.save_grid([sample, restored], config.out / "codec_reconstructions.png", zoom=2)
        return scores

    log = config.out / "codec.jsonl"
    state = training.init_state(trained, optimizer)
    state = training.fit(state, update, batches, score, config, log)

    panels = {"squared error": ["mse"], "held-out PSNR (dB)": ["eval_psnr"]}
    training.plot_curves(training.read_rows(log), panels, config.out / "codec_curves.png")


if __name__ == "__main__":
    sys.exit(training.run("train_codec", train, tyro.cli(Config)))
