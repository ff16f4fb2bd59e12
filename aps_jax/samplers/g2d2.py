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
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax import schedules
from aps_jax.config import check_options
from aps_jax.samplers import decoding
from aps_jax.samplers.config import StarConfig
from aps_jax.sampling import remasking, starts
from aps_jax.sampling.draws import draw_tokens, top_p
from aps_jax.sampling.inner_loop import Refined, descend
from aps_jax.sampling.leaves import as_pytree
from aps_jax.sampling.objective import kl_term
from aps_jax.sampling.run import StepInfo, step_info
from aps_jax.sampling.target import Target, fold, most_likely, split
from aps_jax.types import Array, Key, Scalar


class _State(NamedTuple):
    tokens: Array
    phi: Array
    step: Array
    estimate: Array | None  # tokens of the smooth start, if phi begins near them


@as_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class G2D2Config(StarConfig):
    """Samples with a variational token distribution, optimised anew at every timestep.

    Departures: the norm is per image (the code has batch 1); known tokens are never masked or
    redrawn; the mask schedule reaches 0 after T steps, not T - 1. `info.loss` is the objective at
    the last inner step. The defaults are the released preset for super-resolution x4, tuned for
    1024 tokens of 4096 codes and the "norm" term; the KL is a sum over tokens.

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

    NAME: ClassVar = "g2d2"
    SUMMARY: ClassVar = "G2D2: variational logits by Gumbel-softmax, star-shaped or Markov"
    PAPER: ClassVar = "arXiv:2410.14710"
    SOURCES: ClassVar = {
        "its code, preset for super-resolution": (
            "num_steps", "num_inner_steps", "schedule", "measurement_term", "learning_rate",
            "learning_rate_span", "kl_weight", "kl_span", "kl_exact", "kl_on_unmasked", "forget",
            "gumbel_temperature", "top_p", "uniform_mass",
        ),
        "its paper": ("transition",),
    }  # fmt: skip
    STATIC_FLOATS: ClassVar = ("top_p",)  # The cut is left out where it is 1.

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

    def init(self, target: Target, keys: Key) -> _State:
        """Everything masked but the known tokens."""
        return _State(
            tokens=target.tokens,
            phi=jnp.zeros((*target.tokens.shape, target.mask), jnp.float32),
            step=jnp.zeros((), jnp.int32),
            estimate=starts.estimate_if(target, self.encoder_start),
        )

    def step(self, target: Target, state: _State, keys: Key) -> tuple[_State, StepInfo]:
        """One timestep."""
        i, tokens = state.step, state.tokens
        keys_refine, keys_move = split(fold(keys, i), 2)
        log_prior = target.carried_log_prior(tokens)
        mixed = self.forget * log_prior + (1 - self.forget) * state.phi
        start = starts.raised(target, log_prior, state.estimate, self.encoder_start)
        phi = jax.nn.log_softmax(jnp.where(i == 0, start, mixed), axis=-1)
        refined = self._refine(target, keys_refine, phi, log_prior, state)
        moved = self._move(target, keys_move, refined.phi, tokens, i)
        info = step_info(
            self, target, moved, target.known(most_likely(refined.phi)),
            loss=refined.loss if self.num_inner_steps else None,
            losses=refined.losses, num_inner_steps=self.num_inner_steps,
        )  # fmt: skip
        return state._replace(tokens=moved, phi=refined.phi, step=i + 1), info

    def _refine(
        self, target: Target, keys: Key, phi: Array, log_prior: Array, state: _State
    ) -> Refined:
        """RAdam on phi, which stays normalised."""
        rate = _decades(self.learning_rate, self.learning_rate_span, self.num_steps, state.step)
        kl_weight = _decades(self.kl_weight, self.kl_span, self.num_steps, state.step)
        is_weighed = (state.tokens == target.mask) | self.kl_on_unmasked

        def losses_of(phi: Array, j: Array) -> Array:
            noise = jax.vmap(lambda key: jax.random.gumbel(key, phi.shape[1:], jnp.float32))
            soft = target.expected_code((phi + noise(fold(keys, j))) / self.gumbel_temperature)
            losses = target.objective_of(target.known_codes(soft))
            kl = kl_term(phi, log_prior, is_exact=self.kl_exact)
            return losses + kl_weight * jnp.sum(jnp.where(is_weighed, kl, 0.0), axis=-1)

        return descend(
            losses_of, phi, optax.scale_by_radam(), self.num_inner_steps,
            move=lambda phi, updates, _: jax.nn.log_softmax(phi - rate * updates, axis=-1),
        )  # fmt: skip

    def _move(self, target: Target, keys: Key, phi: Array, tokens: Array, i: Array) -> Array:
        keys_draw, keys_mask = split(keys, 2)
        if self.transition == "markov":
            gammas = schedules.masked_share(self.schedule, self.num_steps)
            gamma_t, gamma_s = (jnp.asarray(gammas, jnp.float32)[i + shift] for shift in (0, 1))
            log_probs = markov_log_probs(
                phi, tokens, gamma_t, gamma_s, uniform_mass=self.uniform_mass
            )
            moved = draw_tokens(keys_draw, log_probs)
            last = draw_tokens(keys_draw, phi)
            return target.known(jnp.where(i == self.num_steps - 1, last, moved))
        clean = target.known(draw_tokens(keys_draw, top_p(phi, self.top_p)))
        return star_transition(self, target, keys_mask, clean, i)


def _decades(middle: Scalar, span: Scalar, num_steps: int, step: Array) -> Array:
    """A number that falls by `span` decades over the run, at one timestep."""
    exponents = jnp.asarray(np.linspace(0.5, -0.5, num_steps), jnp.float32)
    return middle * 10 ** (span * exponents[step])


def star_transition(config: StarConfig, target: Target, keys: Key, clean: Array, i: Array) -> Array:
    """Masks a scheduled share of the tokens `clean` [R, L], anywhere but known ones."""
    scores = remasking.random_scores(keys, clean.shape)
    scores = jnp.where(target.is_unknown, scores, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    num_left = decoding.num_left(config, i, target.is_unknown)
    is_masked = target.is_unknown & (rank.astype(jnp.int32) < num_left[:, None])
    return jnp.where(is_masked, target.mask, clean)


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
            jnp.full((*tokens.shape, 1), gamma_s / gamma_t),
        ],
        axis=-1,
    )
    is_own = tokens[..., None] == jnp.arange(num_codes, dtype=jnp.int32)
    ratio = probs / (keep_t * is_own + noise)
    from_code = (keep * is_own + blur) * (
        keep_s * ratio + noise * jnp.sum(ratio, axis=-1, keepdims=True)
    )
    from_code = jnp.concatenate([from_code, jnp.zeros((*tokens.shape, 1), jnp.float32)], axis=-1)
    is_masked = (tokens == num_codes)[..., None]
    return jnp.log(jnp.where(is_masked, from_mask, from_code))
