"""APS as the proposal of sequential Monte Carlo: exact as the number of particles grows (ours).

The weights are those of twisted SMC (arXiv:2306.17775), whose twist is APS's objective.

each particle, with its tokens z all masked at first:
  phi <- log x_theta(z), then M steps of Adam on the objective, as in APS
  V(z) = -objective at phi, a guess of what z can still come to
for i = 1..T:
  each particle:
    S <- which masked tokens to reveal, chosen before any of them is drawn
    x_S ~ q: independently from softmax(phi) or, in a share of the particles, from x_theta(z)
    log w <- log w + log x_theta(z)[x_S] - log q(x_S)
    z <- z with x_S; phi and V anew, or the tilt phi - log x_theta as it was; V = -energy at the end
    log w <- log w + lambda_s V(z_s) - lambda_t V(z_t)
  where V is new and the weights are uneven: resample
a sample is one of the particles, drawn by weight
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from aps_jax.config import Evaluations, Knob, check_options
from aps_jax.samplers import decoding, selection
from aps_jax.samplers.config import GradientConfig, PriorConfig
from aps_jax.sampling import objective, remasking, starts
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.inner_loop import descend
from aps_jax.sampling.leaves import as_pytree, or_none
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, most_likely, split
from aps_jax.schedules import SCHEDULES
from aps_jax.types import Array, Key


class _Particles(NamedTuple):
    """K particles of each row.

    Attributes:
      tokens: int32 [K, R, L].
      log_prior: log x_theta of these tokens [K, R, L, C] for C codes; of no meaning where clean.
      tilt: phi - log x_theta when phi was last refined, likewise.
      value: V [K, R].
      log_odds: that the particle's tokens came from the prior, given them, against phi [K, R].
    """

    tokens: Int[Array, "K R L"]
    log_prior: Float[Array, "K R L C"]
    tilt: Float[Array, "K R L C"]
    value: Float[Array, "K R"]
    log_odds: Float[Array, "K R"]


class _State(NamedTuple):
    particles: _Particles
    log_weights: Float[Array, "K R"]
    estimate: Int[Array, "R L"] | None  # Of an encoder start.
    step: Int[Array, ""]

    @property
    def tokens(self) -> Array:
        """Those of the first particle, which stand for all: as many are masked in each."""
        return self.particles.tokens[0]


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class APSSMCConfig(GradientConfig, PriorConfig):
    """Particles whose tokens APS proposes, weighted by prior and likelihood over proposal.

    The weighted particles converge to p(x) exp(-energy(x)) as K grows, where p is the law of the
    prior's own decoding: `num_steps` steps, each of which draws the tokens of S independently from
    x_theta. That is the prior's joint law, and the target the exact posterior, for a perfect prior
    and one token per step. With several tokens per step, or a prior whose conditionals contradict
    each other, it is the law that this order of decoding gives. S never depends on the tokens that
    are drawn for it, so its probability is the same in target and proposal and cancels; tokens that
    are revealed stay. Whatever phi, `tilt` or V are, and whatever is carried over, changes how many
    particles it takes, not the limit.

    `info.loss` is the least of the particles' -V. With one particle, `num_refinements=num_steps`
    and `prior_share=0` a sample is that of APS with random remasking and categorical draws.

    Attributes:
      num_steps: timesteps T.
      schedule: gamma, the share of masked tokens over progress, by name.
      order: which tokens a step reveals: "random", or "anchored", those of which phi is surest (of
        its likeliest code, which is not the drawn one).
      num_particles: K, per sample. Particles of different samples never meet.
      num_inner_steps: Adam steps M of a refinement; 0 leaves the prior's logits as they are.
      num_refinements: how many of the T steps refine phi, evenly spread and the first of them
        always, where all particles are alike and one refinement serves them all. At the others the
        tilt stays that of the last refinement.
      prior_weight: lambda_prior of the prior term, as in `APSConfig`.
      prior_share: share of the particles that draw from the prior itself; q is the mixture over
        whole runs, so prior over proposal is never above its inverse (a defensive mixture).
      ramp: lambda over the steps, "linear" from 0 to 1 or "constant" 1.
      ess_threshold: resample rows whose effective sample size is below this share of K, after a
        refinement.
    """

    NAME: ClassVar = "aps-smc"
    SUMMARY: ClassVar = "APS proposes, weights correct: exact as the number of particles grows"
    PAPER: ClassVar = "no paper (ours); the proposal is arXiv:2510.02291"
    SOURCES: ClassVar = {
        "paper of APS": ("num_steps", "prior_weight"),
        "code of MMaDA": ("schedule",),
        "code of Feynman-Kac steering": ("num_particles",),
        "code of SMC-DDM": ("ramp", "ess_threshold"),
        "ours": (
            "order", "num_inner_steps", "learning_rate", "num_refinements", "prior_share",
        ),
    }  # fmt: skip
    KNOB: ClassVar = Knob("num_particles", least=2)

    num_steps: int = 15
    schedule: str = "cosine"
    order: str = "random"
    num_particles: int = 4
    num_inner_steps: int = 2
    learning_rate: float = 0.5
    num_refinements: int = 1
    prior_weight: float = 0.0
    prior_share: float = 0.5
    ramp: str = "linear"
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={
                "num_steps": 1, "num_particles": 1, "num_inner_steps": 0, "num_refinements": 1,
            },
            choices={
                "schedule": sorted(SCHEDULES),
                "order": ("random", "anchored"),
                "ramp": ("linear", "constant"),
            },
            not_negative=("prior_weight",),
            shares=("prior_share", "ess_threshold"),
        )  # fmt: skip
        if self.num_refinements > self.num_steps:
            raise ValueError(
                f"num_refinements={self.num_refinements} is above num_steps={self.num_steps}; "
                "at most every step can refine"
            )

    @property
    def is_refined(self) -> np.ndarray:
        """Whether phi is refined before step i, bool [T]."""
        first = np.arange(self.num_refinements) * self.num_steps // self.num_refinements
        return np.isin(np.arange(self.num_steps), first)

    def init(self, target: Target, keys: Key) -> _State:
        """Everything masked but the known tokens; phi of that, the same for all particles."""
        estimate = starts.estimate_if(target, self.encoder_start)
        log_prior = target.log_prior(target.tokens)
        tilt, value = self._refine(target, estimate, target.tokens, log_prior)
        share = jnp.asarray(self.prior_share, jnp.float32)
        log_odds = jnp.full(value.shape, jnp.log(share) - jnp.log1p(-share))
        one = _Particles(target.tokens, log_prior, tilt, value, log_odds)
        particles = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.num_particles, *leaf.shape)), one
        )
        nothing = jnp.zeros(particles.value.shape, jnp.float32)
        return _State(particles, nothing, estimate, jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """Reveals tokens of every particle, weighs them, and resamples rows of uneven weights."""
        i = state.step
        keys_draw, keys_resample = split(fold(split(keys, 2)[0], i), 2)
        particles, log_ratio = self._reveal(target, keys_draw, state.particles, i)
        particles = self._look_ahead(target, state.estimate, particles, i + 1)
        change = self._lambda(i + 1) * particles.value
        change = log_ratio + change - self._lambda(i) * state.particles.value
        log_w = jnp.where(jnp.isfinite(change), state.log_weights + change, -jnp.inf)
        is_new = jnp.asarray(np.append(self.is_refined[1:], False))[i]
        particles, log_w = self._resample(keys_resample, particles, log_w, is_new)
        known = jnp.where(jnp.isnan(particles.value), -jnp.inf, particles.value)
        info = step_info(
            self, target, particles.tokens[0], most_likely(particles.log_prior[0]),
            loss=-jnp.max(known, axis=0),
        )  # fmt: skip
        # The refinement of `init` is told with the first step.
        num_refined = jnp.where(i == 0, 1, 0) + jnp.where(is_new, self.num_particles, 0)
        num_gradients = (self.num_inner_steps * num_refined).astype(jnp.int32)
        info = info._replace(num_inner_steps=jnp.broadcast_to(num_gradients, info.loss.shape))
        return _State(particles, log_w, state.estimate, i + 1), info

    def finish(self, target: Target, state: _State, keys: Key) -> Int[Array, "R L"]:
        """One of the particles, drawn by weight."""
        index = selection.select(split(keys, 2)[1], state.log_weights, "sample", 1.0)
        return selection.take(state.particles.tokens, index)

    def _reveal(
        self, target: Target, keys: Key, particles: _Particles, i: Array
    ) -> tuple[_Particles, Float[Array, "K R"]]:
        """Particles with more tokens, and log prior - log proposal of what was drawn."""
        left = decoding.num_left(self, i, target.is_unknown)

        def one(k: Array, particle: _Particles) -> tuple[_Particles, Array]:
            keys_draw, keys_order, keys_share = split(fold(keys, k), 3)
            log_prior = particle.log_prior
            log_phi = jax.nn.log_softmax(log_prior + particle.tilt, axis=-1)
            if self.order == "anchored":
                scores = jnp.max(log_phi, axis=-1)
            else:
                scores = remasking.random_scores(keys_order, particle.tokens.shape)
            is_kept = remasking.select_by_count(scores, particle.tokens == target.mask, left)
            # Whose tokens these are is drawn anew given those so far: only their sum counts.
            share = jax.nn.sigmoid(particle.log_odds)
            from_prior = remasking.pick(keys_share, share[:, None], jnp.ones_like(is_kept[:, :1]))
            drawn = draw_tokens(keys_draw, jnp.where(from_prior[..., None], log_prior, log_phi))
            log_p, log_q_phi = (
                jnp.sum(jnp.where(is_kept, remasking.confidence(law, drawn), 0.0), axis=-1)
                for law in (log_prior, log_phi)
            )
            log_share = jax.nn.log_sigmoid(particle.log_odds)
            log_rest = jax.nn.log_sigmoid(-particle.log_odds)
            ratio = log_p - jnp.logaddexp(log_share + log_p, log_rest + log_q_phi)
            moved = particle._replace(
                tokens=jnp.where(is_kept, drawn, particle.tokens),
                log_odds=particle.log_odds + log_p - log_q_phi,
            )
            return moved, ratio

        return jax.vmap(one)(jnp.arange(self.num_particles, dtype=jnp.int32), particles)

    def _look_ahead(
        self, target: Target, estimate: Array | None, particles: _Particles, i: Array
    ) -> _Particles:
        """The particles' prior, tilt and value before step i; their energy where i = T."""
        is_refined = np.append(self.is_refined, False)

        def finished() -> _Particles:
            return particles._replace(value=-jax.vmap(target.energy_of)(particles.tokens))

        def open_() -> _Particles:
            later = particles._replace(log_prior=jax.vmap(target.log_prior)(particles.tokens))
            if not np.any(is_refined[1:]):
                return later

            def refined() -> _Particles:
                tilt, value = jax.vmap(
                    lambda tokens, log_prior: self._refine(target, estimate, tokens, log_prior)
                )(later.tokens, later.log_prior)
                return later._replace(tilt=tilt, value=value)

            return jax.lax.cond(jnp.asarray(is_refined)[i], refined, lambda: later)

        return jax.lax.cond(i == self.num_steps, finished, open_)

    def _refine(
        self, target: Target, estimate: Array | None, tokens: Array, log_prior: Array
    ) -> tuple[Float[Array, "R L C"], Float[Array, " R"]]:
        """APS's inner loop: phi - log x_theta, and V, the last objective it met (0 without any)."""
        weight = or_none(self.prior_weight)
        refined = descend(
            lambda phi, _: objective.loss(target, phi, log_prior, tokens, weight),
            starts.raised(target, log_prior, estimate, self.encoder_start),
            optax.adam(self.learning_rate),
            self.num_inner_steps,
        )
        # Codes that the prior excludes stay excluded.
        tilt = jnp.where(jnp.isfinite(log_prior), refined.phi - log_prior, 0.0)
        value = -refined.loss if self.num_inner_steps else jnp.zeros_like(refined.loss)
        return tilt, value

    def _lambda(self, step: Array) -> Array:
        """Weight of V before step i; 0 at the start, where all particles are alike."""
        shares = {
            "linear": np.arange(self.num_steps + 1) / self.num_steps,
            "constant": np.arange(self.num_steps + 1) > 0,
        }
        return jnp.asarray(shares[self.ramp], jnp.float32)[step]

    def _resample(
        self, keys: Key, particles: _Particles, log_w: Array, is_due: Array
    ) -> tuple[_Particles, Array]:
        """Rows of uneven weights start again from equal ones, if resampling is due."""
        log_w = selection.log_weights(log_w, "sample", 1.0)
        is_even = selection.effective_size(log_w) >= self.ess_threshold * self.num_particles
        is_resampled = ~is_even & is_due
        own = jnp.arange(self.num_particles, dtype=jnp.int32)[:, None]
        index = jnp.where(is_resampled, selection.systematic(keys, log_w), own)
        rows = jnp.arange(log_w.shape[1], dtype=jnp.int32)
        particles = jax.tree.map(lambda leaf: leaf[index, rows], particles)
        return particles, jnp.where(is_resampled, 0.0, log_w)

    def evaluations(self) -> Evaluations:
        """Model calls per sample; the energy of every particle is one decoding."""
        num_later = self.num_particles * (self.num_refinements - 1)
        return Evaluations(
            denoiser=(1 + self.num_particles * (self.num_steps - 1)) * self.num_passes,
            decoder=self.num_particles + 1,
            decoder_gradient=self.num_inner_steps * (1 + num_later),
        )
