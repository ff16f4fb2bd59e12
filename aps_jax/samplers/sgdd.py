"""SGDD (arXiv:2503.01161) on a masked prior: split Gibbs between the prior and the measurement.

Target: exp(-E(z)) p(x) D(x, z), where D keeps each token with probability 1 - u and refills it
uniformly otherwise; as u falls to 0 it becomes the posterior.

x, z <- uniform tokens
for k = 1..K, u_k falling:
  prior:      x ~ p(x) D(x, z)       masking and unmasking some tokens of z
  likelihood: z ~ exp(-E(z)) D(x, z) Metropolis-Hastings, one token at a time

The paper's prior diffuses with uniform noise; there the first step is denoising. Here the noise is
a mask and a uniform refill, which is our adaptation.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.config import Evaluations, check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers.config import RemaskingConfig
from aps_jax.samplers.problem import (
    Problem,
    energy,
    finish,
    fold,
    pose,
    prior_log_probs,
    split,
    step_info,
    with_known_tokens,
)
from aps_jax.sampling import remasking
from aps_jax.sampling.draws import draw_tokens
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDDConfig(RemaskingConfig):
    """Options of `sgdd_sample`.

    The published latent setting is 70 x (64 denoiser calls + 5000 proposals), 350,000 decodings per
    image; the defaults are a small budget (ours).

    Attributes:
      num_steps: K.
      num_likelihood_steps: Metropolis-Hastings proposals per step, each one decoding.
      num_denoise_steps: calls of the prior that complete a fully masked x. "renoise" takes
        ceil(u_k * num_denoise_steps), "gibbs" all.
      method: "renoise" masks each token of z with probability u_k and completes the rest; not
        reversible, so biased. "gibbs" is the exact partially collapsed Gibbs sampler, if it
        completes one token per call (num_denoise_steps >= L): it masks where z differs from x, and
        elsewhere with the small probability that a refill left the token as it was. With many codes
        it mixes slowly.
      coupling: D of the likelihood step: "exact", or "code" as in the released code, which lacks a
        factor 1 / (K - 1) per changed token and is looser by `looseness`.
      looseness: alpha, multiplies the diffusion time of the "code" coupling.
      proposal: "uniform" code (published) or "bit", one bit of the token flipped (LFQ; ours).
      remdm: as of the other samplers, among the tokens that a prior step draws anew.
      first_noise: u_1.
      last_noise: u_K, reached geometrically; about 1 / L is small.
    """

    num_steps: int = 20
    num_likelihood_steps: int = 100
    num_denoise_steps: int = 16
    method: str = "renoise"
    coupling: str = "exact"
    looseness: float = 10.0
    proposal: str = "uniform"
    first_noise: float = 1.0
    last_noise: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_steps": 1, "num_likelihood_steps": 0, "num_denoise_steps": 1},
            choices={
                "method": ("renoise", "gibbs"),
                "coupling": ("exact", "code"),
                "proposal": ("uniform", "bit"),
            },
            positive=("looseness", "first_noise", "last_noise"),
            shares=("first_noise", "last_noise"),
        )

    @property
    def noises(self) -> tuple[float, ...]:
        """u_k of each step."""
        return tuple(np.geomspace(self.first_noise, self.last_noise, self.num_steps).tolist())

    @property
    def denoise_steps(self) -> tuple[int, ...]:
        """Calls of the prior at each step."""
        if self.method == "gibbs":
            return (self.num_denoise_steps,) * self.num_steps
        # The small term undoes rounding: 0.3 * 10 must not become 4.
        return tuple(max(1, math.ceil(self.num_denoise_steps * u - 1e-9)) for u in self.noises)

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return Evaluations(
            denoiser=sum(self.denoise_steps) * self.num_passes,
            decoder=self.num_steps * (1 + self.num_likelihood_steps) + 1,
            decoder_gradient=0,
        )


def sgdd_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: SGDDConfig = SGDDConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Returns z of the last likelihood step, as the released code does (the paper returns x).

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; `info.loss` is the energy of z.

    Raises:
      ValueError: shapes do not fit together, or `proposal="bit"` without a codebook of 2**d codes.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)
    if config.proposal == "bit" and problem.mask & (problem.mask - 1):
        raise ValueError(f"proposal='bit' needs 2**d codes, got {problem.mask}")
    keys_start, keys_loop = split(problem.keys, 2)

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], StepInfo]:
        x, z, loss = sgdd_step(problem, fold(keys_loop, k), *carry, k)
        return (x, z), step_info(problem, z, loss)

    def any_tokens(key: Key) -> Array:
        return jax.random.randint(key, problem.tokens.shape[1:], 0, problem.mask, jnp.int32)

    start = with_known_tokens(problem, jax.vmap(any_tokens)(keys_start))
    (_, z), info = jax.lax.scan(step, (start, start), jnp.arange(config.num_steps, dtype=jnp.int32))
    return finish(problem, z, info)


def sgdd_step(
    problem: Problem, keys: Key, x: Array, z: Array, k: Array
) -> tuple[Array, Array, Array]:
    """Prior step, then likelihood step; tokens x and z [R, L] and the energy [R] of z."""
    config = problem.config
    assert isinstance(config, SGDDConfig)
    keys_noise, keys_denoise, keys_likelihood = split(keys, 3)
    u = jnp.asarray(config.noises, jnp.float32)[k]
    num_denoise_steps = jnp.asarray(config.denoise_steps, jnp.int32)[k]

    refill = u / problem.mask
    chance = u if config.method == "renoise" else refill / (1 - u + refill)
    draws = jax.vmap(lambda key: jax.random.uniform(key, z.shape[1:], jnp.float32))(keys_noise)
    is_noised = draws < chance
    if config.method == "gibbs":
        is_noised |= z != x
    noised = jnp.where(is_noised & problem.is_unknown, problem.mask, z)
    x = complete(problem, keys_denoise, noised, num_denoise_steps)

    # Gibbs needs z to go on from where it is; the published step starts at x.
    start = z if config.method == "gibbs" else x
    z, loss = _likelihood_step(problem, keys_likelihood, x, start, log_coupling(config, u, problem))
    return x, z, loss


def log_coupling(config: SGDDConfig, u: Array, problem: Problem) -> Array:
    """Log D of a changed token minus that of a kept one, at noise u."""
    num_codes = problem.mask
    if config.coupling == "exact":
        return jnp.log(u / num_codes) - jnp.log1p(u / num_codes - u)
    changed = (1 - (1 - u) ** config.looseness) * (num_codes - 1) / num_codes
    return jnp.log(changed + 1e-5) - jnp.log1p(-changed)


def complete(problem: Problem, keys: Key, tokens: Array, num_steps: Array) -> Array:
    """Fills masks from the prior in random order, evenly over `num_steps` calls.

    One token per call, and thus exact for a perfect prior, if there are as many calls as masks.
    """
    config = problem.config
    assert isinstance(config, SGDDConfig)
    is_open = tokens == problem.mask
    num_masked = jnp.sum(is_open, axis=-1, dtype=jnp.int32)

    def step(h: Array, tokens: Array) -> Array:
        keys_draw, keys_order = split(fold(keys, h), 2)
        proposal = draw_tokens(keys_draw, prior_log_probs(problem, tokens))
        scores = remasking.gumbel_scores(keys_order, jnp.zeros(tokens.shape, jnp.float32), 1.0)
        num_left = num_masked * (num_steps - h - 1) // num_steps
        chance = None
        if config.remdm != "none":
            shares = (num_steps - h) / num_steps, (num_steps - h - 1) / num_steps
            chance = remasking.remdm_chance(config.remdm, config.remask_strength, *shares)
        return remasking.keep_and_lose(
            tokens, proposal, scores, num_left,
            mask=problem.mask, chance=chance, is_open=is_open, keys=fold(keys_order, 1),
        )  # fmt: skip

    return jax.lax.fori_loop(0, num_steps, step, tokens)


def _likelihood_step(
    problem: Problem, keys: Key, x: Array, z: Array, log_change: Array
) -> tuple[Array, Array]:
    """Metropolis-Hastings on exp(-E(z) + log_change * Hamming(x, z)), from z."""
    config = problem.config
    assert isinstance(config, SGDDConfig)
    rows, length = z.shape
    num_bits = problem.mask.bit_length() - 1

    def propose(key: Key) -> tuple[Array, Array, Array, Array]:
        position, code, bit, accept = jax.random.split(key, 4)
        return (
            jax.random.randint(position, (), 0, length, jnp.int32),
            jax.random.randint(code, (), 0, problem.mask, jnp.int32),
            jax.random.randint(bit, (), 0, num_bits, jnp.int32),
            jnp.log(jax.random.uniform(accept, (), jnp.float32)),
        )

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, loss = carry
        position, code, bit, log_uniform = jax.vmap(propose)(fold(keys, j))
        at = (jnp.arange(rows, dtype=jnp.int32), position)
        if config.proposal == "bit":
            code = z[at] ^ (1 << bit)
        proposal = z.at[at].set(code)
        proposed_loss = energy(problem, proposal)
        change = (code != x[at]).astype(jnp.float32) - (z[at] != x[at]).astype(jnp.float32)
        is_accepted = log_uniform < loss - proposed_loss + log_change * change
        is_accepted &= problem.is_unknown[at]
        z = jnp.where(is_accepted[:, None], proposal, z)
        return z, jnp.where(is_accepted, proposed_loss, loss)

    return jax.lax.fori_loop(0, config.num_likelihood_steps, step, (z, energy(problem, z)))
