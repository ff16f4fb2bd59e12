"""Trains a small MagVIT-v2 LFQ codec on any folder of photos.

    python -m experiments.train_codec --data PHOTOS --eval-data HELD_OUT --out runs/codec

A run that is interrupted goes on where it stopped when started again with the same `--out`. The
averaged weights are exported at every held-out score to `OUT/model` (`codec.safetensors` in half
precision and `card.json`), next to the log, the loss curves and a grid of reconstructions.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aps_jax import checkpoint, lfq
from aps_jax.tokenizer import CodecConfig, init_codec_params, make_codec
from aps_jax.types import Array, PyTree
from experiments import photos, training


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one training run.

    Attributes:
      data: folders of training photos, searched recursively.
      eval_data: folder of held-out photos.
      out: folder of the run.
      codec: sizes of the codec.
      image_size: side of the training crops.
      steps: optimiser steps.
      batch_size: crops per step.
      learning_rate: peak learning rate.
      warmup: steps of linear warm-up.
      ema_decay: decay of the averaged weights, which are the ones exported.
      commitment: weight of the distance between features and their codes.
      entropy: weight of the missing entropy of the codebook, log K - H(mean code distribution). A
        penalty on single bits is not enough: they stay correlated and most codes go unused.
      entropy_tokens: tokens per batch that the entropy is estimated from.
      weight_decay: AdamW weight decay.
      eval_every: steps between held-out scores.
      save_every: steps between checkpoints.
      num_eval: held-out photos scored.
      minutes: stop (resumably) after this long; 0 for no limit.
      seed: seed of weights and crops.
      description: what the training data are, for the card.
      smoke: a tiny run that proves that everything works.
    """

    data: tuple[Path, ...]
    eval_data: Path
    out: Path
    codec: CodecConfig = CodecConfig(
        num_bits=13,
        encoder_channels=(32, 64, 128),
        encoder_blocks=(1, 1, 2),
        decoder_channels=(32, 64, 128),
        decoder_blocks=(1, 1, 3),
        num_groups=16,
    )
    image_size: int = 64
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100
    ema_decay: float = 0.998
    commitment: float = 0.05
    entropy: float = 0.02
    entropy_tokens: int = 1024
    weight_decay: float = 1e-4
    eval_every: int = 250
    save_every: int = 250
    num_eval: int = 64
    minutes: float = 0.0
    seed: int = 0
    description: str = ""
    smoke: bool = False

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


def export(params: PyTree, config: Config, log: dict, num_photos: int) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    checkpoint.save_params(folder / "codec.safetensors", params, "float16")
    training_facts = {
        "data": config.description or [str(path) for path in config.data],
        "photos": num_photos,
        "steps": log["step"],
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "seconds": round(log["seconds"]),
        "device": jax.devices()[0].device_kind,
        "eval_psnr": round(log["eval_psnr"], 2),
        "eval_codes_used": log["eval_codes_used"],
    }
    checkpoint.update_card(
        folder, codec=dataclasses.asdict(config.codec), codec_training=training_facts
    )


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    config.out.mkdir(parents=True, exist_ok=True)
    log_path = config.out / "codec.jsonl"
    _, held_out = photos.center_crops(
        config.eval_data, size=config.image_size, shrink=2, count=config.num_eval
    )
    pictures = photos.load_photos(config.data, min_side=config.image_size, max_short_side=256)
    print(f"{len(pictures)} training photos, {len(held_out)} held out", flush=True)

    optimizer = training.make_optimizer(
        config.learning_rate,
        warmup=config.warmup,
        steps=config.steps,
        weight_decay=config.weight_decay,
    )
    params = init_codec_params(jax.random.key(config.seed), config.codec)
    state = training.init_state(params, optimizer)
    checkpoints = training.Checkpoints(config.out / "state")
    state = checkpoints.restore(state)
    first = int(state.step)
    training.truncate_log(log_path, first)
    earlier = training.read_rows(log_path) if first else []
    seconds_before = earlier[-1]["seconds"] if earlier else 0.0

    @jax.jit
    def update(state, batch):
        (_, terms), grads = jax.value_and_grad(codec_loss, has_aux=True)(
            state.params, batch, config
        )
        return training.apply_gradients(state, grads, optimizer, config.ema_decay), terms

    start = time.monotonic()
    batches = photos.prefetched_batches(
        pictures,
        config.seed,
        range(first, config.steps),
        batch_size=config.batch_size,
        size=config.image_size,
    )
    for step, batch in batches:
        state, terms = update(state, batch)
        done = step + 1
        seconds = seconds_before + time.monotonic() - start
        out_of_time = config.minutes and time.monotonic() - start > 60 * config.minutes
        last = done == config.steps or out_of_time
        row = {"step": done, "seconds": seconds}
        if done % 25 == 0 or last:
            row |= {name: float(value) for name, value in terms.items()}
        if done % config.eval_every == 0 or last:
            row |= evaluate(state.ema, held_out, config.codec)
            export(state.ema, config, row, len(pictures))
        if len(row) > 2:
            training.append_row(log_path, row)
            print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), flush=True)
        if done % config.save_every == 0 or last:
            checkpoints.save(state)
        if out_of_time:
            print(f"stopped after {config.minutes} minutes; start again to go on", flush=True)
            break
    checkpoints.close()

    panels = {"squared error": ["mse"], "held-out PSNR (dB)": ["eval_psnr"]}
    training.plot_curves(training.read_rows(log_path), panels, config.out / "codec_curves.png")
    codec = make_codec(config.codec, state.ema)
    sample = held_out[:8]
    codes, _ = codec.quantize(codec.codebook, codec.encode(state.ema, sample))
    restored = np.asarray(codec.decode(state.ema, codes))
    training.save_grid([sample, restored], config.out / "codec_reconstructions.png", zoom=2)


if __name__ == "__main__":
    train(tyro.cli(Config))
