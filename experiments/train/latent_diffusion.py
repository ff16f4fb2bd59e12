r"""Trains a denoiser of a codec's latents, the prior of latent diffusion.

    python -m experiments.train_latent_diffusion --codec face64 --data FACES --eval-data HELD_OUT \
        --out runs/latent
    python -m experiments.train_latent_diffusion --codec photo64 --num-crops 12000 --eval-shrink 2 \
        --data PHOTOS --eval-data HELD_OUT --out runs/latent_photos

All is as in `experiments.train_diffusion`, but that a position of the transformer is a patch of 2x2
latents, so that 64x64 pixels of a codec of stride 4 are 64 positions. The pictures, or crops of
them, and their mirror images are encoded once, into `OUT/latents.npz`. `OUT/model` gets the codec,
too, and `latent_denoiser.safetensors`; both also fit into the folder of the codec's own model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec import latents
from aps_jax.io import checkpoint
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import load_codec, model_folder
from aps_jax.prior.patch_denoiser import PatchDenoiserConfig
from aps_jax.types import Array, Codec
from experiments import photos, training
from experiments.train import diffusion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(diffusion.DenoiserRun):
    """Settings of one training run.

    Attributes:
      denoiser: sizes, of which side and patch count latents; channels and the standard deviation of
        the data are those of the latents, whatever is said here.
      codec: name or folder of the model whose codec has the latents.
      num_crops: random squares of several scales to learn, for photos; with 0 all pictures are read
        whole, as their centre squares, for aligned ones.
      max_flat: as for `train_codec`, with `num_crops`.
    """

    SECTION: ClassVar = "latent_denoiser"
    #: Decoders correct what is wrong with latents at low levels, so that the higher ones count.
    LOG_SIGMA_MEAN: ClassVar = 0.0

    codec: str
    denoiser: PatchDenoiserConfig = PatchDenoiserConfig(side=16, patch=2)
    num_crops: int = 0
    max_flat: float = 1.0


@jax.jit
def _encode(codec: Codec, pixels: Array) -> Array:
    return latents.encode(codec, pixels.astype(jnp.float32) / 127.5 - 1).astype(jnp.float16)


def training_latents(config: Config, codec: Codec) -> np.ndarray:
    """Latents of all pictures or crops and their mirror images, float16 [pictures, 2, h, w, d].

    They are kept in the folder of the run, for the same weights, pictures, crops and size.
    """
    folder, size = model_folder(config.codec), config.denoiser.side * codec.stride
    weights = checkpoint.weights_path(folder, "codec").read_bytes()
    names = [path.as_posix() for path in photos.list_images(config.data)]
    settings = (names, size, config.num_crops, config.max_flat, config.seed)
    key = hashlib.sha256(weights + repr(settings).encode()).hexdigest()
    path = config.out / "latents.npz"
    if path.exists():
        with np.load(path) as cached:
            if str(cached["key"]) == key:
                return cached["latents"]
    found = _all_latents(config, codec, size)
    archive = io.BytesIO()
    np.savez(archive, key=np.asarray(key), latents=found)
    write_atomically(path, archive.getvalue())
    return found


def _all_latents(config: Config, codec: Codec, size: int) -> np.ndarray:
    pictures = photos.load_photos(config.data, min_side=size, max_short_side=256)
    chosen, batch = np.arange(config.num_crops or len(pictures)) % len(pictures), 16
    encoded = []
    for first in range(0, len(chosen), batch):
        stack = photos.numbered_crops(
            pictures, chosen, first, batch_size=batch, seed=config.seed, size=size,
            is_whole=not config.num_crops, max_flat=config.max_flat,
        )  # fmt: skip
        pairs = np.stack([stack, stack[:, :, ::-1]], axis=1)
        found = _encode(codec, pairs.reshape(-1, *stack.shape[1:]))
        encoded.append(np.asarray(found).reshape(batch, 2, *found.shape[1:]))
    return np.concatenate(encoded)[: len(chosen)]


def random_batch(rows: np.ndarray, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The batch of one training step, float32: a function of (seed, step)."""
    rng = np.random.default_rng((seed, step))
    chosen = rng.integers(len(rows), size=batch_size), rng.integers(2, size=batch_size)
    return rows[chosen].astype(np.float32)


def latents_of(config: Config, codec: Codec, rows: np.ndarray) -> diffusion.Data:
    """Latents for training and those of the held-out pictures."""
    _, pictures = photos.center_crops(
        config.eval_data, size=config.denoiser.side * codec.stride, shrink=config.eval_shrink,
        count=config.num_eval,
    )  # fmt: skip
    encode = jax.jit(latents.encode)
    held_out = np.concatenate(
        [np.asarray(encode(codec, one[None])) for one in jnp.asarray(pictures)]
    )

    def batches(steps: range) -> Iterator[tuple[int, np.ndarray]]:
        for step in steps:
            yield step, random_batch(rows, config.seed, step, config.batch_size)

    return diffusion.Data(len(rows), batches, held_out, pictures, codec)


def train(config: Config) -> None:
    """Runs or resumes a training."""
    config = config.resolved()
    training.claim(config)
    folder = model_folder(config.codec)
    codec = load_codec(folder)
    rows = training_latents(config, codec)
    if config.init is None:
        spread = round(float(np.std(rows, dtype=np.float64)), 4)
        sizes = dataclasses.replace(
            config.denoiser, num_channels=codec.quantizer.num_features, sigma_data=spread
        )
        config = dataclasses.replace(config, denoiser=sizes)
    model = config.out / "model"
    model.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint.weights_path(folder, "codec"), model / "codec.safetensors")
    card = checkpoint.read_card(folder)
    parts = {name: card[name] for name in ("codec", "codec_training") if name in card}
    checkpoint.update_card(model, **parts)
    diffusion.learn(config, latents_of(config, codec, rows))


def main(arguments: Config) -> int:
    """Trains and returns the exit code."""
    return training.run("train_latent_diffusion", train, arguments)
