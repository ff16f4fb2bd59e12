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
from aps_jax.types import Array, Key, Perceptual, PyTree, Quantizer

#: Codebooks whose codes are made of signs.
SIGNS = ("lfq", "grouped")


def flip_bits(key: Key, codes: Array, share: float) -> Array:
    """Codes [..., d] with every bit flipped with probability `share`."""
    return jnp.where(jax.random.bernoulli(key, share, codes.shape), -codes, codes)


def noisy_codes(key: Key, codes: Array, amount: float) -> Array:
    """Codes [..., d] with Gaussian noise, in units of the standard deviation of each number."""
    width = jnp.std(codes, axis=tuple(range(codes.ndim - 1)))
    return codes + amount * width * jax.random.normal(key, codes.shape)


def codec_loss(
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
    quantizer: Quantizer,
    x: Array,
    key: Key,
    config: Any,
    perceptual: Perceptual | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the reconstruction plus the quantiser's terms, and LPIPS if given.

    With a codebook of signs the reconstruction is that of codes with some bits flipped, by
    `config.bit_flips`, with others that of codes with noise, by `config.code_noise`.
    """
    features = encode(x)
    codes = quantizer.lookup(quantizer.nearest(jax.lax.stop_gradient(features)))
    shown = codes
    if config.codec.quantizer in SIGNS:
        shown = flip_bits(key, codes, config.bit_flips)
    elif config.code_noise:
        shown = noisy_codes(key, codes, config.code_noise)
    restored = decode(straight_through(features, shown))
    mse = jnp.mean((restored - x) ** 2)
    own, terms = quantizer_terms(features, codes, config)
    loss, terms = mse + own, {"mse": mse} | terms
    if perceptual is not None:
        seen = slice(config.perceptual_images or None)
        terms["lpips"] = jnp.mean(perceptual(restored[seen], x[seen]))
        loss += config.perceptual * terms["lpips"]
    return loss, {"loss": loss} | terms


def quantizer_terms(features: Array, codes: Array, config: Any) -> tuple[Array, dict[str, Array]]:
    """What a codebook adds to the loss, and the terms that are logged.

    LFQ has a commitment and the missing entropy of its codes (of each group's, and their mean). VQ
    has the commitment and the squared error of the table's rows, the two last terms of
    arXiv:1711.00937, Eq. 3. FSQ has nothing to learn and nothing to add (arXiv:2309.15505).
    """
    quantizer = config.codec.quantizer
    if quantizer == "fsq":
        return jnp.zeros(()), {}
    commitment = jnp.mean((features - jax.lax.stop_gradient(codes)) ** 2)
    loss, terms = config.commitment * commitment, {"commitment": commitment}
    if quantizer == "vq":
        return loss + jnp.mean((jax.lax.stop_gradient(features) - codes) ** 2), terms
    codebook = lfq.codebook(features.shape[-1])
    groups = [features] if quantizer == "lfq" else jnp.unstack(features, axis=-2)
    missing = [missing_entropy(group, codebook, config.entropy_tokens) for group in groups]
    mean = sum(missing[1:], missing[0]) / len(missing)
    return loss + config.entropy * mean, terms | {"missing_entropy": mean}


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
    found = {"psnr": metrics.psnr(restored, x)}
    if config.quantizer in SIGNS:
        flipped = codec.decode(params, flip_bits(jax.random.key(0), codes, 0.03))
        found["flipped"] = metrics.psnr(flipped, x)
    if perceptual is not None:
        found["lpips"] = perceptual(jnp.clip(restored, -1, 1), x)
    return found | {"tokens": tokens}


def evaluate(
    params: PyTree, images: np.ndarray, config: CodecConfig, perceptual: Perceptual | None = None
) -> dict[str, float]:
    """Mean PSNR over `images` (clipped, per image), LPIPS if given, and codes in use.

    "eval_psnr_flipped" is the PSNR after 3 % of all bits were flipped, where codes are made of
    bits: how smooth they are. Codes in use are of whole places where a place has several tokens.
    """
    parts = [
        jax.device_get(_scores(params, images[i : i + 8], perceptual, config=config))
        for i in range(0, len(images), 8)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    means = {
        name: float(found[key].mean())
        for name, key in (("eval_lpips", "lpips"), ("eval_psnr_flipped", "flipped"))
        if key in found
    }
    return means | {
        "eval_psnr": float(found["psnr"].mean()),
        "eval_psnr_std": float(found["psnr"].std()),
        "eval_photos": len(images),
        "eval_codes_used": codes_used(found["tokens"]),
    }


def codes_used(tokens: np.ndarray) -> int:
    """Different codes of places in tokens [B, h, w] or [B, h, w, tokens per place]."""
    places = tokens.reshape(*tokens.shape[:3], -1)
    return len(np.unique(places.reshape(-1, places.shape[-1]), axis=0))
