"""DPS (arXiv:2209.14687): ancestral diffusion, pulled to the measurement through the denoiser.

x <- noise
for t = T..1:
  x_0 <- denoiser(x)
  x <- DDPM's step from x to x_0 - step_size * gradient in x of ||y - A(x_0)||
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.samplers.continuous import DenoiserConfig, Pixels, ddpm_levels, guide, levels_at
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.pixels import PixelTarget, pixel_info
from aps_jax.sampling.run import StepInfo
from aps_jax.sampling.target import fold
from aps_jax.types import Array, Key


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DPSConfig(DenoiserConfig):
    """Its Algorithm 1; biased, since the likelihood is that of the denoised image.

    The defaults are those of the released code for super-resolution and deblurring of faces, which
    has 0.5 for inpainting. That code takes the variance of a step from its network; here it is
    DDPM's posterior variance. A call of the denoiser has a gradient, which
    `evaluations()` does not count by itself.

    Attributes:
      step_size: factor of the gradient; zeta' of the paper.
      measurement_term: "norm" (||y - A(x)||, whose gradient is the paper's step divided by the
        norm), or "gaussian" (squared error / 2 sigma^2).
      clip_denoised: clip the denoised image to [-1, 1]; no gradient passes where it is clipped.
    """

    NAME: ClassVar = "dps"
    SUMMARY: ClassVar = "DPS: diffusion on pixels with gradients through the denoiser"
    PAPER: ClassVar = "arXiv:2209.14687"
    SOURCES: ClassVar = {
        "its code, super-resolution of faces": (
            "num_steps", "step_size", "measurement_term", "clip_denoised",
        ),
    }  # fmt: skip

    HAS_DENOISER_GRADIENT: ClassVar = True

    step_size: float = 0.3
    measurement_term: str = "norm"
    clip_denoised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            not_negative=("step_size",),
            choices={"measurement_term": ("norm", "gaussian")},
        )

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """Noise, in DDPM's scaling: x = sqrt(alpha bar) x_0 + sqrt(1 - alpha bar) n."""
        return Pixels(target.noise(fold(keys, self.num_steps)), jnp.zeros((), jnp.int32))

    def step(self, target: PixelTarget, state: Pixels, keys: Key) -> tuple[Pixels, StepInfo]:
        """One timestep."""
        kept, kept_next = levels_at(ddpm_levels(self.num_steps), state.step)
        clean, gradient, losses = guide(
            target, state.x, kept, lambda clean: self.pull(target, self._clip(clean))
        )
        clean = self._clip(clean)
        alpha = kept / kept_next
        mean = jnp.sqrt(kept_next) * (1 - alpha) / (1 - kept) * clean
        mean = mean + jnp.sqrt(alpha) * (1 - kept_next) / (1 - kept) * state.x
        std = jnp.sqrt((1 - alpha) * (1 - kept_next) / (1 - kept))
        noise = target.noise(fold(keys, state.step))
        x = mean + std * noise - gradient
        info = pixel_info(self, target, clean, losses=losses[None], num_inner_steps=1)
        return Pixels(x, state.step + 1), info

    def _clip(self, clean: Array) -> Array:
        return jnp.clip(clean, -1, 1) if self.clip_denoised else clean

    def pull(self, target: PixelTarget, clean: Array) -> tuple[Array, Array]:
        """What a step descends by its plain gradient, and the objective, of denoised rows [R]."""
        losses = target.objective_of(clean)
        return self.step_size * losses, losses

    def evaluations(self) -> Evaluations:
        """Calls per sample; one gradient goes through operator and denoiser."""
        return Evaluations(denoiser=self.num_steps, decoder=0, decoder_gradient=self.num_steps)
