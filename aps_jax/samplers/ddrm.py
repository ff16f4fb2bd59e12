"""DDRM (arXiv:2201.11793): diffusion in the singular basis of a linear operator.

x <- the measurement where it is clear, noise elsewhere
for sigma = sigma_T..sigma_1:
  x_0 <- denoiser(x)
  x <- per singular value, the next level's noise around
         x_0                                  where nothing is measured, eta of it fresh
         x_0, the rest of the noise being the measurement's     where that is noisier than the level
         the measurement                      where it is clearer than the level
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.operators.svd import SVD
from aps_jax.samplers.continuous import DenoiserConfig, Pixels, ddpm_levels, levels_at
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.pixels import PixelTarget, pixel_info
from aps_jax.sampling.run import StepInfo
from aps_jax.sampling.target import fold
from aps_jax.types import Array, Key


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DDRMConfig(DenoiserConfig):
    """Its Definition 1, for operators whose singular values are known (`Operator.svd`).

    Images are on the scale where noise is added without rescaling, as the paper writes them. The
    levels are those of DDPM, from its noisiest timestep to its cleanest; the released code's begin
    50 timesteps later, for 20 steps. What it returns is the denoised image of the last level, so
    the measurement is not met exactly.

    Attributes:
      eta: share of the noise that is fresh at every level, in [0, 1].
      eta_b: how far the measurement replaces the denoised image where it is clearer than the level,
        in [0, 1].
    """

    NAME: ClassVar = "ddrm"
    SUMMARY: ClassVar = "DDRM: diffusion on pixels in the singular basis of a linear measurement"
    PAPER: ClassVar = "arXiv:2201.11793"
    SOURCES: ClassVar = {"its paper and code": ("num_steps", "eta", "eta_b")}

    num_steps: int = 20
    eta: float = 0.85
    eta_b: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, shares=("eta", "eta_b"))

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """The measurement and noise; ValueError unless the operator has an SVD."""
        svd, values, found = self._basis(target)
        level = _sigma(ddpm_levels(self.num_steps)[0])
        noise = svd.forward(target.noise(fold(keys, self.num_steps)))
        x, left = self._clear(values, level)
        start = jnp.where(left > 0, x * found + jnp.sqrt(left) * noise, level * noise)
        return Pixels(svd.backward(start), jnp.zeros((), jnp.int32))

    def step(self, target: PixelTarget, state: Pixels, keys: Key) -> tuple[Pixels, StepInfo]:
        """One level of noise."""
        svd, values, found = self._basis(target)
        kept, kept_next = levels_at(ddpm_levels(self.num_steps), state.step)
        level, after = _sigma(kept), _sigma(kept_next)
        clean = target.denoise(state.x, level)
        mean, x = svd.forward(clean), svd.forward(state.x)
        noise = svd.forward(target.noise(fold(keys, state.step)))
        carried = after * jnp.sqrt(1.0 - jnp.square(jnp.asarray(self.eta, jnp.float32)))
        fresh = after * self.eta * noise
        unseen = mean + carried * (x - mean) / level + fresh
        noisy = mean + carried * (found - values * mean) / self.sigma + fresh
        inverse, left = self._clear(values, after)
        clear = (1 - self.eta_b) * mean + self.eta_b * inverse * found + jnp.sqrt(left) * noise
        is_clear = after * values >= self.sigma
        coefficients = jnp.where(values > 0, jnp.where(is_clear, clear, noisy), unseen)
        info = pixel_info(self, target, clean)
        return Pixels(svd.backward(coefficients), state.step + 1), info

    def _basis(self, target: PixelTarget) -> tuple[SVD, Array, Array]:
        """The SVD, its values [1 or R, ...] and U^T y [R, H, W, C] of every row."""
        operator = None if target.measurement is None else target.measurement.operator
        if target.measurement is None or operator is None or operator.svd is None:
            raise ValueError(
                "sampler 'ddrm' needs a measurement by an operator whose singular values are known "
                f"(Operator.svd), and {operator.name if operator else 'a reward'} has none; "
                "'diffpir' takes any linear operator, 'dps' and 'daps' any at all"
            )
        shape = (target.batch, *(target.image_shape or ()), target.denoiser.num_channels)
        svd = operator.svd(operator.params, shape)
        is_own = svd.values.ndim == 4 and svd.values.shape[0] > 1
        values = target.rows(svd.values) if is_own else svd.values
        return svd, values, target.rows(svd.measured(target.measurement.y))

    def _clear(self, values: Array, level: Array) -> tuple[Array, Array]:
        """1 / values, and the variance that a level has beyond eta_b of the measurement's.

        Both are 0 where the measurement is noisier than the level.
        """
        is_clear = level * values >= self.sigma
        inverse = jnp.where(is_clear, 1 / jnp.where(is_clear, values, 1.0), 0.0)
        left = level**2 - jnp.square(self.eta_b * self.sigma * inverse)
        return inverse, jnp.where(is_clear, jnp.maximum(left, 0.0), 0.0)

    def evaluations(self) -> Evaluations:
        """Calls per sample; the operator is known by its singular values."""
        return Evaluations(denoiser=self.num_steps, decoder=0, decoder_gradient=0)


def _sigma(kept: Array) -> Array:
    """Noise of images that are not rescaled, at DDPM's alpha bar."""
    kept = jnp.asarray(kept, jnp.float32)
    return jnp.sqrt((1 - kept) / kept)
