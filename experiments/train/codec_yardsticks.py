"""Compares a codec with JPEG and with vector-quantised patches of the same rate, on whole photos.

    python -m experiments.codec_yardsticks --data PHOTOS --eval-data HELD_OUT \
        --out experiments/results/photo64/codec_yardsticks.json

The rate is that of the tokens as they are, without entropy coding: 0.8125 bit per pixel for
13 bits per 4x4 pixels. JPEG gets the highest quality whose file is no larger (headers counted,
optimised Huffman tables). The vector quantiser has as many codes as the codec, each a patch of
stride x stride pixels, and is trained by k-means: what a codebook gains without any network.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from PIL import Image
from rich.progress import track

import aps_jax
from aps_jax import metrics
from aps_jax.codec.magvit2 import decode_tokens, depth_to_space, encode_tokens, space_to_depth
from aps_jax.images import from_uint8, to_uint8
from aps_jax.io.checkpoint import read_card
from aps_jax.io.files import write_json
from aps_jax.pretrained import load_codec, model_folder
from aps_jax.types import Array, Codec, Key
from experiments import photos
from experiments.command import command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      data: folders of photos that the vector quantiser is trained on.
      eval_data: folder of held-out photos.
      out: JSON file to write.
      model: name or folder of the model whose codec is measured.
      short_side: short side that the held-out photos are reduced to, in pixels.
      count: held-out photos.
      num_patches: training patches of the vector quantiser.
      num_iterations: k-means iterations.
      seed: seed of the patches.
    """

    data: tuple[Path, ...]
    eval_data: Path
    out: Path
    model: str = "photo64"
    short_side: int = 256
    count: int = 200
    num_patches: int = 400_000
    num_iterations: int = 12
    seed: int = 0


@jax.jit
def nearest(patches: Array, centres: Array) -> Array:
    """Index of the centre nearest to each patch, int32 [n]."""

    def block(rows: Array) -> Array:
        return jnp.argmax(2 * rows @ centres.T - jnp.sum(centres**2, axis=-1), axis=-1)

    return jax.lax.map(block, patches, batch_size=4096).reshape(-1)


def k_means(key: Key, patches: Array, num_codes: int, num_iterations: int) -> Array:
    """Lloyd's algorithm from random patches; a centre that lost all patches restarts at one."""

    @jax.jit
    def update(patches, centres, chosen, key):
        count = jnp.zeros(num_codes).at[chosen].add(1)
        total = jnp.zeros_like(centres).at[chosen].add(patches)
        fresh = patches[jax.random.randint(key, (num_codes,), 0, len(patches))]
        mean = total / jnp.maximum(count, 1)[:, None]
        return jnp.where(count[:, None] > 0, mean, fresh)

    keys = jax.random.split(key, num_iterations + 1)
    centres = patches[jax.random.permutation(keys[0], len(patches))[:num_codes]]
    for index in track(range(num_iterations), "k-means"):
        centres = update(patches, centres, nearest(patches, centres), keys[index + 1])
    return centres


def jpeg(pixels: np.ndarray, max_bits: float) -> tuple[np.ndarray, float]:
    """The best JPEG of uint8 [H, W, 3] within `max_bits`, decoded, and its bits per pixel."""

    def encode(quality: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, optimize=True)
        return buffer.getvalue()

    low, high = 1, 95  # size grows with quality
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if 8 * len(encode(middle)) <= max_bits else (low, middle - 1)
    data = encode(low)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")), 8 * len(data) / pixels[..., 0].size


def patch_centres(arguments: Arguments, codec: Codec) -> Array:
    """As many patches [K, side * side * 3] as the codec has codes, by k-means on random crops."""
    rng = np.random.default_rng(arguments.seed)
    pictures = photos.load_photos(arguments.data, min_side=64, max_short_side=256)
    chosen = rng.permutation(len(pictures))
    crops = photos.to_float([photos.random_crop(rng, pictures[index], 64) for index in chosen])
    patches = space_to_depth(jnp.asarray(crops), codec.stride).reshape(-1, 3 * codec.stride**2)
    patches = patches[rng.permutation(len(patches))[: arguments.num_patches]]
    key = jax.random.key(arguments.seed)
    return k_means(key, patches, codec.num_codes, arguments.num_iterations)


@jax.jit
def restored(codec: Codec, centres: Array, x: Array) -> tuple[dict[str, Array], Array]:
    """Photos [B, H, W, 3] through codec and patches, and how often each code is used [K]."""
    patches = space_to_depth(x, codec.stride)
    coded = centres[nearest(patches.reshape(-1, centres.shape[1]), centres)]
    tokens = encode_tokens(codec, x)
    images = {
        "codec": decode_tokens(codec, tokens),
        "patch VQ": depth_to_space(coded.reshape(patches.shape), codec.stride),
    }
    return images, jnp.bincount(tokens.reshape(-1), length=codec.num_codes)


@command("codec_yardsticks", memory_cure="lower --num-patches")
def main(arguments: Arguments) -> None:
    """Measures and writes the yardsticks."""
    folder = model_folder(arguments.model)
    codec = load_codec(folder)
    tokens_per_place = math.prod(codec.quantizer.axes)
    if tokens_per_place > 1:
        raise ValueError(
            f"--model {arguments.model} has {tokens_per_place} tokens per place; a patch VQ of as "
            "many codes is no yardstick of it"
        )
    bits_per_pixel = math.log2(codec.num_codes) / codec.stride**2
    perceptual = aps_jax.load_lpips()
    centres = patch_centres(arguments, codec)

    @jax.jit
    def score(a, b):
        distance = perceptual(jnp.clip(a, -1, 1), b)
        return {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b), "lpips": distance}

    rows, rates, used = [], [], np.zeros(codec.num_codes, int)
    paths = photos.spread(photos.list_images([arguments.eval_data]), arguments.count)
    for path in track(paths, "photos"):
        pixels = np.asarray(photos.load_rgb(path, arguments.short_side))
        height, width = (8 * (n // 8) for n in pixels.shape[:2])
        pixels = pixels[:height, :width]
        x = jnp.asarray(from_uint8(pixels))[None]
        candidates, counts = restored(codec, centres, x)
        used += np.asarray(counts)
        decoded, rate = jpeg(pixels, bits_per_pixel * height * width)
        rates.append(rate)
        candidates["JPEG"] = jnp.asarray(from_uint8(decoded))[None]
        for name, image in candidates.items():
            image = jnp.asarray(from_uint8(to_uint8(np.asarray(image))))
            scores = {metric: float(value[0]) for metric, value in score(image, x).items()}
            rows.append({"name": name} | scores)

    groups = pd.DataFrame(rows).groupby("name")
    scores = groups.mean().join(groups.std(ddof=0), rsuffix="_std").round(4)
    result = {
        "photos": len(paths),
        "short_side": arguments.short_side,
        "bits_per_pixel": bits_per_pixel,
        "jpeg_bits_per_pixel": round(float(np.mean(rates)), 4),
        "tokens": int(used.sum()),
        "codes_used": round(float(np.mean(used > 0)), 4),
        "codec_training": read_card(folder).get("codec_training"),
    } | scores.loc[["codec", "JPEG", "patch VQ"]].to_dict("index")
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))
