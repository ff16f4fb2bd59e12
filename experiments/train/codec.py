"""Trains a small MagVIT-v2 LFQ codec on any folder of photos.

    python -m experiments.train_codec --data PHOTOS --eval-data HELD_OUT --out runs/codec

A run that is interrupted goes on where it stopped when started again with the same `--out`. The
averaged weights are exported at every held-out score to `OUT/model` (`codec.safetensors` in half
precision and `card.json`), next to the log, the loss curves and a grid of reconstructions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

import aps_jax
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec, reconstruct
from aps_jax.io import checkpoint
from aps_jax.pretrained import model_folder
from aps_jax.types import Perceptual, PyTree
from experiments import photos, training
from experiments.train import widening
from experiments.train.codec_loss import codec_loss, evaluate
from experiments.train.patches import with_patches
from experiments.train.restarts import Restarts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Settings of one training run.

    Attributes:
      codec: sizes of the codec; with `init` those of its codec. An `init` of signs goes on as the
        same codec with a table of them where "vq" is asked for, and where "grouped" is, with
        `num_bits` bits, which may be more, dealt out to `code_groups` tokens.
      image_size: side of the training crops.
      max_flat: largest share of a crop that may be plain ground (`photos.flat_share`) if another
        place of its photo has less. Catalogue pictures on white teach a prior to fill holes with
        white.
      commitment: weight of the distance between features and their codes ("lfq", "grouped", "vq").
      entropy: weight of the missing entropy of the codebook, log K - H(mean code distribution). A
        penalty on single bits is not enough: they stay correlated and most codes go unused.
      entropy_tokens: tokens per batch that the entropy is estimated from.
      restart_every: steps between restarts of the rows of the table of "vq" that no token used of
        late (0 for never), in the first three quarters of the training.
      bit_flips: probability that the decoder sees a bit of a code flipped while training. Codes
        that differ in few bits then decode alike, which is what gradients through codes need to
        find their way: samplers gain far more than the codec loses.
      code_noise: the same for other codebooks: Gaussian noise on what the decoder sees, in units of
        the standard deviation of each number of the codes.
      perceptual: weight of LPIPS, which needs the `lpips` extra; 0 for none.
      perceptual_images: images of a step that LPIPS is taken of, 0 for all. On a CPU it costs as
        much per image as the codec does.
      freeze_encoder: train the decoder alone (with `init`), not the table of "vq" either. Tokens
        stay what they are, so priors that were trained on them stay valid.
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
    max_flat: float = 1.0
    commitment: float = 0.05
    entropy: float = 0.005
    entropy_tokens: int = 2048
    restart_every: int = 50
    bit_flips: float = 0.03
    code_noise: float = 0.0
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
            config = dataclasses.replace(self, codec=widening.sizes_of(sizes, self.codec))
        if not self.smoke:
            return config
        tiny = CodecConfig(
            num_bits=6,
            encoder_channels=(8, 8, 16),
            encoder_blocks=(0, 0, 0),
            decoder_channels=(8, 8, 16),
            decoder_blocks=(0, 0, 0),
            num_groups=4,
            patch_width=16,
            quantizer=config.codec.quantizer,
            levels=(8, 8) if config.codec.quantizer == "fsq" else (),
        )
        return dataclasses.replace(
            config, codec=config.codec if self.init else tiny, image_size=32, steps=6,
            batch_size=4, warmup=2, eval_every=3, save_every=3, num_eval=4, patch_steps=3,
            patch_batch=64,
        )  # fmt: skip


def export(params: PyTree, config: Config, row: dict, num_photos: int) -> None:
    """Writes the model folder."""
    folder = config.out / "model"
    checkpoint.save_params(folder / "codec.safetensors", params, "float16")
    facts = training.facts(config, row, "codec_training") | {
        "photos": num_photos,
        "image_size": config.image_size,
        "bit_flips": config.bit_flips,
        "code_noise": config.code_noise,
        "perceptual": config.perceptual,
        "freeze_encoder": config.freeze_encoder,
        "eval_photos": row["eval_photos"],
        "eval_psnr": round(row["eval_psnr"], 2),
        "eval_codes_used": row["eval_codes_used"],
    }
    digits = {"eval_psnr_flipped": 2, "eval_lpips": 3}
    facts |= {name: round(row[name], n) for name, n in digits.items() if name in row}
    checkpoint.update_card(folder, codec=dataclasses.asdict(config.codec), codec_training=facts)


def initial_params(config: Config, pictures: Sequence[Image.Image]) -> PyTree:
    """Weights of the codec in `config.init`, or random ones with a trained patch path."""
    random = jax.jit(init_codec_params, static_argnums=1)(jax.random.key(config.seed), config.codec)
    if config.init is None and config.codec.patch_width:
        return with_patches(random, pictures, config)
    if config.init is None:
        return random
    source = training.initial_sizes(config, "codec", CodecConfig)
    shapes = jax.eval_shape(lambda key: init_codec_params(key, source), jax.random.key(0))
    given = checkpoint.load_params(model_folder(config.init) / "codec.safetensors", shapes)
    return widening.params_of(given, source, random, config.codec)


def learn(
    config: Config,
    pictures: Sequence[Image.Image],
    perceptual: Perceptual | None,
    score: Callable[[PyTree, dict[str, float]], dict[str, float]],
) -> None:
    """Trains until the end or the minutes are over; `score` gets all averaged weights and a row."""
    sizes = dataclasses.replace(config.codec, dtype=config.dtype)
    optimizer = training.make_optimizer(config)
    trained = initial_params(config, pictures)
    parts = [name for name in trained if config.freeze_encoder and name != "decoder"]
    frozen = {name: trained.pop(name) for name in parts}

    def loss(params, frozen, x, key):
        params = frozen | params
        codec = make_codec(sizes, params)
        encode, decode = (functools.partial(part, params) for part in (codec.encode, codec.decode))
        return codec_loss(encode, decode, codec.quantizer, x, key, config, perceptual)

    key = jax.random.key(config.seed + 2)
    step = training.make_update(loss, optimizer, config.ema_decay, key)
    restarts = Restarts(config, lambda params, x: make_codec(sizes, params).encode(params, x))

    def update(state, batch):
        return step(restarts(state, batch), frozen, batch)

    def batches(steps):
        return photos.prefetched_batches(
            pictures, config.seed, steps, batch_size=config.batch_size, size=config.image_size,
            max_flat=config.max_flat,
        )  # fmt: skip

    training.fit(
        training.init_state(trained, optimizer),
        update,
        batches,
        lambda state, row: score(frozen | state.ema, row),
        config,
        config.out / "codec.jsonl",
    )


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    if config.freeze_encoder and config.init is None:
        raise ValueError("--freeze-encoder needs --init: a random encoder would stay random")
    training.claim(config)
    side = config.image_size
    _, held_out = photos.center_crops(
        config.eval_data, size=side, shrink=config.eval_shrink, count=config.num_eval
    )
    pictures = photos.load_photos(config.data, min_side=side, max_short_side=256)
    print(
        f"{len(pictures)} of {len(photos.list_images(config.data))} training photos are at least "
        f"{side} pixels on a side; {len(held_out)} photos are held out",
        flush=True,
    )
    perceptual = aps_jax.load_lpips() if config.perceptual else None

    def score(params, row):
        scores = evaluate(params, held_out, config.codec, perceptual)
        export(params, config, row | scores, len(pictures))
        sample = held_out[:8]
        restored = np.asarray(jax.jit(reconstruct)(make_codec(config.codec, params), sample))
        training.save_grid([sample, restored], config.out / "codec_reconstructions.png", zoom=2)
        return scores

    learn(config, pictures, perceptual, score)
    panels = {"squared error": ["mse"], "held-out PSNR (dB)": ["eval_psnr"]}
    rows = training.read_rows(config.out / "codec.jsonl")
    training.plot_curves(rows, panels, config.out / "codec_curves.png")


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_codec", train, arguments)
