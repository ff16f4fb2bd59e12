"""EntRGi (arXiv:2602.05000): entropy-aware guidance of masked decoding by gradients.

for i = 1..T:
  phi <- the prior's log-probabilities
  phi <- Adam steps on the measurement term at the code e:
         soft = softmax(phi / tau) C,  hard ~ top-p of softmax(phi / tau)
         e = soft + stop_gradient(w (hard - soft)),  w = entropy of softmax(phi) / log K
  draw tokens from softmax(phi / tau), reveal where the prior was surest
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax import schedules
from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers import decoding, selection
from aps_jax.samplers.config import GradientConfig, PriorConfig
from aps_jax.sampling import remasking, starts
from aps_jax.sampling.draws import draw_tokens, top_p
from aps_jax.sampling.inner_loop import Refined, descend
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, split
from aps_jax.types import Array, Key


class _State(NamedTuple):
    tokens: Array  # of the trajectory at work
    best: selection.Best
    step: Array
    estimate: Array | None  # tokens of the smooth start, if phi begins near them


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class EntRGiConfig(GradientConfig, PriorConfig):
    """Guided decoding whose estimator trusts hard codes where phi is uncertain.

    Departure: at least one token is revealed per step, and the last step reveals all. A step is one
    timestep of one trajectory, and `info.loss` the least energy of the finished ones. The defaults
    are the released experiments', with no KL.

    Attributes:
      num_steps: timesteps T.
      num_inner_steps: Adam steps M per timestep; phi and Adam start afresh at each.
      learning_rate: of Adam.
      num_trajectories: independent runs, of which the one of least energy is returned.
      mixing: w: "entropy", "hard" (1; the straight-through estimator of a sampled code, which that
        repository calls APS) or "soft" (0; continuous relaxation).
      temperature: tau.
      top_p: share of the mass that hard codes are drawn from.
      order: "entropy" reveals where the prior's entropy is least, "anchor" where the optimised
        logit of the drawn token is largest.
      schedule: gamma, the share of masked tokens over progress, by name.
    """

    NAME: ClassVar = "entrgi"
    SUMMARY: ClassVar = "EntRGi: gradients at an entropy-aware mix of hard and soft codes"
    PAPER: ClassVar = "arXiv:2602.05000"
    SOURCES: ClassVar = {
        "its code": (
            "num_steps", "num_inner_steps", "learning_rate", "num_trajectories", "mixing",
            "temperature", "top_p", "order", "schedule",
        )
    }  # fmt: skip
    KNOB: ClassVar = Knob("num_inner_steps", scales_steps=True)
    STATIC_FLOATS: ClassVar = ("top_p",)  # The cut is left out where it is 1.

    num_steps: int = 128
    num_inner_steps: int = 3
    learning_rate: float = 0.5
    num_trajectories: int = 4
    mixing: str = "entropy"
    temperature: float = 0.7
    top_p: float = 0.95
    order: str = "entropy"
    schedule: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_steps": 1, "num_inner_steps": 0, "num_trajectories": 1},
            choices={
                "mixing": ("entropy", "hard", "soft"),
                "order": ("entropy", "anchor"),
                "schedule": sorted(schedules.SCHEDULES),
            },
            positive=("temperature", "top_p"),
            shares=("top_p",),
        )

    @property
    def num_iterations(self) -> int:
        """Timesteps of all trajectories."""
        return self.num_trajectories * self.num_steps

    def init(self, target: Target, keys: Key) -> _State:
        """Before the first trajectory."""
        tokens = target.tokens
        return _State(
            tokens=tokens,
            best=selection.none_yet(tokens),
            step=jnp.zeros((), jnp.int32),
            estimate=starts.estimate_if(target, self.encoder_start),
        )

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One timestep of a trajectory; after its last one it is weighed."""
        n, i = state.step // self.num_steps, state.step % self.num_steps
        keys_refine, keys_draw = split(fold(fold(keys, n), i), 2)
        log_prior = target.carried_log_prior(state.tokens)
        phi = starts.raised(target, log_prior, state.estimate, self.encoder_start)
        refined = self._refine(target, keys_refine, phi, state.tokens)
        proposal = draw_tokens(keys_draw, refined.phi / self.temperature)
        if self.order == "anchor":
            scores = remasking.confidence(refined.phi, proposal)
        else:
            scores = -normalized_entropy(log_prior)
        is_masked = state.tokens == target.mask
        num_left = decoding.num_left(self, i, target.is_unknown)
        is_kept = remasking.select_by_count(scores, is_masked, num_left)
        tokens = jnp.where(is_kept, proposal, state.tokens)

        is_last = i == self.num_steps - 1
        after, best = jax.lax.cond(
            is_last,
            lambda: (target.tokens, selection.keep_better(target, state.best, tokens, n == 0)),
            lambda: (tokens, state.best),
        )
        info = step_info(
            self, target, tokens, jnp.where(is_masked, proposal, state.tokens),
            # Before the first trajectory has been weighed an infinite loss is no failure.
            is_finite=jnp.isfinite(best.loss) | (n == 0) & ~is_last,
            losses=refined.losses, num_inner_steps=self.num_inner_steps,
        )  # fmt: skip
        state = state._replace(tokens=after, best=best, step=state.step + 1)
        return state, info._replace(loss=best.loss)

    def finish(self, target: Target, state: _State, keys: Key) -> Array:
        """The best trajectory [R, L]."""
        return state.best.tokens

    def _refine(self, target: Target, keys: Key, phi: Array, tokens: Array) -> Refined:
        def losses_of(phi: Array, j: Array) -> Array:
            return target.objective_of(self.mixed_codes(target, fold(keys, j), phi, tokens))

        return descend(losses_of, phi, optax.adam(self.learning_rate), self.num_inner_steps)

    def mixed_codes(self, target: Target, keys: Key, phi: Array, tokens: Array) -> Array:
        """The codes e [R, L, d] of the method, at masked tokens; the others have their own."""
        scaled = phi / self.temperature
        codes = target.expected_code(scaled)
        if self.mixing != "soft":
            hard = target.codes(draw_tokens(keys, top_p(scaled, self.top_p)))
            weight = normalized_entropy(phi)[..., None] if self.mixing == "entropy" else 1.0
            codes = codes + jax.lax.stop_gradient(weight * (hard - codes))
        return target.known_codes(codes, tokens)

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        num_steps = self.num_trajectories * self.num_steps
        return Evaluations(
            denoiser=num_steps * self.num_passes,
            decoder=self.num_trajectories + 1,
            decoder_gradient=num_steps * self.num_inner_steps,
        )


def normalized_entropy(phi: Array) -> Array:
    """Entropy of softmax(phi) [R, L, K] per token over log K, in [0, 1]."""
    log_probs = jax.nn.log_softmax(phi, axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) / jnp.log(phi.shape[-1])
