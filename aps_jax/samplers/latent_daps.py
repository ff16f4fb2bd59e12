"""LatentDAPS (arXiv:2407.01521): DAPS on the latents of a codec, whose decoder is in the energy.

z <- noise of std first_sigma
for sigma = first_sigma..last_sigma:
  m <- probability-flow ODE of the latent denoiser from (z, sigma) to almost no noise
  z_0 <- Langevin steps from m on energy(decode(z_0)) + ||z_0 - m||^2 / (2 sigma^2)
  z <- z_0 + (next sigma) * noise; no noise at the end
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from aps_jax.config import Evaluations, Knob
from aps_jax.samplers.daps import DAPSConfig
from aps_jax.sampling.leaves import as_pytree


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDAPSConfig(DAPSConfig):
    """`DAPSConfig` with a codec and other defaults, and like it no sampler of the posterior.

    The defaults are those of the released code for super-resolution with a latent diffusion model;
    its codec has another scale, so `learning_rate` above all is to be tuned. The first release of
    that code moved pixels at high levels of noise; the later one, as here, moves latents only.
    """

    NAME: ClassVar = "latent_daps"
    SUMMARY: ClassVar = "LatentDAPS: an ODE on latents and Langevin steps through the decoder"
    KNOB: ClassVar = Knob("num_inner_steps", scales_steps=True)
    NEEDS: ClassVar = "latent denoiser"
    SOURCES: ClassVar = {
        "its code, super-resolution with latents": (
            "num_steps", "num_ode_steps", "num_inner_steps", "learning_rate", "last_learning_rate",
            "momentum", "first_sigma", "last_sigma", "ode_sigma",
        ),
    }  # fmt: skip

    num_steps: int = 50
    num_ode_steps: int = 2
    num_inner_steps: int = 24
    learning_rate: float = 1.35e-4
    last_learning_rate: float = 0.023
    momentum: float = 0.86
    first_sigma: float = 10.0
    ode_sigma: float = 0.001

    def evaluations(self) -> Evaluations:
        """Calls per sample."""
        return super().evaluations()._replace(decoder=1)
