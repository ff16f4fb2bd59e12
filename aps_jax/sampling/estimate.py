"""A first guess from the measurement alone: smooth pixels, and the codes the encoder has for them.

Ours, not in the paper. Adam moves every logit by about one nat per step, so from a prior that
excludes the right code it needs dozens of steps to come back. An image that already explains the
measurement says where to begin, and costs no run of the decoder.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.prior.windows import cover_field
from aps_jax.sampling.likelihood import gaussian_energy
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Codec, ImageShape, Operator, Params, PyTree

#: Standard deviation of the difference of neighbouring pixels, for values in [-1, 1].
SMOOTHNESS = 0.15

#: Runs of the operator with gradient; `encoder_tokens` adds one run of the encoder.
NUM_STEPS = 100


def smooth_estimate(
    operator: Operator, y: PyTree, *, image_shape: ImageShape, sigma: float
) -> Array:
    """Images [B, H, W, 3] in [-1, 1] that explain y and have small differences between neighbours.

    Minimises ||A(x) - y||^2 / (2 sigma^2) + sum (difference of neighbours)^2 / (2 SMOOTHNESS^2) by
    `NUM_STEPS` steps of Adam from grey, so the minimum is approximate. Pixels that are not measured
    are filled in smoothly. Any differentiable operator will do, but one whose gradient vanishes at
    grey learns nothing.

    Args:
      operator: random state drawn; per-image state must be that of the B images.
      y: measurement of B images.
      image_shape: (H, W).
      sigma: std of the noise, positive.
    """
    batch = jax.tree.leaves(y)[0].shape[0]
    optimizer = lenient(optax.adam(optax.cosine_decay_schedule(0.1, NUM_STEPS)))

    def energy(x: Array) -> Array:
        misfit = jnp.sum(gaussian_energy(operator, operator(x), y, sigma))
        roughness = sum(jnp.sum(jnp.square(jnp.diff(x, axis=axis))) for axis in (1, 2))
        return misfit + roughness / (2 * SMOOTHNESS**2)

    def step(_: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        x, state = carry
        updates, state = optimizer.update(jax.grad(energy)(x), state)
        return x + updates, state

    start = jnp.zeros((batch, *image_shape, 3), jnp.float32)
    with jax.default_matmul_precision("float32"):
        x, _ = jax.lax.fori_loop(0, NUM_STEPS, step, (start, optimizer.init(start)))
    return jnp.clip(x, -1, 1)


def estimated_tokens(
    params: Params,
    y: PyTree,
    config: Any,
    *,
    image_shape: ImageShape,
    grid: tuple[int, int],
) -> Array:
    """Tokens int32 [S * B, L] of the smooth estimate of B measurements, the same for all samples.

    Args:
      params: codec and operator.
      y: measurement of B images.
      config: any sampler's, for `sigma`, `decode_scale` and S, its `num_samples`.
      image_shape: (H, W).
      grid: (h, w) with h * w = L.
    """
    with jax.named_scope("estimate"):
        x = smooth_estimate(params.operator, y, image_shape=image_shape, sigma=config.sigma)
        tokens = encoder_tokens(params.codec, x, grid=grid, decode_scale=config.decode_scale)
    return jnp.tile(tokens, (config.num_samples, 1))


def encoder_tokens(codec: Codec, x: Array, *, grid: tuple[int, int], decode_scale: int) -> Array:
    """Tokens int32 [B, L] of images [B, H, W, 3], for a field that may reach past their edges.

    Args:
      codec: the tokenizer.
      x: images in [-1, 1].
      grid: (h, w) of the field.
      decode_scale: how many times larger than the image the codec decodes.
    """
    x = cover_field(x, grid=grid, stride=codec.stride, decode_scale=decode_scale, mode="edge")
    return encode_tokens(codec, x).reshape(x.shape[0], -1)


def encoder_logits(codec: Codec, tokens: Array, weight: float) -> Array:
    """Logits [B, L, K] that fall with the squared distance to the codes of tokens [B, L].

    `-weight / 2 * ||C_k - C_token||^2`: with the codes of LFQ, `-2 * weight` per differing bit.
    """
    squares = jnp.sum(codec.codebook**2, axis=-1)
    inner = codec.codebook[tokens] @ codec.codebook.T
    return weight * (inner - (squares + squares[tokens][..., None]) / 2)
