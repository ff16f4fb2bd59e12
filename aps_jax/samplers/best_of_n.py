"""Best of n: samples of the prior, of which the one that fits the measurement best is kept."""

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
from aps_jax.sampling.target import Target, fold
from aps_jax.types import Array, Key


class _State(NamedTuple):
    """The candidate at work, and the best one so far."""

    candidate: Decoding
    best: selection.Best
    step: Array

    @property
    def tokens(self) -> Array:
        """Those of the candidate at work."""
        return self.candidate.tokens


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNConfig(DecodingConfig):
    """Keeps the candidate of least energy, the first one on ties; not a posterior sample.

    Candidate j is the sample that `MaskGITConfig` draws for the row's key folded with j. A step is
    one timestep of one candidate, and `info.loss` the least energy so far. The budget decides n, so
    its default is ours.

    Attributes:
      num_candidates: n, drawn one after the other, so memory does not grow with it.
    """

    NAME: ClassVar = "best_of_n"
    SUMMARY: ClassVar = "n samples of the prior, the one that fits best"
    PAPER: ClassVar = "no paper"
    SOURCES: ClassVar = {"ours": ("num_candidates",)}
    KNOB: ClassVar = Knob("num_candidates")

    num_candidates: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"num_candidates": 1})

    @property
    def num_iterations(self) -> int:
        """Timesteps of all candidates."""
        return self.num_candidates * self.num_steps

    def init(self, target: Target, keys: Key) -> _State:
        """Before the first candidate."""
        tokens = target.tokens
        return _State(decoding.start(tokens), selection.none_yet(tokens), jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One timestep of a candidate; after its last one it is weighed."""
        j, i = state.step // self.num_steps, state.step % self.num_steps
        keys = fold(keys, j)
        candidate, estimate = decoding.decode_step(self, target, keys, state.candidate, i)

        def weigh() -> tuple[Decoding, selection.Best]:
            best = selection.keep_better(target, state.best, candidate.tokens, j == 0)
            return decoding.start(target.tokens), best

        is_last = i == self.num_steps - 1
        candidate_after, best = jax.lax.cond(is_last, weigh, lambda: (candidate, state.best))
        after = _State(candidate_after, best, state.step + 1)
        # No candidate has been weighed yet: that is no failure.
        finite = jnp.isfinite(best.loss) | (j == 0) & ~is_last
        info = step_info(self, target, candidate.tokens, estimate, is_finite=finite)
        return after, info._replace(loss=best.loss)

    def finish(self, target: Target, state: _State, keys: Key) -> Array:
        """The best candidate [R, L]."""
        return state.best.tokens

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        num_calls = self.num_candidates * self.num_steps * self.num_passes
        return Evaluations(num_calls, decoder=self.num_candidates + 1, decoder_gradient=0)
