"""What every sampler does around its own loop: sizes, keys, the prior call, the picture.

Rows are samples of measurements, sample-major: row s * B + b is sample s of measurement b.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aps_jax.prior.windows import field_shape, prior_logits
from aps_jax.sampling.likelihood import decode_image
from aps_jax.types import Array, ImageShape, Key, Params, Prior, PyTree, image_keys

#: Logits of codes that a prior excludes, in place of -inf, whose differences are NaN.
_LEAST_LOGIT = -1e4


def fit_shapes(
    params: Params, y: PyTree, *, image_shape: ImageShape | None, decode_scale: int
) -> tuple[ImageShape, tuple[int, int]]:
    """Image size and token grid behind a measurement.

    Args:
      params: models and operator.
      y: measurement of B images.
      image_shape: (H, W), or None to infer it from the operator.
      decode_scale: how many times larger than the image the codec decodes.

    Raises:
      ValueError: shapes of y, operator, codec and prior do not fit together.
    """
    y_shape = jax.tree.map(lambda leaf: leaf.shape, y)
    for leaf in jax.tree.leaves(y):
        if leaf.ndim < 2:
            raise ValueError(f"y has shape {y_shape}; its first axis must be the batch: y[None]")
    image_shape = image_shape or params.operator.image_shape(y_shape)
    batch = jax.tree.leaves(y)[0].shape[0]
    expected = params.operator.output_shape((batch, *image_shape, 3))
    if expected != y_shape:
        raise ValueError(
            f"y has shape {y_shape}; operator {params.operator.name!r} gives {expected} "
            f"for images of {image_shape}"
        )
    if params.prior.num_codes != params.codec.num_codes:
        raise ValueError(
            f"the prior has {params.prior.num_codes} codes, the codec {params.codec.num_codes}"
        )
    decoded = tuple(side * decode_scale for side in image_shape)
    return image_shape, field_shape(decoded, params.codec.stride)


def require_perceptual(params: Params, *, measurement_term: str, perceptual_weight: float) -> None:
    """ValueError if the measurement term needs a perceptual distance that `params` has not."""
    needs_lpips = measurement_term == "l1" and perceptual_weight > 0
    if needs_lpips and params.operator.is_image and params.perceptual is None:
        raise ValueError(
            "perceptual_weight needs Params.perceptual; load it with aps_jax.load_lpips() "
            "or set perceptual_weight=0"
        )


def start_tokens(
    known_tokens: Array | None, batch: int, num_tokens: int, *, num_codes: int, num_samples: int
) -> Array:
    """Int32 [S * B, L]: the known tokens [B, L], or K everywhere, repeated for each sample.

    Raises:
      ValueError: known tokens of another shape.
    """
    if known_tokens is None:
        known_tokens = jnp.full((batch, num_tokens), num_codes, jnp.int32)
    elif known_tokens.shape != (batch, num_tokens):
        raise ValueError(
            f"known_tokens has shape {known_tokens.shape}; this field needs {(batch, num_tokens)}"
        )
    return jnp.tile(known_tokens.astype(jnp.int32), (num_samples, 1))


def repeat_samples(y: PyTree, num_samples: int) -> PyTree:
    """The measurement [B, ...] once per sample, [S * B, ...]."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * num_samples), y)


def row_keys(key: Key, rows: int, num_samples: int) -> Key:
    """One key per row [S * B] from one key, or one per image [B]."""
    keys = image_keys(key, rows // num_samples)
    per_sample = jax.vmap(lambda sample: jax.vmap(lambda k: jax.random.fold_in(k, sample))(keys))(
        jnp.arange(num_samples, dtype=jnp.int32)
    )
    return per_sample.reshape(rows)


def guided_logits(
    prior: Prior,
    tokens: Array,
    grid: tuple[int, int],
    *,
    guidance_scale: float,
    prior_temperature: float,
) -> Array:
    """Logits [B, L, K] of the prior for tokens [B, L], guided, tempered, without gradient.

    Args:
      prior: masked transformer.
      tokens: int [B, L] in [0, K], K for the mask.
      grid: (h, w) with h * w = L.
      guidance_scale: g of (1 + g) cond - g uncond; 0 saves the second call.
      prior_temperature: divides the logits.
    """

    def bounded(**options: bool) -> Array:
        logits = prior_logits(prior, tokens.reshape(-1, *grid), **options)
        return jnp.maximum(logits.reshape(*tokens.shape, -1).astype(jnp.float32), _LEAST_LOGIT)

    logits = bounded()
    if guidance_scale != 0:
        plain = bounded(is_unconditional=True)
        logits = (1 + guidance_scale) * logits - guidance_scale * plain
    return jax.lax.stop_gradient(logits / prior_temperature)


def render(
    params: Params,
    tokens: Array,
    grid: tuple[int, int],
    image_shape: ImageShape,
    decode_scale: int,
) -> Array:
    """Images [B, H, W, 3] in [-1, 1] of clean tokens [B, L]."""
    codes = params.codec.codebook[tokens].reshape(tokens.shape[0], *grid, -1)
    return jnp.clip(decode_image(params.codec, codes, image_shape, decode_scale), -1, 1)
