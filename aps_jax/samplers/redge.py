"""ReDGE (arXiv:2601.00781): G2D2's layout with a reparameterised diffusion as the estimator.

z <- all masked
for i = 1..T:
  phi <- the prior's log-probabilities; clean tokens stay one-hot
  phi <- Adam steps on measurement term(sample of phi) + kl_weight KL(softmax(phi) || prior),
         the sample being differentiable in phi
  z <- a draw from phi; then mask a scheduled number, anywhere
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.codec import lfq
from aps_jax.config import check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers.config import StarConfig
from aps_jax.samplers.g2d2 import kl_term, star_transition
from aps_jax.samplers.problem import (
    Problem,
    codes_of,
    encoder_bonus,
    finish,
    fold,
    measurement_term,
    pose,
    prior_log_probs,
    split,
    step_info,
)
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReDGEConfig(StarConfig):
    """Options of `redge_sample`; the defaults are the released MaskGIT demo's.

    That demo multiplies its own reward by 100 and guides with scale 3; here the measurement term
    has weight 1 and guidance is off unless asked for.

    Attributes:
      learning_rate: of Adam.
      measurement_weight: of the measurement term.
      kl_weight: of the exact KL, summed over masked tokens.
      estimator: "redge"; "gumbel", straight-through Gumbel-softmax; or "straight_through", a draw
        with the gradient of softmax(phi).
      gumbel_temperature: of "gumbel".
      num_diffusion_steps: n of "redge", the noise levels of its reverse diffusion; 3 to 9.
      first_noise: t_1 of "redge", the least noise level but 0; 0.3 to 0.9.
    """

    num_steps: int = 20
    num_inner_steps: int = 20
    learning_rate: float = 0.5
    measurement_weight: float = 1.0
    kl_weight: float = 1.0
    estimator: str = "redge"
    gumbel_temperature: float = 0.5
    num_diffusion_steps: int = 5
    first_noise: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            integers={"num_diffusion_steps": 3},
            choices={"estimator": ("redge", "gumbel", "straight_through")},
            not_negative=("measurement_weight", "kl_weight"),
            positive=("gumbel_temperature", "first_noise"),
            shares=("first_noise",),
        )


def redge_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: ReDGEConfig = ReDGEConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Star-shaped decoding guided through hard samples.

    Departure: every timestep is optimised; the released code skips one of 20.

    Args:
      params: as for `aps_sample`.
      y: as for `aps_sample`.
      key: as for `aps_sample`.
      config: options.
      known_tokens: as for `aps_sample`.

    Returns:
      As `aps_sample`; `info.loss` is the objective at the last inner step, NaN without any.

    Raises:
      ValueError: shapes do not fit together.
    """
    problem = pose(params, y, key, config=config, known_tokens=known_tokens)
    bonus = encoder_bonus(problem)

    def step(tokens: Array, i: Array) -> tuple[Array, StepInfo]:
        keys_refine, keys_draw, keys_mask = split(fold(problem.keys, i), 3)
        log_prior = prior_log_probs(problem, tokens)
        phi, loss = _refine(problem, keys_refine, log_prior + bonus, log_prior, tokens)
        # Clean tokens are not optimised, so they are drawn again as they are.
        clean = jnp.where(tokens == problem.mask, draw_tokens(keys_draw, phi), tokens)
        tokens = star_transition(problem, keys_mask, tokens, clean, i)
        return tokens, step_info(problem, tokens, loss)

    tokens, info = jax.lax.scan(step, problem.tokens, jnp.arange(config.num_steps, dtype=jnp.int32))
    return finish(problem, tokens, info)


def _refine(
    problem: Problem, keys: Key, phi: Array, log_prior: Array, tokens: Array
) -> tuple[Array, Array | None]:
    """Adam on phi; also the last objective [R]."""
    config = problem.config
    assert isinstance(config, ReDGEConfig)
    if config.num_inner_steps == 0:
        return phi, None
    optimizer = lenient(optax.adam(config.learning_rate))
    is_masked = tokens == problem.mask
    clean_codes = codes_of(problem, jnp.where(is_masked, 0, tokens))

    def total(phi: Array, keys: Key) -> tuple[Array, Array]:
        codes = sample_one_hot(config, keys, phi) @ problem.params.codec.codebook
        codes = jnp.where(is_masked[..., None], codes, clean_codes)
        kl = kl_term(phi, log_prior, is_exact=True)
        losses = config.measurement_weight * measurement_term(problem, codes)
        losses = losses + config.kl_weight * jnp.sum(jnp.where(is_masked, kl, 0.0), axis=-1)
        return jnp.sum(losses), losses

    def step(carry: tuple[Array, PyTree], j: Array) -> tuple[tuple[Array, PyTree], Array]:
        phi, opt_state = carry
        grads, losses = jax.grad(total, has_aux=True)(phi, fold(keys, j))
        updates, opt_state = optimizer.update(grads, opt_state)
        return (phi + updates, opt_state), losses

    start = (phi, optimizer.init(phi))
    (phi, _), losses = jax.lax.scan(
        step, start, jnp.arange(config.num_inner_steps, dtype=jnp.int32)
    )
    return phi, losses[-1]


def sample_one_hot(config: ReDGEConfig, keys: Key, phi: Array) -> Array:
    """One-hot draws [R, L, K] from softmax(phi), with the gradient of a soft sample."""
    keys_noise, keys_draw = split(keys, 2)
    if config.estimator == "straight_through":
        soft = jax.nn.softmax(phi, axis=-1)
    elif config.estimator == "gumbel":
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, phi.shape[1:], jnp.float32))(
            keys_noise
        )
        soft = jax.nn.softmax((phi + gumbel) / config.gumbel_temperature, axis=-1)
        hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), phi.shape[-1], dtype=jnp.float32)
        return lfq.straight_through(soft, hard)
    else:
        x = jax.vmap(lambda key: jax.random.normal(key, phi.shape[1:], jnp.float32))(keys_noise)
        soft = diffuse(
            phi,
            x,
            num_diffusion_steps=config.num_diffusion_steps,
            first_noise=config.first_noise,
        )
    log_probs = jnp.log(jax.lax.stop_gradient(soft) + jnp.finfo(jnp.float32).tiny)
    return lfq.straight_through(
        soft, jax.nn.one_hot(draw_tokens(keys_draw, log_probs), phi.shape[-1], dtype=jnp.float32)
    )


def diffuse(phi: Array, x: Array, *, num_diffusion_steps: int, first_noise: float) -> Array:
    """Deterministic reverse diffusion from normal noise to a nearly one-hot sample of softmax(phi).

    The clean variable is one-hot, x_t = alpha_t x_0 + sigma_t noise with sigma = 1 - alpha, so its
    posterior mean is softmax(phi + alpha_t x_t / sigma_t^2), exactly, without a network.

    Args:
      phi: logits [R, L, K].
      x: standard normal noise [R, L, K].
      num_diffusion_steps: n noise levels; more make the sample's law closer to softmax(phi).
      first_noise: the least level of noise but 0.

    Returns:
      The last posterior mean [R, L, K], differentiable in phi.
    """
    alphas = np.append(1.0, np.linspace(1 - first_noise, 1e-4, num_diffusion_steps - 1))
    soft = jax.nn.softmax(phi, axis=-1)
    for t in range(num_diffusion_steps - 1, 0, -1):
        alpha_t, sigma_t = float(alphas[t]), float(1 - alphas[t])
        alpha_s, sigma_s = float(alphas[t - 1]), float(1 - alphas[t - 1])
        soft = jax.nn.softmax(phi + alpha_t * x / sigma_t**2, axis=-1)
        x = alpha_s * soft + sigma_s * (x - alpha_t * soft) / sigma_t
    return soft
