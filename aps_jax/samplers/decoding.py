"""One step of masked decoding: propose tokens, keep some; the transition of most samplers here.

Sources: MaskGIT (arXiv:2202.04200) for "confidence", MDLM (arXiv:2406.07524) for "ancestral",
ReMDM (arXiv:2503.00307) for remasking.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.samplers.config import DecodingConfig, RemaskingConfig
from aps_jax.samplers.problem import Field, fold, prior_log_probs, split
from aps_jax.sampling import remasking
from aps_jax.sampling import schedules as schedule
from aps_jax.sampling.draws import draw_tokens
from aps_jax.types import Array, Key


class Decoding(NamedTuple):
    """Tokens on their way from masked to clean.

    Attributes:
      tokens: int32 [R, L], K for the mask.
      confidence: log-probability [R, L] that each clean token had when it was drawn.
    """

    tokens: Array
    confidence: Array


def start(tokens: Array) -> Decoding:
    """Before the first step; clean tokens count as certain."""
    return Decoding(tokens, jnp.zeros(tokens.shape, jnp.float32))


def reveal(field: Field, keys: Key, log_probs: Array, state: Decoding, step: Array) -> Decoding:
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
      field: what is being sampled.
      keys: one per row [R].
      log_probs: the prior's [R, L, K] for these tokens.
      state: tokens so far.
      step: index i in [0, T).
    """
    config = field.config
    assert isinstance(config, DecodingConfig)
    keys_draw, keys_keep, keys_mask = split(keys, 3)
    is_masked = state.tokens == field.mask
    proposal = draw_tokens(keys_draw, log_probs)
    confidence = remasking.confidence(log_probs, proposal)
    gamma_t, gamma_s = _gammas(field)[step], _gammas(field)[step + 1]

    if config.reveal in ("confidence", "random"):
        if config.reveal == "random":
            scores = remasking.gumbel_scores(keys_keep, jnp.zeros(proposal.shape, jnp.float32), 1.0)
        else:
            temperature = config.gumbel_temperature * (1 - (step + 1) / config.num_steps)
            scores = remasking.gumbel_scores(keys_keep, confidence, temperature)
        is_kept = remasking.select_by_count(scores, is_masked, num_left(field, step))
    else:
        remask = jnp.zeros(proposal.shape, jnp.float32)
        if config.reveal != "ancestral":
            remask = _remask_probability(field, state, gamma_t, gamma_s)
            remask = jnp.where(field.is_unknown, remask, 0.0)
        # At masked positions `remask` is the s of their reveal probability.
        reveal_probability = (gamma_t - gamma_s + remask * (1 - gamma_t)) / gamma_t
        is_kept = remasking.pick(keys_keep, reveal_probability, is_masked)
        is_lost = remasking.pick(keys_mask, remask, ~is_masked)
        state = state._replace(tokens=jnp.where(is_lost, field.mask, state.tokens))
    return Decoding(
        tokens=jnp.where(is_kept, proposal, state.tokens),
        confidence=jnp.where(is_kept, confidence, state.confidence),
    )


def _remask_probability(field: Field, state: Decoding, gamma_t: Array, gamma_s: Array) -> Array:
    config = field.config
    assert isinstance(config, DecodingConfig)
    rule = config.reveal.removeprefix("remdm-")
    chance = remasking.remdm_chance(rule, config.remask_strength, gamma_t, gamma_s)
    if rule != "conf":
        return jnp.full(state.tokens.shape, chance, jnp.float32)
    is_open = (state.tokens != field.mask) & field.is_unknown
    doubt = jax.nn.softmax(jnp.where(is_open, -jnp.exp(state.confidence), -jnp.inf), axis=-1)
    return jnp.where(is_open, chance * doubt, 0.0)


def keep_and_lose(
    field: Field,
    keys: Key,
    tokens: Array,
    proposal: Array,
    scores: Array,
    step: Array,
) -> Array:
    """A step by counts of samplers with `config.remdm`; at the end nothing is masked.

    Args:
      field: what is being sampled; its configuration has num_steps and schedule.
      keys: one per row [R].
      tokens: int32 [R, L] before the step.
      proposal: int32 [R, L], what masked tokens become.
      scores: [R, L], the highest of masked tokens are kept.
      step: index i in [0, T).
    """
    assert isinstance(field.config, RemaskingConfig)
    return remasking.keep_and_lose(
        tokens, proposal, scores, num_left(field, step),
        mask=field.mask, chance=remasking.scheduled_chance(field.config, step),
        is_open=field.is_unknown, keys=keys,
    )  # fmt: skip


def num_left(field: Field, step: Array) -> Array:
    """Tokens that are masked after a step, of those unknown at the start; int32 [R]."""
    num_unknown = jnp.sum(field.is_unknown, axis=-1, dtype=jnp.float32)
    return jnp.floor(num_unknown * _gammas(field)[step + 1] + 1e-3).astype(jnp.int32)


def _gammas(field: Field) -> Array:
    shares = schedule.masked_share(field.config.schedule, field.config.num_steps)
    return jnp.asarray(shares, jnp.float32)


def decode_step(field: Field, keys: Key, state: Decoding, step: Array) -> Decoding:
    """One call of the prior and one transition."""
    keys = fold(keys, step)
    return reveal(field, keys, prior_log_probs(field, state.tokens), state, step)
