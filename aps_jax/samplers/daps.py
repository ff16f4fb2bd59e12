"""DAPS (arXiv:2407.01521): denoise by an ODE, move to the measurement by Langevin, noise less.

x <- noise of std first_sigma
for sigma = first_sigma..last_sigma:
  m <- probability-flow ODE of the denoiser from (x, sigma) to almost no noise
  x_0 <- Langevin steps from m on energy(x_0) + ||x_0 - m||^2 / (2 sigma^2)
  x <- x_0 + (next sigma) * noise; no noise at the end
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.samplers.continuous import DenoiserConfig, Pixels
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.pixels import PixelTarget, pixel_info
from aps_jax.sampling.run import StepInfo
from aps_jax.sampling.target import fold, split
from aps_jax.types import Array, Key, Scalar

#: The exponent of EDM's levels of noise (arXiv:2206.00364).
_RHO = 7


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DAPSConfig(DenoiserConfig):
    """Its Algorithm 1 with Langevin steps; for any differentiable operator.

    The defaults are those of the released code for super-resolution of 256 x 256 pixels. That code
    takes the noise of the measurement to be 0.01 (`tau`) in the Langevin steps, whatever it is;
    here it is `sigma`, as for all samplers. The measurement is felt where
    `learning_rate` / sigma^2 is not much less than 1, and the steps diverge where it is above 2 for
    an operator of norm 1.

    It does not draw from the posterior, even with a perfect denoiser: as the noise of the levels
    falls to none, its law tends to likelihood x sqrt(prior), because the ODE moves images by half
    of what the score asks for, while noise is added twice per level. One step to almost no noise
    (`num_ode_steps=1`), which is the denoiser's mean, gives likelihood x prior in that limit. At
    `last_sigma` the law is wider than that by about the variance of its noise. All three are proven
    on a Gaussian prior, where the law is known in closed form.

    Attributes:
      num_ode_steps: Euler steps of the ODE per level of noise. One step to an `ode_sigma` of
        almost 0 is the denoiser's mean.
      num_inner_steps: Langevin steps per level of noise.
      learning_rate: of the Langevin steps at the first level of noise.
      last_learning_rate: what it falls to, linearly, as a share of `learning_rate`.
      momentum: share of its last move that a Langevin step repeats; moves start at random. The
        released code calls steps with momentum Hamiltonian.
      first_sigma: the largest level of noise.
      last_sigma: what the levels fall to.
      ode_sigma: the level where the ODE ends.
    """

    NAME: ClassVar = "daps"
    SUMMARY: ClassVar = "DAPS: an ODE on pixels and Langevin steps at every level of noise"
    PAPER: ClassVar = "arXiv:2407.01521"
    SOURCES: ClassVar = {
        "its code, super-resolution": (
            "num_steps", "num_ode_steps", "num_inner_steps", "learning_rate", "last_learning_rate",
            "momentum", "first_sigma", "last_sigma", "ode_sigma",
        ),
    }  # fmt: skip

    num_steps: int = 200
    num_ode_steps: int = 5
    num_inner_steps: int = 100
    learning_rate: float = 1e-4
    last_learning_rate: float = 0.01
    momentum: float = 0.0
    first_sigma: float = 100.0
    last_sigma: float = 0.1
    ode_sigma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_ode_steps": 1, "num_inner_steps": 1},
            positive=("learning_rate", "first_sigma", "last_sigma", "ode_sigma"),
            shares=("last_learning_rate", "momentum"),
            falling=("first_sigma", "last_sigma", "ode_sigma"),
        )

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """Noise of the first level."""
        noise = target.noise(fold(keys, self.num_steps))
        return Pixels(self.first_sigma * noise, jnp.zeros((), jnp.int32))

    def step(self, target: PixelTarget, state: Pixels, keys: Key) -> tuple[Pixels, StepInfo]:
        """One level of noise."""
        i = state.step
        sigma, sigma_next = (
            jnp.asarray(edm_level(self.first_sigma, self.last_sigma, step / self.num_steps))
            for step in (i.astype(jnp.float32), (i + 1).astype(jnp.float32))
        )
        sigma_next = jnp.where(i == self.num_steps - 1, 0.0, sigma_next)
        keys_langevin, keys_noise = split(fold(keys, i), 2)
        mean = self.flow(target, state.x, sigma)
        clean, losses = self.langevin(target, mean, sigma, i, keys_langevin)
        x = clean + sigma_next * target.noise(keys_noise)
        info = pixel_info(self, target, clean, losses=losses, num_inner_steps=self.num_inner_steps)
        return Pixels(x, i + 1), info

    def flow(self, target: PixelTarget, x: Array, sigma: Array) -> Array:
        """Where the probability-flow ODE takes images of noise `sigma`: almost clean ones."""

        def euler(j: Array, x: Array) -> Array:
            level, after = (
                edm_level(sigma, self.ode_sigma, step.astype(jnp.float32) / self.num_ode_steps)
                for step in (j, j + 1)
            )
            return x + (after - level) / level * (x - target.denoise(x, level))

        return jax.lax.fori_loop(0, self.num_ode_steps, euler, x)

    def langevin(
        self, target: PixelTarget, mean: Array, sigma: Array, i: Array, keys: Key
    ) -> tuple[Array, Array]:
        """Images after the Langevin steps, and the energy before each of them [M, R]."""
        progress = i.astype(jnp.float32) / self.num_steps
        rate = self.learning_rate * (1 + progress * (self.last_learning_rate - 1))

        def total(x: Array) -> tuple[Array, Array]:
            losses = target.energy_of(x)
            return jnp.sum(losses), losses

        def move(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], Array]:
            x, velocity = carry
            gradient, losses = jax.grad(total, has_aux=True)(x)
            drift = gradient + (x - mean) / sigma**2
            fresh = jnp.sqrt(2.0 - 2.0 * self.momentum) * target.noise(fold(keys, j))
            velocity = self.momentum * velocity - jnp.sqrt(rate) * drift + fresh
            return (x + jnp.sqrt(rate) * velocity, velocity), losses

        start = (mean, target.noise(fold(keys, self.num_inner_steps)))
        steps = jnp.arange(self.num_inner_steps, dtype=jnp.int32)
        (x, _), losses = jax.lax.scan(move, start, steps)
        return x, losses

    def evaluations(self) -> Evaluations:
        """Calls per sample."""
        return Evaluations(
            denoiser=self.num_steps * self.num_ode_steps,
            decoder=0,
            decoder_gradient=self.num_steps * self.num_inner_steps,
        )


def edm_level(first: Scalar, last: Scalar, progress: Scalar) -> Scalar:
    """EDM's level of noise between two, at a progress in [0, 1]."""
    start, end = first ** (1 / _RHO), last ** (1 / _RHO)
    return (start + progress * (end - start)) ** _RHO
