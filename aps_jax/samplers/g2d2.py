"""G2D2 (arXiv:2410.14710): gradient-guided discrete diffusion.

z <- all masked
for i = 1..T:
  phi <- the prior's log-probabilities at z, mixed with the phi carried over
  phi <- RAdam steps on ||A(D(gumbel_softmax(phi) C)) - y|| + kl_i KL(phi || prior)
  star:   z <- a fresh draw from phi at every position; then mask a scheduled number, anywhere
  Markov: z <- the reverse transition of mask-and-uniform diffusion, averaged over phi
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.config import check_options
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers.config import StarConfig
from aps_jax.samplers.decoding import keep_and_lose, num_left
from aps_jax.samplers.problem import (
    Problem,
    encoder_bonus,
    finish,
    fold,
    measurement_term,
    pose,
    prior_log_probs,
    split,
    step_info,
    with_known_codes,
    with_known_tokens,
)
from aps_jax.sampling import remasking
from aps_jax.sampling import schedules as schedule
from aps_jax.sampling.draws import draw_tokens, top_p
from aps_jax.sampling.likelihood import expected_code
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class G2D2Config(StarConfig):
    """Options of `g2d2_sample`; the defaults are the released preset for super-resolution x4.

    They were tuned for 1024 tokens of 4096 codes and the "norm" term; the KL is a sum over tokens.

    Attributes:
      learning_rate: at the middle of the run (15 for deblurring).
      learning_rate_span: decades that it falls by over the run (1 for deblurring).
      kl_weight: at the middle of the run.
      kl_span: decades that it falls by over the run.
      kl_exact: normalise phi inside the KL. The released code does not, which adds softmax(phi) to
        the gradient and flattens phi.
      kl_on_unmasked: keep the KL at clean tokens, where the prior is one-hot.
      forget: gamma, weight of the new prior against the phi carried over, in [0, 1].
      gumbel_temperature: of the relaxed sample that is decoded; soft, not straight-through.
      transition: "star" (the paper) or "markov" (the released presets). Markov hardly revises a
        token once it is clean.
      top_p: share of phi's mass that "star" draws from.
      uniform_mass: share of uniform noise of "markov".
    """

    measurement_term: str = "norm"
    learning_rate: float = 10.0
    learning_rate_span: float = 2.0
    kl_weight: float = 3e-4
    kl_span: float = 2.0
    kl_exact: bool = False
    kl_on_unmasked: bool = True
    forget: float = 0.3
    gumbel_temperature: float = 1.0
    transition: str = "star"
    top_p: float = 0.95
    uniform_mass: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            choices={"transition": ("star", "markov")},
            not_negative=("learning_rate_span", "kl_weight", "kl_span"),
            positive=("gumbel_temperature", "uniform_mass", "top_p"),
            shares=("forget", "top_p", "uniform_mass"),
        )
        if self.remdm != "none" and self.transition != "star":
            raise ValueError("remdm masks clean tokens again, as transition='star' can; choose it")


def g2d2_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: G2D2Config = G2D2Config(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Samples with a variational token distribution, optimised anew at every timestep.

    Departures: the norm is per image (the code has batch 1); known tokens are never masked or
    redrawn; the mask schedule reaches 0 after T steps, not T - 1.

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
    rates = _decades(config.learning_rate, config.learning_rate_span, config.num_steps)
    bonus = encoder_bonus(problem)
    kl_weights = _decades(config.kl_weight, config.kl_span, config.num_steps)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], StepInfo]:
        tokens, carried = carry
        keys_refine, keys_move = split(fold(problem.keys, i), 2)
        log_prior = prior_log_probs(problem, tokens)
        mixed = config.forget * log_prior + (1 - config.forget) * carried
        phi = jax.nn.log_softmax(jnp.where(i == 0, log_prior + bonus, mixed), axis=-1)
        phi, loss = _refine(problem, keys_refine, phi, log_prior, tokens, rates[i], kl_weights[i])
        tokens = _move(problem, keys_move, phi, tokens, i)
        return (tokens, phi), step_info(problem, tokens, loss)

    start = (problem.tokens, jnp.zeros((*problem.tokens.shape, problem.mask), jnp.float32))
    (tokens, _), info = jax.lax.scan(step, start, jnp.arange(config.num_steps, dtype=jnp.int32))
    return finish(problem, tokens, info)


def _decades(middle: float, span: float, num_steps: int) -> Array:
    return jnp.asarray(middle * 10 ** np.linspace(span / 2, -span / 2, num_steps), jnp.float32)


def kl_term(phi: Array, log_prior: Array, *, is_exact: bool) -> Array:
    """sum_k softmax(phi)_k (phi_k - log_prior_k) per token [R, L]; phi normalised if `is_exact`."""
    inside = jax.nn.log_softmax(phi, axis=-1) if is_exact else phi
    return jnp.sum(jax.nn.softmax(phi, axis=-1) * (inside - log_prior), axis=-1)


def _refine(
    problem: Problem,
    keys: Key,
    phi: Array,
    log_prior: Array,
    tokens: Array,
    rate: Array,
    kl_weight: Array,
) -> tuple[Array, Array | None]:
    """RAdam on phi; also the last objective [R]."""
    config = problem.config
    assert isinstance(config, G2D2Config)
    if config.num_inner_steps == 0:
        return phi, None
    optimizer = lenient(optax.scale_by_radam())
    is_weighed = (tokens == problem.mask) | config.kl_on_unmasked

    def total(phi: Array, gumbel: Array) -> tuple[Array, Array]:
        soft = expected_code(problem.params.codec, (phi + gumbel) / config.gumbel_temperature)
        losses = measurement_term(problem, with_known_codes(problem, soft))
        kl = kl_term(phi, log_prior, is_exact=config.kl_exact)
        losses = losses + kl_weight * jnp.sum(jnp.where(is_weighed, kl, 0.0), axis=-1)
        return jnp.sum(losses), losses

    def step(carry: tuple[Array, PyTree], j: Array) -> tuple[tuple[Array, PyTree], Array]:
        phi, opt_state = carry
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, phi.shape[1:], jnp.float32))(
            fold(keys, j)
        )
        grads, losses = jax.grad(total, has_aux=True)(phi, gumbel)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (jax.nn.log_softmax(phi - rate * updates, axis=-1), opt_state), losses

    inner_steps = jnp.arange(config.num_inner_steps, dtype=jnp.int32)
    (phi, _), losses = jax.lax.scan(step, (phi, optimizer.init(phi)), inner_steps)
    return phi, losses[-1]


def _move(problem: Problem, keys: Key, phi: Array, tokens: Array, i: Array) -> Array:
    config = problem.config
    assert isinstance(config, G2D2Config)
    keys_draw, keys_mask = split(keys, 2)
    if config.transition == "markov":
        gammas = schedule.masked_share(config.schedule, config.num_steps)
        gamma_t, gamma_s = (jnp.asarray(gammas, jnp.float32)[i + shift] for shift in (0, 1))
        moved = draw_tokens(
            keys_draw,
            markov_log_probs(phi, tokens, gamma_t, gamma_s, uniform_mass=config.uniform_mass),
        )
        last = draw_tokens(keys_draw, phi)
        return with_known_tokens(problem, jnp.where(i == config.num_steps - 1, last, moved))
    clean = with_known_tokens(problem, draw_tokens(keys_draw, top_p(phi, config.top_p)))
    return star_transition(problem, keys_mask, tokens, clean, i)


def star_transition(problem: Problem, keys: Key, tokens: Array, clean: Array, i: Array) -> Array:
    """Masks a scheduled share of the tokens `clean` [R, L], anywhere but known ones.

    With `config.remdm` only masked `tokens` [R, L] take their place in `clean`; the others stay, or
    are masked again by ReMDM's rule.
    """
    config = problem.config
    assert isinstance(config, StarConfig)
    scores = remasking.gumbel_scores(keys, jnp.zeros(clean.shape, jnp.float32), 1.0)
    if config.remdm != "none":
        return keep_and_lose(problem, fold(keys, 1), tokens, clean, scores, i)
    scores = jnp.where(problem.is_unknown, scores, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    is_masked = problem.is_unknown & (rank < num_left(problem, i)[:, None])
    return jnp.where(is_masked, problem.mask, clean)


def markov_log_probs(
    phi: Array, tokens: Array, gamma_t: Array, gamma_s: Array, *, uniform_mass: float
) -> Array:
    """Log sum_x q(z_s | z_t, x) phi(x) of VQ-Diffusion's mask-and-uniform kernel, [R, L, K + 1].

    At level gamma a token is masked with probability gamma, uniform with `uniform_mass`, else x.

    Source: arXiv:2111.14822, equations 7, 8 and 11.

    Args:
      phi: log-probabilities of the clean token [R, L, K].
      tokens: z_t, int [R, L] in [0, K].
      gamma_t: mask level of z_t.
      gamma_s: mask level of z_s, below gamma_t.
      uniform_mass: share of uniform noise at every level.
    """
    num_codes = phi.shape[-1]
    # VQ-Diffusion's own bounds keep every ratio below finite.
    least = 9e-6
    gamma_t, gamma_s = (jnp.clip(g, least, 1 - least - uniform_mass) for g in (gamma_t, gamma_s))
    keep_t, keep_s = 1 - gamma_t - uniform_mass, 1 - gamma_s - uniform_mass
    noise = uniform_mass / num_codes
    keep = keep_t / keep_s
    to_mask = (gamma_t - gamma_s) / (1 - gamma_s)
    # 1 - keep - to_mask without cancellation: the mass that one step makes uniform.
    blur = uniform_mass * (keep_s - keep_t) / (keep_s * (keep_s + uniform_mass)) / num_codes

    probs = jnp.exp(phi)
    from_mask = jnp.concatenate(
        [
            to_mask / gamma_t * (noise + keep_s * probs),
            jnp.full((*tokens.shape, 1), gamma_s / gamma_t, jnp.float32),
        ],
        axis=-1,
    )
    is_own = tokens[..., None] == jnp.arange(num_codes, dtype=jnp.int32)
    own = is_own.astype(jnp.float32)
    ratio = probs / (keep_t * own + noise)
    from_code = (keep * own + blur) * (
        keep_s * ratio + noise * jnp.sum(ratio, axis=-1, keepdims=True)
    )
    from_code = jnp.concatenate([from_code, jnp.zeros((*tokens.shape, 1), jnp.float32)], axis=-1)
    is_masked = (tokens == num_codes)[..., None]
    return jnp.log(jnp.where(is_masked, from_mask, from_code))
