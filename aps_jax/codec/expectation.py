"""Codes of token distributions, and the pictures of codes; for any `Quantizer`.

Tokens [R, L], logits [R, L, K] and codes [R, L, d] are flat here, the codec's own functions see the
grid.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from aps_jax.codec.config import every_code
from aps_jax.types import Array, Codec, ImageShape

Grid = tuple[int, ...]


def straight_through(
    features: Float[Array, "*shape"], codes: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Value of `codes`, gradient of `features`."""
    return features + jax.lax.stop_gradient(codes - features)


def lookup(codec: Codec, tokens: Int[Array, "R L"], grid: Grid) -> Float[Array, "R L d"]:
    """Codes [R, L, d] of clean tokens [R, L]."""
    codes = codec.quantizer.lookup(tokens.reshape(-1, *grid))
    return codes.reshape(*tokens.shape, -1)


def expected_code(codec: Codec, logits: Float[Array, "R L K"], grid: Grid) -> Float[Array, "R L d"]:
    """Mean codes sum_k softmax(phi)_k C_k [R, L, d] of logits phi [R, L, K]."""
    codes = codec.quantizer.expect(logits.reshape(-1, *grid, logits.shape[-1]))
    return codes.reshape(*logits.shape[:2], -1)


def nearest(codec: Codec, features: Float[Array, "R L d"], grid: Grid) -> Int[Array, "R L"]:
    """Tokens int32 [R, L] whose codes are nearest to features [R, L, d]."""
    tokens = codec.quantizer.nearest(features.reshape(-1, *grid, features.shape[-1]))
    return tokens.reshape(features.shape[:2])


def similarity(codec: Codec, tokens: Int[Array, "R L"], grid: Grid) -> Float[Array, "R L K"]:
    """Minus half the squared distance of all codes to those of tokens [R, L], [R, L, K]."""
    values = codec.quantizer.similarity(tokens.reshape(-1, *grid))
    return values.reshape(*tokens.shape, -1)


def spread(codec: Codec) -> Float[Array, ""]:
    """Summed variance of the numbers of a code per bit of it, over all codes alike.

    That of LFQ is 1; n tokens of a place count together.
    """
    quantizer = codec.quantizer
    bits = math.prod(quantizer.axes) * math.log2(quantizer.num_codes)
    return jnp.sum(jnp.var(every_code(quantizer), axis=0)) / bits


def quantized_expectation(
    codec: Codec, logits: Float[Array, "R L K"], grid: Grid
) -> tuple[Float[Array, "R L d"], Int[Array, "R L"]]:
    """The nearest code to the mean code, with the gradient of the mean code (ours: no noise).

    Args:
      codec: gives the codebook.
      logits: phi [R, L, K].
      grid: sizes of the token grid, of product L.

    Returns:
      Codes [R, L, d], whose value is a code of the codebook, and their tokens int32 [R, L].
    """
    mean = expected_code(codec, logits, grid)
    tokens = nearest(codec, jax.lax.stop_gradient(mean), grid)
    return straight_through(mean, lookup(codec, tokens, grid)), tokens


def decode(
    codec: Codec,
    codes: Float[Array, "R L d"],
    grid: Grid,
    image_shape: ImageShape | None,
    decode_scale: int = 1,
) -> Float[Array, "R ..."]:
    """Decodes a token field and brings it to `image_shape`.

    Args:
      codec: the tokenizer.
      codes: any vectors [R, L, d].
      grid: sizes of the token grid, which may reach past the image at the right and at the bottom.
      image_shape: (H, W) of the result; None where what is decoded is no image, and stays as it is.
      decode_scale: 1, or n to decode n times larger and average n x n pixels ("aps-l" uses 2).

    Returns:
      Images [R, H, W, 3], not clipped.
    """
    x = codec.decode(codec.params, codes.reshape(-1, *grid, codes.shape[-1]))
    if image_shape is None:
        return x
    height, width = (side * decode_scale for side in image_shape)
    x = x[:, :height, :width]
    if decode_scale == 1:
        return x
    rows, _, _, channels = x.shape
    x = x.reshape(rows, image_shape[0], decode_scale, image_shape[1], decode_scale, channels)
    return x.mean(axis=(2, 4))
