"""The inner loop of every gradient method: a few steps of an optimiser on test-time logits phi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, PyTree


class Refined(NamedTuple):
    """What the inner loop returns.

    Attributes:
      phi: refined logits [R, L, K].
      loss: objective [R] at the last inner step, before its update; the least one with `keep_best`;
        NaN without inner steps.
      losses: objective at every inner step [M, R].
    """

    phi: Float[Array, "R L K"]
    loss: Float[Array, " R"]
    losses: Float[Array, "M R"]


def _add(phi: Array, updates: Array, j: Array) -> Array:
    return phi + updates


def descend(
    losses_of: Callable[[Array, Array], Array],
    phi: Float[Array, "R L K"],
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    move: Callable[[Array, Array, Array], Array] = _add,
    keep_best: bool = False,
) -> Refined:
    """Runs `num_steps` of an optimiser on phi; rows never influence each other.

    Args:
      losses_of: `(phi, j) -> [R]`, the objective per row at inner step j.
      phi: where to start [R, L, K].
      optimizer: starts afresh; may be one that strict promotion of dtypes would refuse.
      num_steps: M.
      move: `(phi, updates, j) -> phi`, what an update does; a sum by default.
      keep_best: end with the phi of the least objective that the second half of the steps has
        evaluated, in place of the last (ours). A single step has no choice.
    """
    rows = phi.shape[0]
    optimizer = lenient(optimizer)
    if num_steps == 0:
        return Refined(phi, jnp.full(rows, jnp.nan, jnp.float32), jnp.zeros((0, rows), jnp.float32))

    def total(phi: Array, j: Array) -> tuple[Array, Array]:
        losses = losses_of(phi, j)
        return jnp.sum(losses), losses

    def step(j: Array, carry: tuple[Array, PyTree, Any, Array]) -> tuple[Array, PyTree, Any, Array]:
        phi, opt_state, best, history = carry
        grads, losses = jax.grad(total, has_aux=True)(phi, j)
        if best is not None:
            # Adam's first steps may lead uphill, and the start would stay the best for ever.
            is_better = (losses < best[1]) & (j >= num_steps // 2)
            least = jnp.where(is_better, losses, best[1])
            # NaN stays, since nothing is less: a failed step shows in the result's loss.
            least = jnp.where(jnp.isfinite(losses), least, jnp.nan)
            best = (jnp.where(is_better[:, None, None], phi, best[0]), least)
        with jax.named_scope("adam"):
            updates, opt_state = optimizer.update(grads, opt_state)
            phi = move(phi, cast(Array, updates), j)
        return phi, opt_state, best, history.at[j].set(losses)

    has_choice = keep_best and num_steps > 1
    best = (phi, jnp.full(rows, jnp.inf, jnp.float32)) if has_choice else None
    history = jnp.full((num_steps, rows), jnp.nan, jnp.float32)
    start = (phi, optimizer.init(phi), best, history)
    phi, _, best, history = jax.lax.fori_loop(0, num_steps, step, start)
    if best is None:
        return Refined(phi, history[-1], history)
    return Refined(best[0], best[1], history)
