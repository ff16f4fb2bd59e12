"""DiffPIR (arXiv:2305.08995): denoise, solve for the measurement nearby, noise less.

x <- noise
for t = T..1:
  x_0 <- denoiser(x)
  x_0 <- argmin energy(x) + regularization / (2 sigma_t^2) ||x - x_0||^2
  n <- the noise that x_0 leaves in x
  x <- x_0 with less noise, of which a share zeta is fresh and the rest is n
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.samplers.continuous import DenoiserConfig, Pixels, ddpm_levels, levels_at
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.pixels import PixelTarget, pixel_info
from aps_jax.sampling.run import StepInfo
from aps_jax.sampling.target import fold
from aps_jax.types import Array, Key

#: Of conjugate gradients, as a share of the first one.
_LEAST_RESIDUAL = 1e-6


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPIRConfig(DenoiserConfig):
    """Its Algorithm 1, for linear operators; biased, as plug-and-play methods are.

    The proximal problem of a linear operator is quadratic. The paper solves it in closed form where
    it can; here conjugate gradients solve it for every linear operator, which takes as many
    steps as there are different singular values: two for masks. The defaults are those of the
    released code for deblurring of faces, which has other weights for other tasks.

    Attributes:
      num_inner_steps: conjugate-gradient steps per level of noise.
      regularization: lambda of the paper, the weight of the denoised image. The released code has
        1.0 for noise of images in [0, 1] over levels of images in [-1, 1], which is 0.25 here.
      zeta: share of the noise that is fresh at every step.
      clip_denoised: clip the denoised image to [-1, 1].
    """

    NAME: ClassVar = "diffpir"
    SUMMARY: ClassVar = "DiffPIR: diffusion on pixels with a proximal step on linear measurements"
    PAPER: ClassVar = "arXiv:2305.08995"
    SOURCES: ClassVar = {
        "its code, deblurring of faces": ("num_steps", "regularization", "zeta", "clip_denoised"),
        "ours": ("num_inner_steps",),
    }

    num_steps: int = 100
    num_inner_steps: int = 10
    regularization: float = 0.25
    zeta: float = 0.1
    clip_denoised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_inner_steps": 1},
            positive=("regularization",),
            shares=("zeta",),
        )

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """Noise, in DDPM's scaling; ValueError unless the operator is linear."""
        if target.measurement is None or not target.measurement.operator.is_linear:
            what = "a reward" if target.measurement is None else target.measurement.operator.name
            raise ValueError(
                f"sampler 'diffpir' needs a measurement by a linear operator, and {what} is none; "
                "'dps' and 'daps' take any"
            )
        return Pixels(target.noise(fold(keys, self.num_steps)), jnp.zeros((), jnp.int32))

    def step(self, target: PixelTarget, state: Pixels, keys: Key) -> tuple[Pixels, StepInfo]:
        """One level of noise."""
        levels = ddpm_levels(self.num_steps, is_quadratic=True)
        kept, kept_next = levels_at(levels, state.step)
        sigma = jnp.sqrt((1 - kept) / kept)
        clean = target.denoise(state.x / jnp.sqrt(kept), sigma)
        clean = jnp.clip(clean, -1, 1) if self.clip_denoised else clean
        clean, losses = self.fit(target, clean, self.regularization / sigma**2)
        left = (state.x - jnp.sqrt(kept) * clean) / jnp.sqrt(1 - kept)
        noise = target.noise(fold(keys, state.step))
        noise = jnp.sqrt(1.0 - self.zeta) * left + jnp.sqrt(1.0 * self.zeta) * noise
        x = jnp.sqrt(kept_next) * clean + jnp.sqrt(1 - kept_next) * noise
        num_gradients = 1 + self.num_inner_steps
        info = pixel_info(self, target, clean, losses=losses[None], num_inner_steps=num_gradients)
        return Pixels(x, state.step + 1), info

    def fit(self, target: PixelTarget, x: Array, weight: Array) -> tuple[Array, Array]:
        """The minimum of energy + weight / 2 ||. - x||^2, and the energy of x per row [R]."""

        def slope(x: Array) -> tuple[Array, Array]:
            losses, pull = jax.vjp(target.energy_of, x)
            return pull(jnp.ones_like(losses))[0], losses

        # The energy is quadratic, so its gradient is this line.
        gradient, bend, losses = jax.linearize(slope, x, has_aux=True)
        curve = lambda d: bend(d) + weight * d  # noqa: E731 - one line of algebra
        return x + conjugate_gradients(curve, -gradient, self.num_inner_steps), losses

    def evaluations(self) -> Evaluations:
        """Calls per sample; a product with the energy's Hessian counts as a gradient."""
        return Evaluations(
            denoiser=self.num_steps,
            decoder=0,
            decoder_gradient=self.num_steps * (1 + self.num_inner_steps),
        )


def conjugate_gradients(curve: Callable[[Array], Array], b: Array, num_steps: int) -> Array:
    """Solves curve(x) = b per row for a linear, positive definite `curve` that does not mix rows.

    JAX's own solver takes one step length for the whole batch, and rows would influence each other.

    Args:
      curve: images [R, H, W, C] -> the same.
      b: images [R, H, W, C].
      num_steps: steps from 0; rows that are solved as well as float32 can stay as they are. Going
        on would divide what rounding leaves where nothing is measured by the small weight there.
    """

    def dot(one: Array, two: Array) -> Array:
        return jnp.sum(one * two, axis=(1, 2, 3), keepdims=True)

    def step(_: int, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, residual, direction, square = carry
        curved = curve(direction)
        bend = dot(direction, curved)
        is_open = (bend > 0) & (square > goal)
        length = jnp.where(is_open, square / jnp.where(is_open, bend, 1.0), 0.0)
        x, residual = x + length * direction, residual - length * curved
        after = dot(residual, residual)
        share = jnp.where(square > 0, after / jnp.where(square > 0, square, 1.0), 0.0)
        return x, residual, residual + share * direction, after

    goal = _LEAST_RESIDUAL**2 * dot(b, b)
    start = (jnp.zeros_like(b), b, b, dot(b, b))
    return jax.lax.fori_loop(0, num_steps, step, start)[0]
