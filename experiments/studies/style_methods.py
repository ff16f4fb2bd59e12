"""The ways to paint that are compared: who moves what, from where and how fast."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax.cli import wishes
from aps_jax.samplers import sample_target
from aps_jax.sampling.inner_loop import descend
from aps_jax.sampling.target import Target
from aps_jax.types import Array, Key

#: Strengths of the style, the middle one being the default of `aps-jax stylize`.
STRENGTHS = (0.2, 1.0, 5.0)


class Method(NamedTuple):
    """Whether codes or pixels move, with the prior or without, and the rates to choose from."""

    moves: str
    has_prior: bool
    rates: tuple[float, ...]


#: The first is what `aps-jax stylize` does; the second is the same optimisation of codes under a
#: prior without an opinion. Both have the command's rate, that of pixels is chosen.
METHODS = {
    "prior × style (APS)": Method("codes", True, (2.0,)),
    "codes, no prior (APS)": Method("codes", False, (2.0,)),
    "pixels (Gatys)": Method("pixels", False, (0.02, 0.05, 0.1)),
}


def config_of(num_steps: int | None = None, num_inner_steps: int | None = None) -> Any:
    """Options of APS as `aps-jax stylize` has them, or of another length."""
    return wishes.config_of(
        wishes.Stylize(
            image=Path("photo.png"), style="swirls", num_steps=num_steps,
            num_inner_steps=num_inner_steps,
        )
    )  # fmt: skip


@jax.jit
def painted(target: Target, keys: Key, *, config: Any) -> Array:
    """Samples [B, H, W, 3]."""
    return sample_target(target, keys, config=config).images


@functools.partial(jax.jit, static_argnames="num_gradients")
def descended(target: Target, x: Array, rate: Array, *, num_gradients: int) -> Array:
    """Images [B, H, W, 3] by Adam on the pixels of x, at a rate that falls along a cosine.

    Source: Gatys, Ecker and Bethge, arXiv:1508.06576, who start from noise and have L-BFGS; with
    few gradients the photo itself is the better start.
    """

    def energy(pixels: Array, _: Array) -> Array:
        return target.energy(jnp.clip(pixels.reshape(x.shape), -1, 1))

    adam = optax.adam(optax.cosine_decay_schedule(1.0, num_gradients))
    flat = x.reshape(len(x), -1, x.shape[-1])
    found = descend(
        energy, flat, adam, num_gradients, move=lambda pixels, updates, _: pixels + rate * updates
    )
    return jnp.clip(found.phi.reshape(x.shape), -1, 1)
