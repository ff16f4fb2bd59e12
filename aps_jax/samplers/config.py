"""Options that several samplers share; each sampler's own file adds its own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from aps_jax.config import Evaluations, Knob, SharedConfig, check_options, num_passes
from aps_jax.sampling.target import Target
from aps_jax.schedules import SCHEDULES
from aps_jax.types import Array, Key

#: How masked tokens are revealed; `decoding.reveal` explains them.
REVEALS = ("confidence", "random", "ancestral", "remdm-cap", "remdm-rescale", "remdm-conf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(SharedConfig):
    """Options of every sampler here, which is also the sampler: it has the steps.

    Hashable, so a static argument of `jax.jit`; a pytree, so an ordinary one
    (`aps_jax.sampling.leaves`). Subclasses add `init` and `step` of `sampling.run.Sampler`.
    """

    @property
    def num_iterations(self) -> int:
        """Steps from `init` to `finish`."""
        return getattr(self, "num_steps")  # noqa: B009 - of subclasses

    def finish(self, target: Target, state: Any, keys: Key) -> Array:
        """Clean tokens [R, L] of the last state."""
        return state.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(SamplerConfig):
    """Adds the call of the prior.

    Attributes:
      guidance_scale: g of classifier-free guidance, (1 + g) cond - g uncond; 0 is off.
      prior_temperature: divides the prior's logits.
    """

    SOURCES: ClassVar = {"neutral": ("guidance_scale", "prior_temperature")}

    guidance_scale: float = 0.0
    prior_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, positive=("prior_temperature",), not_negative=("guidance_scale",))

    @property
    def num_passes(self) -> int:
        """Forward passes of the prior per call."""
        return num_passes(self.guidance_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(PriorConfig):
    """Adds the order in which masked tokens are revealed.

    Attributes:
      num_steps: timesteps T.
      schedule: gamma, the share of masked tokens over progress, by name.
      reveal: "confidence" (MaskGIT), "random" (a scheduled number, anywhere), "ancestral" (each
        token by itself, with the reverse process's probability), or "remdm-cap", "remdm-rescale",
        "remdm-conf" (ancestral with remasking of clean tokens).
      gumbel_temperature: tau of the noise tau * (1 - i/T) on the log-confidence; used by
        "confidence" only.
      remask_strength: sigma of "remdm-cap" or factor of "remdm-rescale" and "remdm-conf"; None
        takes 0.008, 0.015 and 1.
    """

    SOURCES: ClassVar = {
        "code of MaskGIT": ("schedule", "reveal", "gumbel_temperature"),
        "paper of ReMDM": ("remask_strength",),
        "ours": ("num_steps",),
    }

    num_steps: int = 15
    schedule: str = "cosine"
    reveal: str = "confidence"
    gumbel_temperature: float = 4.5
    remask_strength: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_steps": 1},
            choices={"schedule": sorted(SCHEDULES), "reveal": REVEALS},
            not_negative=("gumbel_temperature",),
            shares=("remask_strength",),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientConfig(SamplerConfig):
    """Adds the measurement term that gradients are taken of.

    Attributes:
      measurement_term: "gaussian" (squared error / 2 sigma^2), "norm" (||A(x) - y||, as G2D2's
        code) or "l1" (APS's: L times mean absolute error + perceptual_weight * LPIPS).
      perceptual_weight: of LPIPS, for "l1" where the measurement is an image.
      learning_rate: of the inner optimiser.
      encoder_start: as in `APSConfig` (ours): raises the logits that the optimiser starts from near
        the codes of a smooth estimate.
    """

    SOURCES: ClassVar = {
        "neutral": ("perceptual_weight", "encoder_start"),
        "ours": ("measurement_term", "learning_rate"),
    }

    measurement_term: str = "gaussian"
    perceptual_weight: float = 0.0
    learning_rate: float = 1.0
    encoder_start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            choices={"measurement_term": ("gaussian", "norm", "l1")},
            not_negative=("perceptual_weight", "encoder_start"),
            positive=("learning_rate",),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarConfig(GradientConfig, PriorConfig):
    """Of samplers that redraw every token at each timestep from optimised logits.

    Attributes:
      num_steps: timesteps T.
      num_inner_steps: optimiser steps per timestep; phi's optimiser starts afresh at each.
      schedule: gamma, the share of masked tokens over progress, by name.
    """

    KNOB: ClassVar = Knob("num_inner_steps", scales_steps=True)

    num_steps: int = 100
    num_inner_steps: int = 30
    schedule: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_steps": 1, "num_inner_steps": 0},
            choices={"schedule": sorted(SCHEDULES)},
        )

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(
            denoiser=self.num_steps * self.num_passes,
            decoder=1,
            decoder_gradient=self.num_steps * self.num_inner_steps,
        )
