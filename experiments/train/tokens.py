"""Tokens that a frozen codec gives to photo crops, and windows of them."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.io.files import write_atomically
from aps_jax.types import Array, Codec
from experiments import photos


@jax.jit
def _encode(codec: Codec, pixels: Array) -> Array:
    return encode_tokens(codec, pixels.astype(jnp.float32) / 127.5 - 1).astype(jnp.uint16)


def crop_tokens(config: Any, codec: Codec) -> dict[str, np.ndarray]:
    """Tokens of all crops, uint16 [crops, h, w], for "train" and "eval"; cached in the run folder.

    "train_files" and "eval_files" are the pictures they are from.

    The cache is keyed by the codec's weights and by every setting that changes the crops.

    Args:
      config: settings of the training (`experiments.train.prior.Config`).
      codec: loaded from `config.codec`.
    """
    weights = (config.codec / "codec.safetensors").read_bytes()
    settings = (
        config.data, config.eval_data, config.image_size, config.num_crops, config.seed,
        config.num_eval, config.eval_shrink, config.absolute_positions, config.max_flat,
    )  # fmt: skip
    key = hashlib.sha256(weights + repr(settings).encode()).hexdigest()
    path = config.out / "tokens.npz"
    if path.exists():
        with np.load(path) as cached:
            if str(cached["key"]) == key:
                return {name: cached[name] for name in cached.files if name != "key"}
    tokens = _training_tokens(config, codec) | _held_out_tokens(config, codec)
    archive = io.BytesIO()
    np.savez(archive, key=np.asarray(key), **tokens)
    write_atomically(path, archive.getvalue())
    return tokens


def _training_tokens(config: Any, codec: Codec) -> dict[str, np.ndarray]:
    """Tokens of random crops; every photo is used equally often before any is used once more."""
    size, batch = config.image_size, min(16, config.num_crops)
    pictures = photos.load_named_photos(config.data, min_side=size, max_short_side=256)
    print(f"{len(pictures)} training photos", flush=True)
    order = np.random.default_rng(config.seed).permutation(len(pictures))
    chosen = order[np.arange(config.num_crops) % len(order)]

    images = [image for _, image in pictures]

    def crops(first: int) -> np.ndarray:
        return photos.numbered_crops(
            images, chosen, first, batch_size=batch, seed=config.seed, size=size,
            is_whole=config.absolute_positions, max_flat=config.max_flat,
        )  # fmt: skip

    starts = range(0, config.num_crops, batch)
    with ThreadPoolExecutor(1) as pool:
        batches = track(pool.map(crops, starts), "tokens", total=len(starts))
        encoded = [np.asarray(_encode(codec, pixels)) for pixels in batches]
    return {
        "train": np.concatenate(encoded)[: config.num_crops],
        "train_files": np.array([pictures[index][0].as_posix() for index in chosen]),
    }


def _held_out_tokens(config: Any, codec: Codec) -> dict[str, np.ndarray]:
    files, held_out = photos.center_crops(
        config.eval_data, size=config.image_size, shrink=config.eval_shrink, count=config.num_eval
    )
    pixels = np.round((held_out + 1) * 127.5).astype(np.uint8)
    encoded = [np.asarray(_encode(codec, pixels[i : i + 16])) for i in range(0, len(pixels), 16)]
    return {"eval": np.concatenate(encoded), "eval_files": np.array(files)}


def random_windows(tokens: np.ndarray, config: Any, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [B] and grids int32 [B, window, window] of one step: a function of (seed, step)."""
    rng = np.random.default_rng((config.seed, 1, step))
    side = config.window
    chosen = rng.integers(len(tokens), size=config.batch_size)
    tops = rng.integers(tokens.shape[1] - side + 1, size=config.batch_size)
    lefts = rng.integers(tokens.shape[2] - side + 1, size=config.batch_size)
    return chosen, np.stack(
        [
            tokens[index, top : top + side, left : left + side].astype(np.int32)
            for index, top, left in zip(chosen, tops, lefts, strict=True)
        ]
    )
