"""Rules of which tokens become anchors, as numbers: one compiled sampler for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from aps_jax import schedules
from aps_jax.config import APSConfig
from aps_jax.sampler import make_aps
from aps_jax.sampling import remasking, starts
from aps_jax.sampling.run import run
from aps_jax.sampling.target import measurement_target
from aps_jax.types import Array, Key, Params, PyTree
from experiments.bench.settings import Number, Settings

_KINDS = ("count", "threshold", "information")


class Rule(Settings):
    """A rule as it is in the configuration.

    Attributes:
      kind: what a step fixes: so many tokens; all whose confidence is above a threshold; or so
        many that they hold a share of what the measurement says.
      schedule: of counts and shares, a name of `aps_jax.schedules`; of thresholds "cosine" (down to
        0) or "fixed".
      threshold: the first one.
      bonus: added to the log-confidence times what the measurement says of a token, in [0, 1]:
        1000 takes measured tokens first, -1000 last.
    """

    kind: Literal["count", "threshold", "information"]
    schedule: str = "cosine"
    threshold: Number = 0.0
    bonus: Number = 0.0


class Numbers(NamedTuple):
    """What a rule is to the compiled sampler.

    Attributes:
      kind: index into the kinds.
      counts: tokens that stay masked after each step [T].
      limits: thresholds [T].
      shares: of what is measured that may be fixed after each step [T].
      bonus: see `Rule`.
    """

    kind: Array
    counts: Array
    limits: Array
    shares: Array
    bonus: Array


def numbers(rule: Rule, num_steps: int, num_tokens: int) -> Numbers:
    """A rule for so many steps and tokens; the last step fixes everything."""
    is_fixed = rule.schedule == "fixed"
    name = "cosine" if is_fixed else rule.schedule
    falling = np.ones(num_steps) if is_fixed else schedules.cosine_thresholds(num_steps)
    limits = rule.threshold * np.append(falling[:-1], 0.0)
    return Numbers(
        kind=jnp.int32(_KINDS.index(rule.kind)),
        counts=jnp.asarray(schedules.masked_counts(name, num_steps, num_tokens)),
        limits=jnp.asarray(limits, jnp.float32),
        shares=jnp.asarray(1 - schedules.masked_share(name, num_steps)[1:], jnp.float32),
        bonus=jnp.float32(rule.bonus),
    )


def select_by_information(
    scores: Float[Array, "B L"],
    is_masked: Bool[Array, "B L"],
    weights: Float[Array, "B L"],
    share: Array | float,
) -> Bool[Array, "B L"]:
    """Keeps the highest scores until all that is clean holds a share of the weights.

    Args:
      scores: only their order matters.
      is_masked: bool [B, L], positions still open.
      weights: what the measurement says of each token, not negative.
      share: in [0, 1]; 1 keeps everything. At least the best one is kept.
    """
    order = jnp.lexsort((-scores, is_masked), axis=-1)  # Clean ones come first.
    held = jnp.cumsum(jnp.take_along_axis(weights, order, axis=-1), axis=-1)
    total = held[:, -1:]
    is_within = jnp.where(share < 1, held <= share * total, True)
    kept = jnp.take_along_axis(is_within, jnp.argsort(order, axis=-1), axis=-1)
    best = remasking.select_by_count(scores, is_masked, jnp.iinfo(jnp.int32).max)
    return is_masked & (kept | best)


def select(
    rule: Numbers, confidence: Array, is_masked: Array, step: Array, informed: Array
) -> Array:
    """Anchors [B, L] of a step: `informed` [B, L] is what the measurement says of each token."""
    scores = confidence + rule.bonus * informed
    kinds = [
        remasking.select_by_count(scores, is_masked, rule.counts[step]),
        remasking.select_by_threshold(confidence, is_masked, rule.limits[step]),
        select_by_information(scores, is_masked, informed, rule.shares[step]),
    ]
    return jnp.stack(kinds)[rule.kind]


@jax.jit(static_argnames="config")
def sample(params: Params, y: PyTree, keys: Key, rule: Numbers, *, config: APSConfig) -> Array:
    """Images [B, H, W, 3] of APS with this rule."""
    target = measurement_target(params, y, config=config)
    informed = starts.token_sensitivity(target, config.sensitivity_floor)

    def choose(confidence: Array, is_masked: Array, step: Array) -> Array:
        return select(rule, confidence, is_masked, step, informed)

    return run(dataclasses.replace(make_aps(config), select=choose), target, keys).images


class Shadow(NamedTuple):
    """What would have been fixed, by step, where nothing is [T, B, L].

    Attributes:
      proposals: tokens.
      is_open: not an anchor yet.
      anchors: chosen by the tilted confidence.
      standard: chosen by the prior's, as many, among the same.
    """

    proposals: Array
    is_open: Array
    anchors: Array
    standard: Array


@jax.jit(static_argnames="config")
def shadow(params: Params, y: PyTree, keys: Key, *, config: APSConfig) -> Shadow:
    """APS that chooses anchors and tells the prior, but goes on optimising their logits.

    The prior's opinion of an anchor stays that of the step in which it was chosen, since a masked
    prior has none of a token that it sees.
    """
    target = measurement_target(params, y, config=config)
    aps = make_aps(config)

    def step(carry: Any, _: None) -> tuple[Any, Shadow]:
        state, log_prior = carry
        is_open = state.tokens == target.mask
        log_prior = jnp.where(is_open[..., None], target.log_prior(state.tokens), log_prior)
        free = state._replace(tokens=jnp.full_like(state.tokens, target.mask))
        refined = aps.refine(target, free, aps.initial_phi(target, free, log_prior), log_prior)
        x_0 = aps.propose(target, refined.phi, keys)
        tilted = remasking.confidence(jax.nn.log_softmax(refined.phi, axis=-1), x_0)
        anchors = aps.select(tilted, is_open, state.step)
        standard = aps.select(remasking.confidence(log_prior, x_0), is_open, state.step)
        tokens = jnp.where(anchors, x_0, state.tokens)
        state = state._replace(tokens=tokens, step=state.step + 1, phi=refined.phi)
        return (state, log_prior), Shadow(x_0, is_open, anchors, standard)

    start = aps.init(target, keys), jnp.zeros((*target.tokens.shape, target.mask), jnp.float32)
    return jax.lax.scan(step, start, None, length=config.num_steps)[1]


def changes(found: Shadow) -> dict[str, np.ndarray]:
    """Share of tokens by step whose last proposal is another one, each [B, T]; NaN for none."""
    proposals, is_open, anchors, standard = (np.asarray(part) for part in found)
    is_other = proposals != proposals[-1]
    groups = {"anchors": anchors, "standard": standard, "all open": is_open}
    with np.errstate(invalid="ignore"):
        return {
            name: ((is_other & chosen).sum(axis=-1) / chosen.sum(axis=-1)).T
            for name, chosen in groups.items()
        }
