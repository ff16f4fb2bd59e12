"""One step of masked decoding: propose tokens, keep some; the transition of most samplers here.

Sources: MaskGIT (arXiv:2202.04200) for "confidence", MDLM (arXiv:2406.07524) for "ancestral",
ReMDM (arXiv:2503.00307) for remasking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from aps_jax import schedules
from aps_jax.samplers.config import DecodingConfig
from aps_jax.sampling import remasking
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.target import Target, fold, most_likely, split
from aps_jax.types import Array, Key


class Scheduled(Protocol):
    """Options that say how many tokens are masked when."""

    @property
    def num_steps(self) -> int: ...  # noqa: D102

    @property
    def schedule(self) -> str: ...  # noqa: D102


class Decoding(NamedTuple):
    """Tokens on their way from masked to clean, a `sampling.run.State`.

    Attributes:
      tokens: int32 [R, L], K for the mask.
      confidence: log-probability [R, L] that each clean token had when it was drawn.
      step: steps done, int32.
    """

    tokens: Array
    confidence: Array
    step: Array


def start(tokens: Array) -> Decoding:
    """Before the first step; clean tokens count as certain."""
    return Decoding(tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.zeros((), jnp.int32))


def reveal(
    config: DecodingConfig,
    keys: Key,
    log_probs: Array,
    state: Decoding,
    step: Array,
    *,
    is_unknown: Array,
) -> Decoding:
    """The transition z_t -> z_s under `config.reveal`; after the last step nothing is masked.

    gamma_t and gamma_s are the scheduled shares of masked tokens before and after the step, and
    alpha = 1 - gamma.

    - "confidence", "random": floor(gamma_s * n) of the n tokens unknown at the start stay masked,
      those of the least log-confidence (plus Gumbel noise), or any. At least one is revealed
      (MaskGIT's code instead keeps one masked until the last step).
    - "ancestral": each masked token is revealed with probability (alpha_s - alpha_t) / gamma_t.
    - "remdm-*": a clean token is masked again with probability s, a masked one revealed with
      probability (alpha_s - (1 - s) alpha_t) / gamma_t, which keeps gamma_s right on average.
      s_max = min(1, gamma_s / alpha_t); s is min(strength, s_max) for "cap", strength * s_max for
      "rescale" and, for "conf", that times a softmax of -p over the clean tokens, p being the
      probability each was drawn with. Tokens given from the start are never masked.

    Args:
      config: the schedule and the rule.
      keys: one per row [R].
      log_probs: the prior's [R, L, K] for these tokens.
      state: tokens so far.
      step: index i in [0, T).
      is_unknown: bool [R, L], False for tokens that were given.
    """
    keys_draw, keys_keep, keys_mask = split(keys, 3)
    mask = log_probs.shape[-1]
    is_masked = state.tokens == mask
    proposal = draw_tokens(keys_draw, log_probs)
    confidence = remasking.confidence(log_probs, proposal)
    if config.reveal in _RANKED:
        scores = _RANKED[config.reveal](config, keys_keep, confidence, step)
        left = num_left(config, step, is_unknown)
        is_kept = remasking.select_by_count(scores, is_masked, left)
    else:
        gamma_t, gamma_s = _gammas(config)[step], _gammas(config)[step + 1]
        doubt = jnp.where(~is_masked & is_unknown, -jnp.exp(state.confidence), -jnp.inf)
        remask = _REMASKED[config.reveal](config, doubt, gamma_t, gamma_s)
        remask = jnp.where(is_unknown, remask, 0.0)
        # At masked positions `remask` is the s of their reveal probability.
        chance = (gamma_t - gamma_s + remask * (1 - gamma_t)) / gamma_t
        is_kept = remasking.pick(keys_keep, chance, is_masked)
        is_lost = remasking.pick(keys_mask, remask, ~is_masked)
        state = state._replace(tokens=jnp.where(is_lost, mask, state.tokens))
    return Decoding(
        tokens=jnp.where(is_kept, proposal, state.tokens),
        confidence=jnp.where(is_kept, confidence, state.confidence),
        step=state.step + 1,
    )


def _surest(config: DecodingConfig, keys: Key, confidence: Array, step: Array) -> Array:
    temperature = config.gumbel_temperature * (1 - (step + 1) / config.num_steps)
    return remasking.gumbel_scores(keys, confidence, temperature)


def _any(config: DecodingConfig, keys: Key, confidence: Array, step: Array) -> Array:
    return remasking.random_scores(keys, confidence.shape)


#: Scores [R, L] by which the rules that keep a scheduled number choose.
_RANKED: dict[str, Callable[[DecodingConfig, Key, Array, Array], Array]] = {
    "confidence": _surest,
    "random": _any,
}


def _never(config: DecodingConfig, doubt: Array, gamma_t: Array, gamma_s: Array) -> Array:
    return jnp.zeros(doubt.shape, jnp.float32)


def _alike(config: DecodingConfig, doubt: Array, gamma_t: Array, gamma_s: Array) -> Array:
    rule = config.reveal.removeprefix("remdm-")
    chance = remasking.remdm_chance(rule, config.remask_strength, gamma_t, gamma_s)
    return jnp.full(doubt.shape, chance, jnp.float32)


def _by_doubt(config: DecodingConfig, doubt: Array, gamma_t: Array, gamma_s: Array) -> Array:
    chance = remasking.remdm_chance("conf", config.remask_strength, gamma_t, gamma_s)
    return jnp.where(jnp.isneginf(doubt), 0.0, chance * jax.nn.softmax(doubt, axis=-1))


#: Probability s [R, L] that a token is masked again, of the other rules; `doubt` [R, L] is minus
#: the probability that a clean token was drawn with, -inf at masked and given ones.
_REMASKED: dict[str, Callable[[DecodingConfig, Array, Array, Array], Array]] = {
    "ancestral": _never,
    "remdm-cap": _alike,
    "remdm-rescale": _alike,
    "remdm-conf": _by_doubt,
}


def num_left(config: Scheduled, step: Array, is_unknown: Array) -> Array:
    """Tokens that are masked after a step, of those unknown at the start; int32 [R].

    Args:
      config: num_steps and schedule.
      step: index i in [0, T).
      is_unknown: bool [R, L].
    """
    num_unknown = jnp.sum(is_unknown, axis=-1, dtype=jnp.float32)
    return jnp.floor(num_unknown * _gammas(config)[step + 1] + 1e-3).astype(jnp.int32)


def _gammas(config: Scheduled) -> Array:
    shares = schedules.masked_share(config.schedule, config.num_steps)
    return jnp.asarray(shares, jnp.float32)


def decode_step(
    config: DecodingConfig, target: Target, keys: Key, state: Decoding, step: Array
) -> tuple[Decoding, Array]:
    """One call of the prior and one transition; also the likeliest clean tokens [R, L]."""
    keys = fold(keys, step)
    log_probs = target.carried_log_prior(state.tokens)
    after = reveal(config, keys, log_probs, state, step, is_unknown=target.is_unknown)
    return after, estimate(log_probs, after.tokens)


def estimate(log_probs: Array, tokens: Array) -> Array:
    """Tokens [R, L] with their masks filled by the likeliest tokens of [R, L, K]."""
    return jnp.where(tokens == log_probs.shape[-1], most_likely(log_probs), tokens)
