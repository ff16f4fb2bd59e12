"""Sequential Monte Carlo: particles that are weighted and resampled while they are decoded.

Feynman-Kac steering (arXiv:2501.06848) and SMC for discrete diffusion (arXiv:2505.22524), with the
prior's own transitions as proposals.

for i = 1..T:
  each particle: z_s ~ p(z_s | z_t)
  V(z_s) = -E of z_s with its masks filled from the prior
  log w <- log w + lambda_s V(z_s) - lambda_t V(z_t)
  where the weights are uneven: resample
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
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, most_likely, split
from aps_jax.types import Array, Key


class _Particles(NamedTuple):
    """Leaves [K, R, ...], but for the step inside `state` [K]."""

    state: Decoding
    log_probs: Array
    value: Array


class _State(NamedTuple):
    particles: _Particles
    log_weights: Array
    step: Array

    @property
    def tokens(self) -> Array:
        """Those of the first particle, which stand for all: the schedule is the same."""
        return self.particles.state.tokens[0]


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SMCConfig(DecodingConfig):
    """Weighted particles; systematic resampling, never across samples or images.

    Values are those of the state after the step (steering's code looks at the one before).
    `info.loss` is the least of the particles' -V. K = 4 particles and 4 fills are Feynman-Kac
    steering's.

    Attributes:
      num_particles: K, per sample. Particles of different samples never meet.
      weights: "absolute": the weights above. Their target is p(z) exp(-reward_weight * E(z)), which
        is the posterior for a perfect prior decoded one token at a time, as K grows.
        "standardized" (the default; arXiv abstract of GRAS, 2026): at every step weights
        exp((dV - mean dV) / (temperature * std dV)), resampled each time. It has no exact target,
        but energies at sigma 0.05 leave absolute weights with a single survivor.
      reward_weight: lambda at the end.
      ramp: "linear" from 0 to reward_weight over the steps (SMC-DDM) or "constant" (steering).
      temperature: of standardized weights.
      fill: "sample" draws `num_fills` clean tokens from the prior's product law and takes the
        log-mean-exp of -E (steering), "mode" its likeliest tokens.
      num_fills: fills per particle and step, for "sample".
      resample_interval: steps between looks at the weights; steering has 20 (of 1000), SMC-DDM 4.
      ess_threshold: resample rows whose effective sample size is below this share of K.
      output: "sample" draws one particle by weight, "best" takes the least energy (steering).
    """

    NAME: ClassVar = "smc"
    SUMMARY: ClassVar = (
        "weighted, resampled particles: Feynman-Kac steering and SMC-DDM, base proposals"
    )
    PAPER: ClassVar = "arXiv:2501.06848, arXiv:2505.22524"
    SOURCES: ClassVar = {
        "code of Feynman-Kac steering": ("num_particles", "num_fills", "fill", "reveal"),
        "code of SMC-DDM": ("num_steps", "ramp", "ess_threshold"),
        "abstract of GRAS (2026)": ("weights",),
        "ours": ("schedule", "reward_weight", "temperature", "resample_interval", "output"),
    }
    KNOB: ClassVar = Knob("num_particles", least=2, scales_steps=True)

    num_particles: int = 4
    schedule: str = "linear"
    reveal: str = "ancestral"
    num_steps: int = 48
    weights: str = "standardized"
    reward_weight: float = 1.0
    ramp: str = "linear"
    temperature: float = 1.0
    fill: str = "sample"
    num_fills: int = 4
    resample_interval: int = 1
    ess_threshold: float = 0.5
    output: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_particles": 1, "num_fills": 1, "resample_interval": 1},
            choices={
                "weights": ("absolute", "standardized"),
                "ramp": ("linear", "constant"),
                "fill": ("sample", "mode"),
                "output": ("sample", "best"),
            },
            positive=("reward_weight", "temperature"),
            shares=("ess_threshold",),
        )

    def init(self, target: Target, keys: Key) -> _State:
        """All particles alike, everything masked but the known tokens."""

        def repeated(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf, (self.num_particles, *leaf.shape))

        start = decoding.start(target.tokens)
        nothing = jnp.zeros((self.num_particles, target.tokens.shape[0]), jnp.float32)
        log_probs = target.carried_log_prior(target.tokens)
        particles = _Particles(jax.tree.map(repeated, start), repeated(log_probs), nothing)
        return _State(particles, nothing, jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """Moves and weighs the particles, and resamples rows whose weights are uneven."""
        i, before = state.step, state.particles
        keys_move, keys_resample = split(fold(split(keys, 2)[0], i), 2)
        particles = self._move(target, keys_move, before, i)
        if self.weights == "absolute":
            change = self._lambda(i + 1) * particles.value - self._lambda(i) * before.value
            log_w = jnp.where(jnp.isfinite(change), state.log_weights + change, -jnp.inf)
            is_even = selection.effective_size(log_w) >= self.ess_threshold * self.num_particles
            is_due = (i + 1) % self.resample_interval == 0
            is_resampled = is_due & ~is_even & (i < self.num_steps - 1)
        else:
            change = particles.value - before.value
            log_w = selection.log_weights(change, "standardized", self.temperature)
            is_resampled = jnp.broadcast_to(i < self.num_steps - 1, log_w.shape[1:])
        ancestors = selection.systematic(keys_resample, log_w)
        own = jnp.arange(self.num_particles, dtype=jnp.int32)[:, None]
        index = jnp.where(is_resampled, ancestors, own)
        rows = jnp.arange(log_w.shape[1], dtype=jnp.int32)
        particles = jax.tree.map(
            lambda leaf: leaf[index, rows] if leaf.ndim > 1 else leaf, particles
        )
        log_w = jnp.where(is_resampled, 0.0, log_w)
        loss = -jnp.max(jnp.where(jnp.isnan(particles.value), -jnp.inf, particles.value), axis=0)
        after = _State(particles, log_w, i + 1)
        estimate = decoding.estimate(particles.log_probs[0], after.tokens)
        return after, step_info(self, target, after.tokens, estimate, loss=loss)

    def finish(self, target: Target, state: _State, keys: Key) -> Array:
        """One of the particles, as `output` says."""
        particles, keys_output = state.particles, split(keys, 2)[1]
        if self.output == "best":
            index = selection.select(keys_output, particles.value, "argmax", 1.0)
        else:
            index = selection.select(keys_output, state.log_weights, "sample", 1.0)
        return selection.take(particles.state.tokens, index)

    def _lambda(self, step: Array) -> Array:
        """Weight of the reward before step i; 0 at the start, where all particles are alike."""
        share = step / self.num_steps if self.ramp == "linear" else 1.0
        return jnp.where(step == 0, 0.0, self.reward_weight * share).astype(jnp.float32)

    def _move(self, target: Target, keys: Key, particles: _Particles, i: Array) -> _Particles:
        def one(j: Array, particle: _Particles) -> _Particles:
            keys_move, keys_fill = split(fold(keys, j), 2)
            state = decoding.reveal(
                self, keys_move, particle.log_probs, particle.state, i,
                is_unknown=target.is_unknown,
            )  # fmt: skip
            log_probs = target.carried_log_prior(state.tokens)
            return _Particles(state, log_probs, self._value(target, keys_fill, log_probs))

        return jax.vmap(one)(jnp.arange(self.num_particles, dtype=jnp.int32), particles)

    def _value(self, target: Target, keys: Key, log_probs: Array) -> Array:
        """V [R]: -E of the fill, or the log of the mean likelihood over several."""
        if self.fill == "mode":
            return -target.energy_of(most_likely(log_probs))
        values = jax.vmap(lambda n: -target.energy_of(draw_tokens(fold(keys, n), log_probs)))(
            jnp.arange(self.num_fills, dtype=jnp.int32)
        )
        return jax.nn.logsumexp(values, axis=0) - jnp.log(float(self.num_fills))

    def evaluations(self) -> Evaluations:
        """Model calls per sample; a particle's call of the prior serves fill and next step."""
        num_moves = self.num_steps * self.num_particles
        num_fills = self.num_fills if self.fill == "sample" else 1
        return Evaluations(
            denoiser=(1 + num_moves) * self.num_passes,
            decoder=num_moves * num_fills + 1,
            decoder_gradient=0,
        )
