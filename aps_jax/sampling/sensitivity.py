"""How much a measurement can say about each token (ours): what the operator sees of its pixels.

Adam takes steps of one size however small the gradient is, so a token that no measured pixel
reaches would be driven by rounding and by what leaks through the decoder's normalisation layers.
The size of the gradient cannot tell such a token from one that is already explained; the operator
can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from aps_jax.codec.expectation import Grid
from aps_jax.codec.magvit2 import space_to_depth
from aps_jax.operators.residuals import residuals
from aps_jax.prior.windows import cover_field
from aps_jax.types import Array, ImageShape, Operator, PyTree, Scalar

#: Random images and random directions of y that `pixel_sensitivity` averages over.
NUM_PROBES = 16


def pixel_sensitivity(
    operator: Operator, y: PyTree, *, image_shape: ImageShape
) -> Float[Array, "B H W"]:
    """Sum of the squared derivatives of the measurement with respect to each pixel [B, H, W].

    The sum is over entries of the measurement and channels of the pixel. An estimate: gradients of
    sums of the measured entries with random signs, at uniformly random images, so that a pixel
    which saturates at some of them counts by the others. All images of a batch get the same images
    and signs, and the same at every call.

    Args:
      operator: random state drawn; per-image state must be that of the B images.
      y: measurement of B images, of which only the shapes are used; `operator.observed` says which
        entries are missing.
      image_shape: (H, W).
    """
    batch = jax.tree.leaves(y)[0].shape[0]

    def probe(key: Array) -> Array:
        key_image, key_signs = jax.random.split(key)
        x = jax.random.uniform(
            key_image, (1, *image_shape, 3), jnp.float32, minval=-1.0, maxval=1.0
        )

        def signed_sum(x: Array) -> Array:
            zeros = jax.tree.map(jnp.zeros_like, y)
            pairs = residuals(operator, operator(x), zeros)
            keys = jax.random.split(key_signs, len(pairs))
            signs = [
                2 * jax.random.bernoulli(k, jnp.float32(0.5), (1, *r.shape[1:])).astype(r.dtype) - 1
                for k, (r, _) in zip(keys, pairs, strict=True)
            ]
            products = (jnp.sum(r * w * s) for s, (r, w) in zip(signs, pairs, strict=True))
            return jnp.asarray(sum(products))

        with jax.default_matmul_precision("float32"):
            gradient = jax.grad(signed_sum)(jnp.broadcast_to(x, (batch, *image_shape, 3)))
        return jnp.sum(gradient**2, axis=-1)

    keys = jax.random.split(jax.random.key(0), NUM_PROBES)
    return jnp.mean(jax.lax.map(probe, keys), axis=0)


def token_sensitivity(
    sensitivity: Float[Array, "B H W"],
    is_unknown: Bool[Array, "B L"],
    *,
    grid: Grid,
    stride: int,
    decode_scale: int,
    floor: Scalar,
) -> Float[Array, "B L"]:
    """How much the measurement says about each token, in [0, 1] [B, L].

    s^2 / (s^2 + (floor * mean s)^2), where s^2 is the sensitivity summed over the token's own
    pixels and the mean is over the image's unknown tokens. Pixels past the image's edges have none.

    Args:
      sensitivity: of pixels [B, H, W].
      is_unknown: bool [B, L], False where a token is given.
      grid: sizes of the token grid, places first; tokens of one place share what is said of it.
      stride: decoded pixels per token along each axis.
      decode_scale: how many times larger than the image the codec decodes.
      floor: share of the mean s at which it is 1/2.
    """
    pixels = cover_field(
        sensitivity[..., None],
        grid=(grid[0], grid[1]),
        stride=stride,
        decode_scale=decode_scale,
        mode="constant",
    )
    strength = jnp.sum(space_to_depth(pixels, stride), axis=-1).reshape(pixels.shape[0], -1)
    strength = jnp.repeat(strength, is_unknown.shape[1] // strength.shape[1], axis=1)
    count = jnp.maximum(jnp.sum(is_unknown, axis=-1, dtype=jnp.float32), 1)
    mean = jnp.sum(jnp.where(is_unknown, jnp.sqrt(strength), 0.0), axis=-1) / count
    return strength / (strength + (floor * mean[:, None]) ** 2 + jnp.finfo(jnp.float32).tiny)
