"""What the samplers on pixels share: their options, their state and their levels of noise."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from aps_jax.config import SharedConfig, check_options
from aps_jax.sampling.pixels import PixelTarget
from aps_jax.types import Array, Key

#: Timesteps of the DDPM that the published samplers were made for, and the ends of its betas.
_NUM_TIMESTEPS, _FIRST_BETA, _LAST_BETA = 1000, 1e-4, 0.02


class Pixels(NamedTuple):
    """The images at work [R, H, W, C], and how many steps are done."""

    x: Array
    step: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig(SharedConfig):
    """Options of every sampler on pixels, which is also the sampler: it has the steps.

    A budget of decoder evaluations says nothing here, where there is no decoder; `num_steps` sizes
    these samplers.

    Attributes:
      num_steps: levels of noise T.
    """

    NEEDS: ClassVar = "denoiser"

    num_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"num_steps": 1})
        if self.decode_scale != 1:
            raise ValueError(
                f"decode_scale is an option of decoders, and sampler {self.NAME!r} has none; "
                "leave it at 1"
            )

    @property
    def num_iterations(self) -> int:
        """Steps from `init` to `finish`."""
        return self.num_steps

    def finish(self, target: PixelTarget, state: Any, keys: Key) -> Array:
        """The images [R, H, W, C] of the last state."""
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
