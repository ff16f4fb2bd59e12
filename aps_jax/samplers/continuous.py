"""What the samplers with a denoiser share: their options, their state, their levels of noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import SharedConfig, check_options
from aps_jax.sampling.pixels import PixelTarget
from aps_jax.types import Array, Key

#: Timesteps of the DDPM that the published samplers were made for, and the ends of its betas.
_NUM_TIMESTEPS, _FIRST_BETA, _LAST_BETA = 1000, 1e-4, 0.02


class Pixels(NamedTuple):
    """The images or latents at work [R, H, W, C], and how many steps are done."""

    x: Array
    step: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig(SharedConfig):
    """Options of every sampler with a denoiser, which is also the sampler: it has the steps.

    A budget of decoder evaluations says nothing on pixels, where there is no decoder; `num_steps`
    sizes those samplers.

    Attributes:
      num_steps: levels of noise T.
    """

    NEEDS: ClassVar = "denoiser"
    #: Whether calls of the denoiser are differentiated, which `evaluations` does not count.
    HAS_DENOISER_GRADIENT: ClassVar = False

    num_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"num_steps": 1})
        if self.decode_scale != 1:
            raise ValueError(
                f"decode_scale is an option of samplers over tokens, and {self.NAME!r} is none; "
                "leave it at 1"
            )

    @property
    def num_iterations(self) -> int:
        """Steps from `init` to `finish`."""
        return self.num_steps

    def finish(self, target: PixelTarget, state: Any, keys: Key) -> Array:
        """The images or latents [R, H, W, C] of the last state."""
        return state.x


def ddpm_levels(num_steps: int, *, is_quadratic: bool = False) -> np.ndarray:
    """Alpha bar of DDPM's linear betas at some of its 1000 timesteps, from noise to image.

    Args:
      num_steps: T, of which there is one at least; the first timestep is always the noisiest.
      is_quadratic: the timesteps follow 1 - sqrt(progress), dense where there is little noise, as
        in DiffPIR; otherwise they are evenly spaced.

    Returns:
      Float32 [T + 1]; the last is 1, the clean image.
    """
    kept = np.cumprod(1 - np.linspace(_FIRST_BETA, _LAST_BETA, _NUM_TIMESTEPS))
    progress = np.linspace(0, 1, num_steps)
    progress = np.sqrt(progress) if is_quadratic else progress
    index = np.round((_NUM_TIMESTEPS - 1) * (1 - progress)).astype(int)
    return np.append(kept[index], 1.0).astype(np.float32)


def levels_at(levels: np.ndarray, step: Array) -> tuple[Array, Array]:
    """The level before a step and the one after it."""
    table = jnp.asarray(levels)
    return table[step], table[step + 1]


def guide(
    target: PixelTarget,
    x: Array,
    kept: Array,
    pull: Callable[[Array], tuple[Array, Array]],
) -> tuple[Array, Array, Array]:
    """Denoises, and looks through the denoiser at what the denoised rows say of the measurement.

    Args:
      target: with the denoiser.
      x: rows [R, H, W, C] in DDPM's scaling.
      kept: its alpha bar.
      pull: denoised rows -> what is to fall [R], and what it tells of them [R].

    Returns:
      The denoised rows, the gradient of their pulls in `x`, and what was told [R].
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        clean = target.denoise(x / jnp.sqrt(kept), jnp.sqrt((1 - kept) / kept))
        pulls, told = pull(clean)
        return jnp.sum(pulls), (clean, told)

    gradient, (clean, told) = jax.grad(total, has_aux=True)(x)
    return clean, gradient, told
