"""The loss of a codec, and what a codec is worth on held-out photos."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import metrics
from aps_jax.codec import lfq
from aps_jax.codec.expectation import straight_through
from aps_jax.codec.magvit2 import CodecConfig, make_codec
from aps_jax.types import Array, Key, Perceptual, PyTree


def flip_bits(key: Key, codes: Array, share: float) -> Array:
    """Codes [..., d] with every bit flipped with probability `share`."""
    return jnp.where(jax.random.bernoulli(key, share, codes.shape), -codes, codes)


def codec_loss(
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
    x: Array,
    key: Key,
    config: Any,
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


@functools.partial(jax.jit, static_argnames="config")
def _scores(
    params: PyTree, x: Array, perceptual: Perceptual | None, *, config: CodecConfig
) -> dict[str, Array]:
    codec = make_codec(config, params)
    tokens = codec.quantizer.nearest(codec.encode(params, x))
    codes = codec.quantizer.lookup(tokens)
    restored = codec.decode(params, codes)
    flipped = codec.decode(params, flip_bits(jax.random.key(0), codes, 0.03))
    found = {"psnr": metrics.psnr(restored, x), "flipped": metrics.psnr(flipped, x)}
    if perceptual is not None:
        found["lpips"] = perceptual(jnp.clip(restored, -1, 1), x)
    return found | {"tokens": tokens}


def evaluate(
    params: PyTree, images: np.ndarray, config: CodecConfig, perceptual: Perceptual | None = None
) -> dict[str, float]:
    """Mean PSNR over `images` (clipped, per image), LPIPS if given, and codes in use.

    "eval_psnr_flipped" is the PSNR after 3 % of all bits were flipped: how smooth the codes are.
    """
    parts = [
        jax.device_get(_scores(params, images[i : i + 8], perceptual, config=config))
        for i in range(0, len(images), 8)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lpips = {"eval_lpips": float(found["lpips"].mean())} if perceptual else {}
    return lpips | {
        "eval_psnr": float(found["psnr"].mean()),
        "eval_psnr_std": float(found["psnr"].std()),
        "eval_psnr_flipped": float(found["flipped"].mean()),
        "eval_photos": len(images),
        "eval_codes_used": len(np.unique(found["tokens"])),
    }
