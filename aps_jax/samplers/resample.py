"""ReSample (arXiv:2307.08123): solve for the measurement now and then, and noise what was found.

z <- noise
for t = T..1:
  z_0 <- denoiser(z)
  z <- DDIM's step from z to z_0 - step_size alpha_bar_t gradient in z of ||y - A(decode(z_0))||
  if t is one of every `interval` steps after the first third of them:
    z_0 <- encode(argmin_x energy(x)) from decode(z_0); argmin energy(decode(z_0)) in the last third
    z <- a draw around z_0 and z, weighed by their noise; z_0 itself at the end
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.operators.residuals import residuals
from aps_jax.samplers.continuous import DenoiserConfig, Pixels, ddpm_levels, guide, levels_at
from aps_jax.sampling.leaves import as_pytree, is_absent
from aps_jax.sampling.optimizers import lenient
from aps_jax.sampling.pixels import PixelTarget, pixel_info
from aps_jax.sampling.run import StepInfo
from aps_jax.sampling.target import fold
from aps_jax.types import Array, Key

#: The first of so many parts of the steps has no solving, the last one solves for latents.
_PARTS = 3


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReSampleConfig(DenoiserConfig):
    """Its Algorithm 1 with the guidance and the schedule of the released code; biased.

    That code denoises five more steps before it solves, which is not done here, and stops solving
    at a residual of 0.001, whatever the noise. Here a row rests at a residual of `tolerance`
    times `sigma`, so that noise is not fitted; rewards have no such size, and never rest. Adam has
    no weight decay. Gradients of the operator alone, those of the solving for pixels, are not in
    `evaluations()`.

    Attributes:
      num_inner_steps: Adam steps of a solving for latents.
      learning_rate: of these.
      num_pixel_steps: Adam steps of a solving for pixels.
      pixel_learning_rate: of these.
      interval: steps from one solving to the next; the last step always solves.
      variance_scale: gamma of the paper, the trust in what was solved for.
      tolerance: root mean square of the residual, in units of `sigma`, at which solving ends.
      step_size: factor of the guidance between solvings, 0 for none; a half of alpha bar in the
        code.
      measurement_term: of the guidance; as in `DPSConfig`.
    """

    NAME: ClassVar = "resample"
    SUMMARY: ClassVar = "ReSample: diffusion on latents with solutions for the measurement"
    PAPER: ClassVar = "arXiv:2307.08123"
    KNOB: ClassVar = Knob("num_inner_steps")
    NEEDS: ClassVar = "latent denoiser"
    SOURCES: ClassVar = {
        "its code": (
            "num_steps", "num_inner_steps", "learning_rate", "num_pixel_steps", "interval",
            "pixel_learning_rate", "variance_scale", "step_size", "measurement_term",
        ),
        "ours": ("tolerance",),
    }  # fmt: skip

    num_steps: int = 500
    num_inner_steps: int = 500
    learning_rate: float = 5e-3
    num_pixel_steps: int = 2000
    pixel_learning_rate: float = 1e-2
    interval: int = 10
    variance_scale: float = 40.0
    tolerance: float = 1.0
    step_size: float = 0.5
    measurement_term: str = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_inner_steps": 0, "num_pixel_steps": 0, "interval": 1},
            positive=("learning_rate", "pixel_learning_rate", "variance_scale"),
            not_negative=("step_size", "tolerance"),
            choices={"measurement_term": ("norm", "gaussian")},
        )

    def init(self, target: PixelTarget, keys: Key) -> Pixels:
        """Noise, in DDPM's scaling; ValueError where pixels cannot become latents."""
        codec = target.denoiser.codec
        if codec is not None and codec.encode is None and self._num_solvings()[0]:
            raise ValueError("sampler 'resample' needs a codec with an encoder; this one has none")
        return Pixels(target.noise(fold(keys, self.num_steps)), jnp.zeros((), jnp.int32))

    def step(self, target: PixelTarget, state: Pixels, keys: Key) -> tuple[Pixels, StepInfo]:
        """One level of noise."""
        kept, kept_next = levels_at(ddpm_levels(self.num_steps), state.step)
        clean, gradient, losses = self._guided(target, state.x, kept)
        noise = (state.x - jnp.sqrt(kept) * clean) / jnp.sqrt(1 - kept)
        x = jnp.sqrt(kept_next) * clean + jnp.sqrt(1 - kept_next) * noise - gradient
        left = self.num_steps - 1 - state.step
        part = self.num_steps // _PARTS
        is_solving = (left % self.interval == 0) & (left <= self.num_steps - part)
        is_last_part = (left < part) | (left == 0)
        found = jax.lax.switch(
            jnp.where(is_solving, jnp.where(is_last_part, 2, 1), 0).astype(jnp.int32),
            (lambda z: z, lambda z: self.solve_pixels(target, z), lambda z: self.solve(target, z)),
            clean,
        )
        fresh = target.noise(fold(keys, state.step))
        again = self.resample(found, x, kept, kept_next, fresh)
        num_gradients = jnp.where(is_solving & is_last_part, self.num_inner_steps, 0)
        num_gradients = num_gradients + (0 if losses is None else 1)
        info = pixel_info(
            self, target, found,
            losses=None if losses is None else losses[None], num_inner_steps=num_gradients,
        )  # fmt: skip
        return Pixels(jnp.where(is_solving, again, x), state.step + 1), info

    def _guided(
        self, target: PixelTarget, x: Array, kept: Array
    ) -> tuple[Array, Array, Array | None]:
        """Denoised latents, the guidance, and the objective [R], None without guidance."""
        if is_absent(self.step_size):
            clean = target.denoise(x / jnp.sqrt(kept), jnp.sqrt((1 - kept) / kept))
            return clean, jnp.zeros_like(x), None

        def pull(clean: Array) -> tuple[Array, Array]:
            losses = target.objective_of(clean)
            return self.step_size * kept * losses, losses

        return guide(target, x, kept, pull)

    def solve(self, target: PixelTarget, z: Array) -> Array:
        """Latents near `z` whose images fit the measurement."""
        rate, steps = self.learning_rate, self.num_inner_steps
        return descend_and_rest(target.energy_of, z, rate, steps, self._enough(target))

    def solve_pixels(self, target: PixelTarget, z: Array) -> Array:
        """The latents of images near those of `z` that fit the measurement."""

        def energy(x: Array) -> Array:
            return target.by_sample(target.energy, x)

        x, rate, steps = target.decode(z), self.pixel_learning_rate, self.num_pixel_steps
        return target.encode(descend_and_rest(energy, x, rate, steps, self._enough(target)))

    def _enough(self, target: PixelTarget) -> Array:
        """The energy per row [R] at which solving ends."""
        if target.measurement is None:
            return jnp.full(target.num_rows, -jnp.inf, jnp.float32)
        y = target.measurement.y
        pairs = residuals(target.measurement.operator, y, y)
        count = sum(jnp.sum(weight, axis=1) for _, weight in pairs)
        # At a residual of sigma every entry has the energy 1/2.
        return self.tolerance**2 * target.rows(jnp.asarray(count)) / 2

    def resample(
        self, found: Array, x: Array, kept: Array, kept_next: Array, noise: Array
    ) -> Array:
        """A draw of the next latents, given what was found and DDIM's next ones `x`.

        Its law is the product of two normal ones, around sqrt(kept_next) times what was found with
        the variance 1 - kept_next, and around `x` (Proposition 1 of the paper).
        """
        spread = 1 - kept_next
        variance = self.variance_scale * spread / (1 - kept) * (1 - kept / kept_next)
        total = jnp.where(spread > 0, variance + spread, 1.0)
        mean = (variance * jnp.sqrt(kept_next) * found + spread * x) / total
        drawn = mean + jnp.sqrt(variance * spread / total) * noise
        return jnp.where(spread > 0, drawn, found)

    def _num_solvings(self) -> tuple[int, int]:
        """How often pixels and latents are solved for."""
        part = self.num_steps // _PARTS
        left = [n for n in range(0, self.num_steps, self.interval) if n <= self.num_steps - part]
        last = sum(n < part or n == 0 for n in left)
        return len(left) - last, last

    def evaluations(self) -> Evaluations:
        """Calls per sample."""
        pixels, latents = self._num_solvings()
        guided = 0 if is_absent(self.step_size) else self.num_steps
        return Evaluations(
            denoiser=self.num_steps,
            decoder=1 + pixels,
            decoder_gradient=guided + latents * self.num_inner_steps,
        )


def descend_and_rest(
    energy: Callable[[Array], Array], x: Array, rate: float, num_steps: int, enough: Array
) -> Array:
    """Rows after steps of Adam on their energies; a row rests once its energy is small enough.

    The inner loop of the methods on logits (`sampling.inner_loop`) knows no rest.

    Args:
      energy: rows [R, ...] -> [R].
      x: where it starts.
      rate: learning rate.
      num_steps: steps.
      enough: energies [R] at which rows rest.
    """
    optimizer = lenient(optax.adam(rate))

    def move(
        carry: tuple[Array, optax.OptState], _: None
    ) -> tuple[tuple[Array, optax.OptState], None]:
        x, state = carry
        energies, pull = jax.vjp(energy, x)
        update, state = optimizer.update(pull(jnp.ones_like(energies))[0], state)
        is_resting = (energies <= enough).reshape(-1, *[1] * (x.ndim - 1))
        return (jnp.where(is_resting, x, x + jnp.asarray(update)), state), None

    return jax.lax.scan(move, (x, optimizer.init(x)), None, length=num_steps)[0][0]
