"""Trains a small MagVIT-v2 LFQ codec on any folder of photos.

    python -m experiments.train_codec --data PHOTOS --eval-data HELD_OUT --out runs/codec

A run that is interrupted goes on where it stopped when started again with the same `--out`. The
averaged weights are exported at every held-out score to `OUT/model` (`codec.safetensors` in half
precision and `card.json`), next to the log, the loss curves and a grid of reconstructions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aps_jax import checkpoint, lfq
from aps_jax.pretrained import model_folder
from aps_jax.tokenizer import CodecConfig, init_codec_params, make_codec
from aps_jax.types import Array, PyTree
from experiments import photos, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      codec: sizes of the codec.
      image_size: side of the training crops.
      commitment: weight of the distance between features and their codes.
      entropy: weight of the missing entropy of the codebook, log K - H(mean code distribution). A
        penalty on single bits is not enough: they stay correlated and most codes go unused.
      entropy_tokens: tokens per batch that the entropy is estimated from.
    """

    codec: CodecConfig = CodecConfig(
        num_bits=13,
        encoder_channels=(32, 64, 128),
        encoder_blocks=(1, 1, 2),
        decoder_channels=(32, 64, 128),
        decoder_blocks=(1, 1, 3),
        num_groups=16,
    )
    image_size: int = 64
    commitment: float = 0.05
    entropy: float = 0.02
    entropy_tokens: int = 1024

    def resolved(self) -> Config:
        """The settings of a smoke run, if one was asked for."""
        if not self.smoke:
            return self
        tiny = CodecConfig(
            num_bits=6,
            encoder_channels=(8, 8, 16),
            encoder_blocks=(0, 0, 1),
            decoder_channels=(8, 8, 16),
            decoder_blocks=(0, 0, 1),
            num_groups=4,
        )
        return dataclasses.replace(
            self, codec=tiny, image_size=32, steps=6, batch_size=4, warmup=2, eval_every=3,
            save_every=3, num_eval=4,
        )  # fmt: skip


def codec_loss(params: PyTree, x: Array, config: Config) -> tuple[Array, dict[str, Array]]:
    """Squared error of the reconstruction plus the two quantiser terms."""
    codec = make_codec(config.codec, params)
    features = codec.encode(params, x)
    codes, _ = lfq.quantize(codec.codebook, features)
    restored = codec.decode(params, lfq.straight_through(features, codes))
    mse = jnp.mean((restored - x) ** 2)
    commitment = jnp.mean((features - jax.lax.stop_gradient(codes)) ** 2)
    missing = missing_entropy(features, codec.codebook, config.entropy_tokens)
    loss = mse + config.commitment * commitment + config.entropy * missing
    return loss, {"loss": loss, "mse": mse, "commitment": commitment, "missing_entropy": missing}


def missing_entropy(features: Array, codebook: Array, num_tokens: int) -> Array:
    """Nats by which the average code distribution falls short of the uniform one.

    Every feature z stands for independent bits with P(bit = 1) = sigmoid(4 z); the distributions
    over whole codes are averaged over `num_tokens` tokens spread over the batch.
    """
    flat = features.reshape(-1, features.shape[-1])
    flat = flat[:: max(1, flat.shape[0] // num_tokens)]
    mean = jnp.mean(jax.nn.softmax(2 * flat @ codebook.T, axis=-1), axis=0)
    return jnp.log(codebook.shape[0]) + jnp.sum(mean * jnp.log(mean + 1e-9))


def evaluate(params: PyTree, images: np.ndarray, config: CodecConfig) -> dict[str, float]:
    """Mean PSNR over `images` (clipped, per image) and how much of the codebook they use."""
    codec = make_codec(config, params)

    @jax.jit
    def restore(params, x):
        codes, tokens = codec.quantize(codec.codebook, codec.encode(params, x))
        return codec.decode(params, codes), tokens

    psnr, used = [], []
    for start in range(0, len(images), 8):
        batch = images[start : start + 8]
        restored, tokens = jax.device_get(restore(params, batch))
        mse = np.mean((np.clip(restored, -1, 1) - batch) ** 2, axis=(1, 2, 3))
        psnr.append(10 * np.log10(4 / np.maximum(mse, 1e-12)))
        used.append(np.unique(tokens))
    psnr = np.concatenate(psnr)
    counts = len(np.unique(np.concatenate(used)))
    return {
        "eval_psnr": float(psnr.mean()),
        "eval_psnr_std": float(psnr.std()),
        "eval_codes_used": counts,
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
        "optimizer": config.optimizer,
        "seconds": round(row["seconds"]),
        "device": jax.devices()[0].device_kind,
        "eval_psnr": round(row["eval_psnr"], 2),
        "eval_codes_used": row["eval_codes_used"],
    }
    facts |= training.origin(config, "codec_training")
    checkpoint.update_card(folder, codec=dataclasses.asdict(config.codec), codec_training=facts)


def initial_params(config: Config) -> PyTree:
    """Random weights, or those of the codec in `config.init`, which must have the same sizes."""
    random = init_codec_params(jax.random.key(config.seed), config.codec)
    if config.init is None:
        return random
    return checkpoint.load_params(model_folder(config.init) / "codec.safetensors", random)


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    config.out.mkdir(parents=True, exist_ok=True)
    _, held_out = photos.center_crops(
        config.eval_data, size=config.image_size, shrink=2, count=config.num_eval
    )
    pictures = photos.load_photos(config.data, min_side=config.image_size, max_short_side=256)
    print(f"{len(pictures)} training photos, {len(held_out)} held out", flush=True)
    optimizer = training.make_optimizer(config)

    @jax.jit
    def update(state, batch):
        (_, terms), grads = jax.value_and_grad(codec_loss, has_aux=True)(
            state.params, batch, config
        )
        return training.apply_gradients(state, grads, optimizer, config.ema_decay), terms

    def batches(steps):
        return photos.prefetched_batches(
            pictures, config.seed, steps, batch_size=config.batch_size, size=config.image_size
        )

    def score(state, row):
        scores = evaluate(state.ema, held_out, config.codec)
        export(state.ema, config, row | scores, len(pictures))
        return scores

    log = config.out / "codec.jsonl"
    state = training.init_state(initial_params(config), optimizer)
    state = training.fit(state, update, batches, score, config, log)

    panels = {"squared error": ["mse"], "held-out PSNR (dB)": ["eval_psnr"]}
    training.plot_curves(training.read_rows(log), panels, config.out / "codec_curves.png")
    codec = make_codec(config.codec, state.ema)
    sample = held_out[:8]
    codes, _ = codec.quantize(codec.codebook, codec.encode(state.ema, sample))
    restored = np.asarray(codec.decode(state.ema, codes))
    training.save_grid([sample, restored], config.out / "codec_reconstructions.png", zoom=2)


if __name__ == "__main__":
    train(tyro.cli(Config))
