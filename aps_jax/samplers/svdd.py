"""SVDD-PM (arXiv:2408.08252): at every step, the best of several next states.

for i = 1..T:
  M candidates z_s ~ p(z_s | z_t)
  value of a candidate = -E(candidate, its masks filled with the prior's likeliest tokens)
  z <- a candidate chosen by value
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers import decoding, selection
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.decoding import Decoding
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, most_likely
from aps_jax.types import Array, Key


class _State(NamedTuple):
    decoding: Decoding
    log_probs: Array

    @property
    def tokens(self) -> Array:
        return self.decoding.tokens

    @property
    def step(self) -> Array:
        return self.decoding.step


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SVDDConfig(DecodingConfig):
    """Soft value-based decoding with the posterior-mean value (its Algorithm 1).

    The "posterior mean" of tokens is the released code's: each mask is filled with its likeliest
    token, which is a mode. The last step leaves no masks, so none are filled at the end.
    `info.loss` is the energy of the chosen candidate's fill. The defaults are the released code's,
    for discrete diffusion.

    Attributes:
      num_candidates: M; the paper has 20 for images and 10 otherwise.
      selection: "argmax" (released code), "sample" with weights exp(value / temperature) (paper) or
        "standardized", the same after dividing values by their spread (ours: at sigma 0.05 energies
        are so large that any fixed temperature acts as argmax).
      selection_temperature: alpha; the paper has 0.01. "standardized" wants about 1: at 0.01 it is
        "argmax".
    """

    NAME: ClassVar = "svdd_pm"
    SUMMARY: ClassVar = "SVDD-PM: the best of several next states, at every step"
    PAPER: ClassVar = "arXiv:2408.08252"
    SOURCES: ClassVar = {
        "its code": ("num_steps", "schedule", "reveal", "num_candidates", "selection"),
        "its paper": ("selection_temperature",),
    }
    KNOB: ClassVar = Knob("num_candidates", least=2, scales_steps=True)

    num_steps: int = 128
    schedule: str = "linear"
    reveal: str = "ancestral"
    num_candidates: int = 10
    selection: str = "argmax"
    selection_temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_candidates": 1},
            choices={"selection": selection.RULES},
            positive=("selection_temperature",),
        )

    def init(self, target: Target, keys: Key) -> _State:
        """Everything masked but the known tokens."""
        start = decoding.start(target.tokens)
        return _State(start, target.carried_log_prior(start.tokens))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """Draws the candidates and chooses one by value."""
        keys, i = fold(keys, state.step), state.step

        def candidate(j: Array) -> tuple[_State, Array]:
            after = decoding.reveal(
                self, fold(keys, j), state.log_probs, state.decoding, i,
                is_unknown=target.is_unknown,
            )  # fmt: skip
            log_probs = target.carried_log_prior(after.tokens)
            # The step is common to all rows, so it is put back after the choice.
            after = after._replace(step=jnp.broadcast_to(after.step, log_probs.shape[:1]))
            return _State(after, log_probs), target.energy_of(most_likely(log_probs))

        candidates, losses = jax.vmap(candidate)(jnp.arange(self.num_candidates, dtype=jnp.int32))
        index = selection.select(
            fold(keys, self.num_candidates), -losses, self.selection, self.selection_temperature
        )
        chosen, loss = selection.take((candidates, losses), index)
        chosen = _State(chosen.decoding._replace(step=i + 1), chosen.log_probs)
        estimate = decoding.estimate(chosen.log_probs, chosen.tokens)
        return chosen, step_info(self, target, chosen.tokens, estimate, loss=loss)

    def evaluations(self) -> Evaluations:
        """Model calls per sample; the winner's call of the prior serves the next step, too."""
        num_tried = self.num_steps * self.num_candidates
        return Evaluations(
            denoiser=(1 + num_tried) * self.num_passes, decoder=num_tried + 1, decoder_gradient=0
        )
