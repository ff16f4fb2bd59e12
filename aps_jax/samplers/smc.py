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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers import decoding, selection
from aps_jax.samplers.config import DecodingConfig
from aps_jax.samplers.problem import (
    Problem,
    energy,
    finish,
    fold,
    most_likely,
    pose,
    prior_log_probs,
    split,
    step_info,
)
from aps_jax.sampling.draws import draw_tokens
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMCConfig(DecodingConfig):
    """Options of `smc_sample`. K = 4 particles and 4 fills are Feynman-Kac steering's.

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

    def evaluations(self) -> Evaluations:
        """Model calls per sample; a particle's call of the prior serves fill and next step."""
        num_moves = self.num_steps * self.num_particles
        num_fills = self.num_fills if self.fill == "sample" else 1
        return Evaluations(
            denoiser=(1 + num_moves) * self.num_passes,
            decoder=num_moves * num_fills + 1,
            decoder_gradient=0,
        )


class _Particles(NamedTuple):
    """Leaves [K, R, ...]."""

    state: decoding.Decoding
    log_probs: Array
    value: Array


def smc_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: SMCConfig = SMCConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Weighted particles; systematic resampling, never across samples or images.

    Values are those of the state after the step (steering's code looks at the one before).

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; `info.loss` is the least of the particles' -V.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)
    num_particles, num_steps = config.num_particles, config.num_steps
    keys_loop, keys_output = split(problem.keys, 2)
    lambdas = np.full(num_steps + 1, config.reward_weight)
    if config.ramp == "linear":
        lambdas = config.reward_weight * np.arange(num_steps + 1) / num_steps
    # All particles start alike, so what they are worth at the start cancels.
    lambdas = jnp.asarray(np.append(0.0, lambdas[1:]), jnp.float32)

    def move(keys: Key, particles: _Particles, i: Array) -> _Particles:
        def one(j: Array, particle: _Particles) -> _Particles:
            keys_move, keys_fill = split(fold(keys, j), 2)
            state = decoding.reveal(problem, keys_move, particle.log_probs, particle.state, i)
            log_probs = prior_log_probs(problem, state.tokens)
            return _Particles(state, log_probs, _value(problem, keys_fill, log_probs))

        return jax.vmap(one)(jnp.arange(num_particles, dtype=jnp.int32), particles)

    def step(
        carry: tuple[_Particles, Array], i: Array
    ) -> tuple[tuple[_Particles, Array], StepInfo]:
        before, log_w = carry
        keys_move, keys_resample = split(fold(keys_loop, i), 2)
        particles = move(keys_move, before, i)
        if config.weights == "absolute":
            change = lambdas[i + 1] * particles.value - lambdas[i] * before.value
            log_w = jnp.where(jnp.isfinite(change), log_w + change, -jnp.inf)
            is_even = _effective_size(log_w) >= config.ess_threshold * num_particles
            is_due = (i + 1) % config.resample_interval == 0
            is_resampled = is_due & ~is_even & (i < num_steps - 1)
        else:
            change = particles.value - before.value
            log_w = selection.log_weights(change, "standardized", config.temperature)
            is_resampled = jnp.broadcast_to(i < num_steps - 1, log_w.shape[1:])
        index = jnp.where(
            is_resampled,
            systematic(keys_resample, log_w),
            jnp.arange(num_particles, dtype=jnp.int32)[:, None],
        )
        rows = jnp.arange(log_w.shape[1], dtype=jnp.int32)
        particles = jax.tree.map(lambda leaf: leaf[index, rows], particles)
        log_w = jnp.where(is_resampled, 0.0, log_w)
        loss = -jnp.max(jnp.where(jnp.isnan(particles.value), -jnp.inf, particles.value), axis=0)
        # Masked tokens of the first particle stand for all: the schedule is the same.
        return (particles, log_w), step_info(problem, particles.state.tokens[0], loss)

    def repeated(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (num_particles, *leaf.shape))

    rows = problem.tokens.shape[0]
    start = _Particles(
        state=jax.tree.map(repeated, decoding.start(problem.tokens)),
        log_probs=repeated(prior_log_probs(problem, problem.tokens)),
        value=jnp.zeros((num_particles, rows), jnp.float32),
    )
    carry = (start, jnp.zeros((num_particles, rows), jnp.float32))
    (particles, log_w), info = jax.lax.scan(step, carry, jnp.arange(num_steps, dtype=jnp.int32))
    if config.output == "best":
        index = selection.select(keys_output, particles.value, "argmax", 1.0)
    else:
        index = selection.select(keys_output, log_w, "sample", 1.0)
    return finish(problem, selection.take(particles.state.tokens, index), info)


def _value(problem: Problem, keys: Key, log_probs: Array) -> Array:
    """V [R]: -E of the fill, or the log of the mean likelihood over several."""
    config = problem.config
    assert isinstance(config, SMCConfig)
    if config.fill == "mode":
        return -energy(problem, most_likely(log_probs))
    values = jax.vmap(lambda n: -energy(problem, draw_tokens(fold(keys, n), log_probs)))(
        jnp.arange(config.num_fills, dtype=jnp.int32)
    )
    return jax.nn.logsumexp(values, axis=0) - jnp.log(config.num_fills)


def _effective_size(log_w: Array) -> Array:
    """(sum w)^2 / sum w^2 per row, of log-weights [K, R]."""
    w = jax.nn.softmax(log_w, axis=0)
    return 1 / jnp.sum(w**2, axis=0)


def systematic(keys: Key, log_w: Array) -> Array:
    """Ancestors int32 [K, R] of K particles per row, each floor or ceil of K w times.

    Args:
      keys: one per row [R].
      log_w: unnormalised log-weights [K, R].
    """
    num_particles = log_w.shape[0]
    edges = jnp.cumsum(jax.nn.softmax(log_w, axis=0), axis=0)
    offset = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    points = (jnp.arange(num_particles, dtype=jnp.float32)[:, None] + offset[None]) / num_particles
    index = jax.vmap(jnp.searchsorted, (1, 1), 1)(edges, points)
    # Rounding can leave the last edge short of the last point.
    return jnp.minimum(index, num_particles - 1)
