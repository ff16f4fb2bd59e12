"""A first guess from the measurement alone: smooth pixels, and the codes the encoder has for them.

Ours, not in the paper. Adam moves every logit by about one nat per step, so from a prior that
excludes the right code it needs dozens of steps to come back. An image that already explains the
measurement says where to begin, and costs no run of the decoder.
"""

from __future__ import annotations

import jax
from jaxtyping import Float, Int

from aps_jax.codec import expectation
from aps_jax.codec.expectation import Grid
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.prior.windows import cover_field
from aps_jax.sampling import sensitivity
from aps_jax.sampling.leaves import is_absent
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.sampling.target import Measurement, Target
from aps_jax.types import Array, Codec, ImageShape, Scalar


def smooth_tokens(target: Target) -> Int[Array, "R L"]:
    """Tokens int32 [R, L] that the encoder has for the smooth estimate, the same for all samples.

    Raises:
      ValueError: the target has no measurement, or its codec no encoder.
    """
    measurement, image_shape = _measured(target, "encoder_start")
    with jax.named_scope("estimate"):
        x = smooth_estimate(
            measurement.operator, measurement.y, image_shape=image_shape, sigma=measurement.sigma
        )
        tokens = encoder_tokens(target.codec, x, grid=target.grid, decode_scale=target.decode_scale)
    return target.rows(tokens)


def encoder_tokens(
    codec: Codec, x: Float[Array, "B H W 3"], *, grid: Grid, decode_scale: int
) -> Int[Array, "B L"]:
    """Tokens int32 [B, L] of images [B, H, W, 3], for a field that may reach past their edges.

    Args:
      codec: the tokenizer.
      x: images in [-1, 1].
      grid: sizes of the token grid, places first.
      decode_scale: how many times larger than the image the codec decodes.
    """
    place = (grid[0], grid[1])
    x = cover_field(x, grid=place, stride=codec.stride, decode_scale=decode_scale, mode="edge")
    return encode_tokens(codec, x).reshape(x.shape[0], -1)


def estimate_if(target: Target, weight: Scalar) -> Int[Array, "R L"] | None:
    """`smooth_tokens`, or None where the weight of an encoder start says that there is none."""
    return None if is_absent(weight) else smooth_tokens(target)


def raised(
    target: Target, logits: Float[Array, "R L K"], estimate: Array | None, weight: Scalar
) -> Float[Array, "R L K"]:
    """Logits [R, L, K] plus `encoder_logits` of an estimate; as they are without one."""
    return logits if estimate is None else logits + encoder_logits(target, estimate, weight)


def encoder_logits(
    target: Target, tokens: Int[Array, "R L"], weight: Scalar
) -> Float[Array, "R L K"]:
    """Logits [R, L, K] that fall with the squared distance to the codes of tokens [R, L].

    `-weight / 2 * ||C_k - C_token||^2 / spread`: with the codes of LFQ, `-2 * weight` per differing
    bit. The spread (`expectation.spread`) lets a weight mean the same with any codebook.
    """
    distances = expectation.similarity(target.codec, tokens, target.grid)
    return weight / expectation.spread(target.codec) * distances


def token_sensitivity(target: Target, floor: Scalar) -> Float[Array, "R L"]:
    """How much the measurement says about each token, in [0, 1] [R, L], for all samples.

    Source: ours; `sampling.sensitivity` has the definition.

    Raises:
      ValueError: the target has no measurement.
    """
    measurement, image_shape = _measured(target, "sensitivity_floor")
    batch = target.tokens.shape[0] // target.num_samples
    with jax.named_scope("sensitivity"):
        found = sensitivity.token_sensitivity(
            sensitivity.pixel_sensitivity(
                measurement.operator, measurement.y, image_shape=image_shape
            ),
            target.is_unknown[:batch],
            grid=target.grid,
            stride=target.codec.stride,
            decode_scale=target.decode_scale,
            floor=floor,
        )
    return target.rows(found)


def _measured(target: Target, option: str) -> tuple[Measurement, ImageShape]:
    if target.measurement is None or target.image_shape is None:
        raise ValueError(f"{option} needs a measurement; set it to 0 for an energy without one")
    return target.measurement, target.image_shape
