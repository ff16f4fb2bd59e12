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

import jax
import jax.numpy as jnp
import optax

from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers.config import GradientConfig, RemaskingConfig
from aps_jax.samplers.decoding import keep_and_lose
from aps_jax.samplers.problem import (
    Problem,
    codes_of,
    encoder_bonus,
    energy,
    finish,
    fold,
    measurement_term,
    pose,
    prior_log_probs,
    split,
    step_info,
)
from aps_jax.sampling import remasking
from aps_jax.sampling import schedules as schedule
from aps_jax.sampling.draws import draw_tokens, top_p
from aps_jax.sampling.likelihood import expected_code
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntRGiConfig(GradientConfig, RemaskingConfig):
    """Options of `entrgi_sample`; the defaults are the released experiments', with no KL.

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
                "schedule": sorted(schedule.SCHEDULES),
            },
            positive=("temperature", "top_p"),
            shares=("top_p",),
        )

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        num_steps = self.num_trajectories * self.num_steps
        return Evaluations(
            denoiser=num_steps * self.num_passes,
            decoder=self.num_trajectories + 1,
            decoder_gradient=num_steps * self.num_inner_steps,
        )


def entrgi_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: EntRGiConfig = EntRGiConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Guided decoding whose estimator trusts hard codes where phi is uncertain.

    Departure: at least one token is revealed per step, and the last step reveals all.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; T of `info` is the number of trajectories, and `info.loss` their energies.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)
    bonus = encoder_bonus(problem)

    def run(n: Array) -> tuple[Array, StepInfo]:
        keys = fold(problem.keys, n)
        tokens = jax.lax.fori_loop(
            0,
            config.num_steps,
            lambda i, z: _step(problem, bonus, fold(keys, i), z, i),
            problem.tokens,
        )
        return tokens, step_info(problem, tokens, energy(problem, tokens))

    tokens, info = jax.lax.map(run, jnp.arange(config.num_trajectories, dtype=jnp.int32))
    best = jnp.argmin(jnp.where(jnp.isnan(info.loss), jnp.inf, info.loss), axis=0)
    return finish(problem, tokens[best, jnp.arange(tokens.shape[1], dtype=jnp.int32)], info)


def _step(problem: Problem, bonus: Array | float, keys: Key, tokens: Array, i: Array) -> Array:
    config = problem.config
    assert isinstance(config, EntRGiConfig)
    keys_refine, keys_draw = split(keys, 2)
    log_prior = prior_log_probs(problem, tokens)
    phi = _refine(problem, keys_refine, log_prior + bonus, tokens)
    proposal = draw_tokens(keys_draw, phi / config.temperature)
    if config.order == "anchor":
        scores = remasking.confidence(phi, proposal)
    else:
        scores = -normalized_entropy(log_prior)
    return keep_and_lose(problem, fold(keys_draw, 1), tokens, proposal, scores, i)


def _refine(problem: Problem, keys: Key, phi: Array, tokens: Array) -> Array:
    config = problem.config
    assert isinstance(config, EntRGiConfig)
    optimizer = lenient(optax.adam(config.learning_rate))

    def total(phi: Array, keys: Key) -> Array:
        return jnp.sum(measurement_term(problem, mixed_codes(problem, keys, phi, tokens)))

    def step(j: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        phi, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(total)(phi, fold(keys, j)), opt_state)
        return phi + updates, opt_state

    start = (phi, optimizer.init(phi))
    return jax.lax.fori_loop(0, config.num_inner_steps, step, start)[0]


def normalized_entropy(phi: Array) -> Array:
    """Entropy of softmax(phi) [R, L, K] per token over log K, in [0, 1]."""
    log_probs = jax.nn.log_softmax(phi, axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) / jnp.log(phi.shape[-1])


def mixed_codes(problem: Problem, keys: Key, phi: Array, tokens: Array) -> Array:
    """The codes e [R, L, d] of the sampler's head, at masked tokens; the others have their own."""
    config = problem.config
    assert isinstance(config, EntRGiConfig)
    is_masked = (tokens == problem.mask)[..., None]
    scaled = phi / config.temperature
    codes = expected_code(problem.params.codec, scaled)
    if config.mixing != "soft":
        hard = codes_of(problem, draw_tokens(keys, top_p(scaled, config.top_p)))
        weight = normalized_entropy(phi)[..., None] if config.mixing == "entropy" else 1.0
        codes = codes + jax.lax.stop_gradient(weight * (hard - codes))
    return jnp.where(is_masked, codes, codes_of(problem, jnp.where(is_masked[..., 0], 0, tokens)))
