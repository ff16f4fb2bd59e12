"""Anchored Posterior Sampling (arXiv:2510.02291, Algorithm 1).

z <- all masked
for i = 1..T:
  x_theta <- denoiser(z)
  phi     <- log x_theta, then M steps of Adam on N(y, A(D(quantized expectation of phi)))
  x_0     <- proposal from phi
  anchors <- the proposals that the tilted x_phi is surest of; the rest is masked again
image <- D(code of z)

`APS.step` is one timestep, whose parts `make_aps` chooses before anything is traced; `aps_sample`
builds the target of a measurement and runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from aps_jax import schedules
from aps_jax.codec.expectation import quantized_expectation
from aps_jax.config import APSConfig, Evaluations
from aps_jax.sampling import objective, remasking, starts
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.inner_loop import Refined, descend
from aps_jax.sampling.leaves import as_pytree, is_absent, or_none
from aps_jax.sampling.run import SampleResult, StepInfo, collect, run, step_info
from aps_jax.sampling.target import Target, fold, measurement_target, most_likely, split
from aps_jax.types import Array, Key, Params, PyTree

as_pytree(APSConfig)


class APSState(NamedTuple):
    """Carry of the outer loop: only what the next timestep reads.

    Attributes:
      tokens: z, int32 [R, L]; the value K is the mask.
      step: timesteps done, int32.
      phi: the last timestep's test-time logits [R, L, K], if the next one starts from them.
      sensitivity: how much the measurement says about each token [R, L], if updates are scaled.
      estimate: tokens [R, L] of a smooth image that fits, if phi starts near them.
    """

    tokens: Int[Array, "R L"]
    step: Int[Array, ""]
    phi: Float[Array, "R L K"] | None
    sensitivity: Float[Array, "R L"] | None
    estimate: Int[Array, "R L"] | None


def aps_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: APSConfig = APSConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Samples images from the posterior of the measurement; pure, so jit it.

    Args:
      params: prior, codec, operator (random state drawn) and, for a perceptual term, LPIPS.
      y: measurement of B images, as from `measure`.
      key: one typed key, folded with the image index, or one key per image [B]. Image i depends on
        its own key and measurement only, not on the rest of the batch.
      config: options; static for `jax.jit`, or an argument like the others, whose numbers may then
        change without another compilation.
      known_tokens: int32 [B, L], tokens given from the start and never changed; K where unknown.

    Returns:
      Samples, with per-timestep diagnostics. A run that met a non-finite loss says so in
      `info.is_finite`.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together.
    """
    target = measurement_target(params, y, config=config, known_tokens=known_tokens)
    return run(make_aps(config), target, key)


def aps_init(
    params: Params, y: PyTree, *, config: APSConfig, known_tokens: Array | None = None
) -> APSState:
    """The state before the first timestep, for a host loop of your own over `aps_step`.

    Arguments and errors are those of `aps_sample`.
    """
    target = measurement_target(params, y, config=config, known_tokens=known_tokens)
    # Nothing of APS is random before its first timestep: any key will do.
    return make_aps(config).init(target, target.keys(jax.random.key(0)))


def aps_step(
    params: Params, y: PyTree, state: APSState, key: Key, *, config: APSConfig
) -> tuple[APSState, StepInfo]:
    """One timestep, the body of the scan of `aps_sample`; infos are per row [S * B].

    What depends on y alone, such as its LPIPS features, is computed again at every call. A loop
    that is to pay for it once builds `measurement_target` itself and calls `make_aps(config).step`.
    """
    target = measurement_target(params, y, config=config)
    return make_aps(config).step(target, state, target.keys(key))


def aps_finish(
    params: Params, y: PyTree, state: APSState, info: StepInfo, *, config: APSConfig
) -> SampleResult:
    """Decodes the last state; `info` is the stack of all steps' infos, with leading axis T."""
    return collect(measurement_target(params, y, config=config), state.tokens, info)


@dataclasses.dataclass(frozen=True)
class APS:
    """Algorithm 1 as a `sampling.run.Sampler`; `make_aps` chooses the parts.

    Attributes:
      config: the options.
      initial_phi: `(target, state, log x_theta) -> phi`.
      prior_weight: `step -> weight` of the prior term; None leaves the term out.
      move: `(phi, Adam's updates, state, j) -> phi` at inner step j.
      propose: `(target, phi, keys) -> x_0`, clean tokens.
      confidence: `(log x_phi, log x_theta, x_0, keys) -> [R, L]`, highest where surest.
      select: `(confidence, is masked [R, L], step) -> anchors`, bool, never a clean one.
      loss: what the inner loop makes small, as `objective.loss`.
    """

    config: APSConfig
    initial_phi: Callable[[Target, APSState, Array], Array]
    prior_weight: Callable[[Array], Any]
    move: Callable[[Array, Array, APSState, Array], Array]
    propose: Callable[[Target, Array, Key], Array]
    confidence: Callable[[Array, Array, Array, Key], Array]
    select: Callable[[Array, Array, Array], Array]
    loss: Callable[..., Array] = objective.loss

    def step(self, target: Target, state: APSState, keys: Key) -> tuple[APSState, StepInfo]:
        """One timestep."""
        z = state.tokens
        keys_draw, keys_rank = split(fold(keys, state.step), 2)
        log_x_theta = target.log_prior(z)
        # Clean positions need no one-hot phi: the objective reads their own codes.
        phi = self.initial_phi(target, state, log_x_theta)
        refined = self.refine(target, state, phi, log_x_theta)
        with jax.named_scope("remasking"):
            log_x_phi = jax.nn.log_softmax(refined.phi, axis=-1)
            x_0 = self.propose(target, refined.phi, keys_draw)
            confidence = self.confidence(log_x_phi, log_x_theta, x_0, keys_rank)
            anchors = self.select(confidence, z == target.mask, state.step)
            next_z = jnp.where(anchors, x_0, z)  # Anchors are masked ones; the rest stays.
        info = self._info(target, next_z, x_0, refined)
        warm_phi = None if state.phi is None else refined.phi  # Of a warm start (ours).
        return state._replace(tokens=next_z, step=state.step + 1, phi=warm_phi), info

    def refine(
        self, target: Target, state: APSState, phi: Float[Array, "R L K"],
        log_x_theta: Float[Array, "R L K"],
    ) -> Refined:  # fmt: skip
        """M steps of Adam on phi; gradients reach it through decoder, operator and prior term."""
        weight = self.prior_weight(state.step)
        return descend(
            lambda phi, _: self.loss(target, phi, log_x_theta, state.tokens, weight),
            phi,
            optax.adam(self.config.learning_rate),
            self.config.num_inner_steps,
            move=lambda phi, updates, j: self.move(phi, updates, state, j),
            keep_best=self.config.keep_best,  # Ours.
        )

    def init(self, target: Target, keys: Key) -> APSState:
        """Everything masked but the known tokens.

        Raises:
          ValueError: several samples are wanted and nothing is random.
        """
        config, tokens = self.config, target.tokens
        if target.num_samples > 1 and not config.is_random:
            raise ValueError(
                f"num_samples={target.num_samples} would give equal samples, since nothing is "
                'random here: set draw="categorical", or remasking="random" with num_steps above 1'
            )
        logits = jnp.zeros((*tokens.shape, target.mask), jnp.float32)
        has_floor = not is_absent(config.sensitivity_floor)
        return APSState(
            tokens=tokens,
            step=jnp.zeros((), jnp.int32),
            phi=logits if config.warm_start else None,
            sensitivity=starts.token_sensitivity(target, config.sensitivity_floor)
            if has_floor
            else None,
            estimate=starts.estimate_if(target, config.encoder_start),
        )

    def finish(self, target: Target, state: APSState, keys: Key) -> Int[Array, "R L"]:
        """Nothing is masked after the last timestep."""
        return state.tokens

    def _info(self, target: Target, next_z: Array, x_0: Array, refined: Refined) -> StepInfo:
        has_steps = self.config.num_inner_steps > 0
        return step_info(
            self,
            target,
            next_z,
            x_0,
            # The gradient of |NaN| is finite in JAX, so the logits alone would hide a NaN.
            loss=refined.loss if has_steps else None,
            losses=refined.losses,
            is_finite=jnp.all(jnp.isfinite(refined.phi), axis=(1, 2)),
            num_inner_steps=self.config.num_inner_steps,
        )

    @property
    def num_iterations(self) -> int:
        """Timesteps T."""
        return self.config.num_steps

    @property
    def trace(self) -> bool:
        """Whether to trace the steps."""
        return self.config.trace

    def evaluations(self) -> Evaluations:
        """Model calls per sample."""
        return self.config.evaluations()


def make_aps(config: APSConfig) -> APS:
    """The sampler that the options describe."""
    return APS(
        config=config,
        initial_phi=_warm_start(config) if config.warm_start else _cold_start(config),
        prior_weight=_PRIOR_WEIGHTS[config.prior_weighting](config),
        move=_mover(_RATES[config.learning_rate_schedule](config)),
        propose=_PROPOSALS[config.draw],
        confidence=_CONFIDENCES[config.remasking],
        select=_RULES[config.rule](config),
    )


def _cold_start(config: APSConfig) -> Callable[[Target, APSState, Array], Array]:
    def fresh(target: Target, state: APSState, log_x_theta: Array) -> Array:
        weight = config.encoder_start
        if config.start_where_measured and state.sensitivity is not None:
            weight = weight * state.sensitivity[..., None]
        return starts.raised(target, log_x_theta, state.estimate, weight)

    return fresh


def _warm_start(config: APSConfig) -> Callable[[Target, APSState, Array], Array]:
    fresh = _cold_start(config)

    def from_last_phi(target: Target, state: APSState, log_x_theta: Array) -> Array:
        assert state.phi is not None  # It is carried where `warm_start` is on.
        if state.sensitivity is None:
            return state.phi
        share = state.sensitivity[..., None]
        return share * state.phi + (1 - share) * fresh(target, state, log_x_theta)

    def warm(target: Target, state: APSState, log_x_theta: Array) -> Array:
        return jax.lax.cond(
            state.step == 0,
            lambda: fresh(target, state, log_x_theta),
            lambda: from_last_phi(target, state, log_x_theta),
        )

    return warm


def _uniform(config: APSConfig) -> Callable[[Array], Any]:
    weight = or_none(config.prior_weight)
    return lambda step: weight


def _elbo(config: APSConfig) -> Callable[[Array], Any]:
    if is_absent(config.prior_weight):
        return _uniform(config)
    weights = schedules.elbo_weights(config.schedule, config.num_steps)
    return lambda step: config.prior_weight * jnp.asarray(weights)[step]


_PRIOR_WEIGHTS = {"uniform": _uniform, "elbo": _elbo}


def _mover(rates: np.ndarray | None) -> Callable[[Array, Array, APSState, Array], Array]:
    def move(phi: Array, updates: Array, state: APSState, j: Array) -> Array:
        # Both factors are ours; the paper adds Adam's update as it is.
        if state.sensitivity is not None:
            updates = updates * state.sensitivity[..., None]
        if rates is not None:
            updates = updates * jnp.asarray(rates)[state.step, j]
        return phi + updates

    return move


#: Shares of the learning rate [T, M].
_RATES: dict[str, Callable[[APSConfig], np.ndarray | None]] = {
    "constant": lambda config: None,
    "cosine": lambda config: schedules.cosine_rates(config.num_steps, config.num_inner_steps),
}

_PROPOSALS: dict[str, Callable[[Target, Array, Key], Array]] = {
    "quantized": lambda target, phi, keys: quantized_expectation(target.codec, phi, target.grid)[1],
    "categorical": lambda target, phi, keys: draw_tokens(keys, phi),
    "argmax": lambda target, phi, keys: most_likely(phi),
}

#: Of log x_phi, log x_theta [R, L, K] and proposals x_0 [R, L].
_CONFIDENCES: dict[str, Callable[[Array, Array, Array, Key], Array]] = {
    "anchored": lambda log_phi, log_theta, x_0, keys: remasking.confidence(log_phi, x_0),
    "standard": lambda log_phi, log_theta, x_0, keys: remasking.confidence(log_theta, x_0),
    "random": lambda log_phi, log_theta, x_0, keys: remasking.random_scores(keys, x_0.shape),
}


def _count(config: APSConfig) -> Callable[[Array, Array, Array], Array]:
    """The surest proposals, a scheduled number of them."""

    def select(scores: Array, is_masked: Array, step: Array) -> Array:
        counts = schedules.masked_counts(config.schedule, config.num_steps, scores.shape[-1])
        return remasking.select_by_count(scores, is_masked, jnp.asarray(counts)[step])

    return select


def _threshold(config: APSConfig, shares: np.ndarray) -> Callable[[Array, Array, Array], Array]:
    """Proposals above a share [T] of the threshold, at the last timestep all of them."""
    shares = np.append(shares[:-1], np.float32(0))

    def select(scores: Array, is_masked: Array, step: Array) -> Array:
        limit = jnp.asarray(shares)[step] * config.threshold
        return remasking.select_by_threshold(scores, is_masked, limit)

    return select


_RULES: dict[str, Callable[[APSConfig], Callable[[Array, Array, Array], Array]]] = {
    "count": _count,
    "threshold": lambda config: _threshold(config, schedules.cosine_thresholds(config.num_steps)),
    "fixed_threshold": lambda config: _threshold(config, np.ones(config.num_steps, np.float32)),
}
