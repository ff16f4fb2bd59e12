"""SVDD-PM (arXiv:2408.08252): at every step, the best of several next states.

for i = 1..T:
  M candidates z_s ~ p(z_s | z_t)
  value of a candidate = -E(candidate, its masks filled with the prior's likeliest tokens)
  z <- a candidate chosen by value
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers import decoding, selection
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.problem import (
    energy,
    finish,
    fold,
    most_likely,
    pose,
    prior_log_probs,
    step_info,
)
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVDDConfig(DecodingConfig):
    """Options of `svdd_sample`; the defaults are the released code's, for discrete diffusion.

    Attributes:
      num_candidates: M; the paper has 20 for images and 10 otherwise.
      selection: "argmax" (released code), "sample" with weights exp(value / temperature) (paper) or
        "standardized", the same after dividing values by their spread (ours: at sigma 0.05 energies
        are so large that any fixed temperature acts as argmax).
      selection_temperature: alpha; the paper has 0.01. "standardized" wants about 1: at 0.01 it is
        "argmax".
    """

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

    def evaluations(self) -> Evaluations:
        """Model calls per sample; the winner's call of the prior serves the next step, too."""
        num_tried = self.num_steps * self.num_candidates
        return Evaluations(
            denoiser=(1 + num_tried) * self.num_passes, decoder=num_tried + 1, decoder_gradient=0
        )


def svdd_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: SVDDConfig = SVDDConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Soft value-based decoding with the posterior-mean value (its Algorithm 1).

    The "posterior mean" of tokens is the released code's: each mask is filled with its likeliest
    token, which is a mode. The last step leaves no masks, so none are filled at the end.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; `info.loss` is the energy of the chosen candidate's fill.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)

    def step(
        carry: tuple[decoding.Decoding, Array], i: Array
    ) -> tuple[tuple[decoding.Decoding, Array], StepInfo]:
        state, log_probs = carry
        keys = fold(problem.keys, i)

        def candidate(j: Array) -> tuple[decoding.Decoding, Array, Array]:
            after = decoding.reveal(problem, fold(keys, j), log_probs, state, i)
            log_probs_after = prior_log_probs(problem, after.tokens)
            return after, log_probs_after, energy(problem, most_likely(log_probs_after))

        candidates = jax.vmap(candidate)(jnp.arange(config.num_candidates, dtype=jnp.int32))
        index = selection.select(
            fold(keys, config.num_candidates),
            -candidates[2],
            config.selection,
            config.selection_temperature,
        )
        state, log_probs, loss = selection.take(candidates, index)
        return (state, log_probs), step_info(problem, state.tokens, loss)

    start = (decoding.start(problem.tokens), prior_log_probs(problem, problem.tokens))
    (state, _), info = jax.lax.scan(step, start, jnp.arange(config.num_steps, dtype=jnp.int32))
    return finish(problem, state.tokens, info)
