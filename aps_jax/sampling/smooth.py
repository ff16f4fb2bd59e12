"""What a measurement says by itself: the smoothest image that explains it, or the smoothest change.

Ours, not in the paper. From grey it is a first guess, without any model (`sampling.starts`). Around
an image that a model has made it is a step of data consistency: a codec of few bits cannot show all
that was measured, and what it leaves unexplained comes back here.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from aps_jax.operators.residuals import squared_error
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, ImageShape, Operator, PyTree, Scalar

#: Standard deviation of the difference of neighbouring pixels, for values in [-1, 1].
SMOOTHNESS = 0.15

#: Runs of the operator with gradient.
NUM_STEPS = 100


def smooth_estimate(
    operator: Operator,
    y: PyTree,
    *,
    image_shape: ImageShape,
    sigma: Scalar,
    around: Float[Array, "B H W C"] | None = None,
    smoothness: Scalar = SMOOTHNESS,
) -> Float[Array, "B H W C"]:
    """Images [B, H, W, C] in [-1, 1] that explain y and differ smoothly from given ones.

    They are x = around + r, where r minimises ||A(x) - y||^2 / (2 sigma^2) +
    sum (difference of neighbours in r)^2 / (2 smoothness^2), by `NUM_STEPS` steps of Adam from
    r = 0, so the minimum is approximate. Where nothing is measured, r is filled in smoothly. Any
    differentiable operator will do, but one whose gradient vanishes at `around` learns nothing. An
    image of `around` whose energy the steps do not lower stays as it is.

    Args:
      operator: random state drawn; per-image state must be that of the B images.
      y: measurement of B images.
      image_shape: (H, W).
      sigma: std of the noise, positive.
      around: the images that r is added to, such as samples; grey with three channels if left out.
      smoothness: std of the difference of neighbouring pixels of r, positive.
    """
    batch = jax.tree.leaves(y)[0].shape[0]
    optimizer = lenient(optax.adam(optax.cosine_decay_schedule(0.1, NUM_STEPS)))
    given = jnp.zeros((batch, *image_shape, 3), jnp.float32) if around is None else around
    start = jnp.zeros_like(given)

    def energies(r: Array) -> Array:
        misfit = squared_error(operator, operator(given + r), y) / (2 * sigma**2)
        rough = [jnp.sum(jnp.square(jnp.diff(r, axis=axis)), axis=(1, 2, 3)) for axis in (1, 2)]
        return misfit + (rough[0] + rough[1]) / (2 * smoothness**2)

    gradient = jax.grad(lambda r: jnp.sum(energies(r)))

    def step(_: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        r, state = carry
        updates, state = optimizer.update(gradient(r), state)
        return r + cast(Array, updates), state

    with jax.default_matmul_precision("float32"):
        r, _ = jax.lax.fori_loop(0, NUM_STEPS, step, (start, optimizer.init(start)))
        if around is not None:  # Steps that lead astray are not taken.
            is_better = energies(r) <= energies(start)
            r = jnp.where(is_better[:, None, None, None], r, start)
    return jnp.clip(given + r, -1, 1)
