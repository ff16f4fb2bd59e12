"""Anchored Posterior Sampling (arXiv:2510.02291, Algorithm 1).

z <- all masked
for i = 1..T:
  x_theta <- denoiser(z)
  phi     <- log x_theta, then M steps of Adam on N(y, A(D(quantized expectation of phi)))
  x_0     <- proposal from phi
  anchors <- the proposals that the tilted x_phi is surest of; the rest is masked again
image <- D(code of z)

`APS.step` is one timestep. How phi starts, what is proposed and what is kept is chosen by
`make_aps`, before anything is traced; `aps_sample` builds the target of a measurement and runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from aps_jax import schedules
from aps_jax.codec.expectation import quantized_expectation
from aps_jax.config import APSConfig, Evaluations
from aps_jax.sampling import objective, remasking, starts
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.inner_loop import Refined, descend
from aps_jax.sampling.leaves import as_pytree, is_absent
from aps_jax.sampling.optimizers import lenient
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
    """One timestep, the body of the scan of `aps_sample`; infos are per row [S * B]."""
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
      propose: `(target, phi, keys) -> x_0`, clean tokens.
      confidence: `(log x_phi, log x_theta, x_0, keys) -> [R, L]`.
      remask: `(config, confidence, x_0, z, step, mask) -> next z`; proposals that it keeps are the
        anchors, and clean tokens always stay.
    """

    config: APSConfig
    initial_phi: Callable[[Target, APSState, Array], Array]
    propose: Callable[[Target, Array, Key], Array]
    confidence: Callable[[Array, Array, Array, Key], Array]
    remask: Callable[[APSConfig, Array, Array, Array, Array, int], Array]

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
            next_z = self.remask(self.config, confidence, x_0, z, state.step, target.mask)
        info = self._info(target, next_z, x_0, refined)
        warm_phi = None if state.phi is None else refined.phi  # Of a warm start (ours).
        return state._replace(tokens=next_z, step=state.step + 1, phi=warm_phi), info

    def refine(
        self,
        target: Target,
        state: APSState,
        phi: Float[Array, "R L K"],
        log_prior: Float[Array, "R L K"],
    ) -> Refined:
        """M steps of Adam on phi, gradients through decoder and operator only."""
        config = self.config
        weight = None if is_absent(config.prior_weight) else config.prior_weight
        if weight is not None and config.prior_weighting == "elbo":
            elbo = schedules.elbo_weights(config.schedule, config.num_steps)
            weight = weight * jnp.asarray(elbo)[state.step]

        rates = None
        if config.learning_rate_schedule != "constant":
            rates = jnp.asarray(
                schedules.learning_rates(
                    config.learning_rate_schedule, config.num_steps, config.num_inner_steps
                )
            )

        def move(phi: Array, updates: Array, j: Array) -> Array:
            # Both factors are ours; the paper adds Adam's update as it is.
            if state.sensitivity is not None:
                updates = updates * state.sensitivity[..., None]
            if rates is not None:
                updates = updates * rates[state.step, j]
            return phi + updates

        return descend(
            lambda phi, _: objective.loss(target, phi, log_prior, state.tokens, weight),
            phi,
            lenient(optax.adam(config.learning_rate)),
            config.num_inner_steps,
            move=move,
            keep_best=config.keep_best,
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
            estimate=None if is_absent(config.encoder_start) else starts.smooth_tokens(target),
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

    def fresh(target: Target, state: APSState, log_prior: Array) -> Array:
        if state.estimate is None:
            return log_prior
        return log_prior + starts.encoder_logits(target, state.estimate, config.encoder_start)

    def from_last_phi(target: Target, state: APSState, log_prior: Array) -> Array:
        assert state.phi is not None  # It is carried where `warm_start` is on.
        if state.sensitivity is None:
            return state.phi
        share = state.sensitivity[..., None]
        return share * state.phi + (1 - share) * fresh(target, state, log_prior)

    def warm(target: Target, state: APSState, log_prior: Array) -> Array:
        return jax.lax.cond(
            state.step == 0,
            lambda: fresh(target, state, log_prior),
            lambda: from_last_phi(target, state, log_prior),
        )

    return APS(
        config=config,
        initial_phi=warm if config.warm_start else fresh,
        propose=_PROPOSALS[config.draw],
        confidence=_CONFIDENCES[config.remasking],
        remask=_RULES[config.rule],
    )


_PROPOSALS: dict[str, Callable[[Target, Array, Key], Array]] = {
    "quantized": lambda target, phi, keys: quantized_expectation(target.codec, phi, target.grid)[1],
    "categorical": lambda target, phi, keys: draw_tokens(keys, phi),
    "argmax": lambda target, phi, keys: most_likely(phi),
}


def _random_scores(
    log_probs: Float[Array, "R L K"],
    log_prior: Float[Array, "R L K"],
    proposal: Int[Array, "R L"],
    keys: Key,
) -> Float[Array, "R L"]:
    return remasking.gumbel_scores(keys, jnp.zeros(proposal.shape, jnp.float32), 1.0)


_CONFIDENCES: dict[str, Callable[[Array, Array, Array, Key], Array]] = {
    "anchored": lambda log_probs, log_prior, x, keys: remasking.confidence(log_probs, x),
    "standard": lambda log_probs, log_prior, x, keys: remasking.confidence(log_prior, x),
    "random": _random_scores,
}


def _keep_count(
    config: APSConfig,
    scores: Float[Array, "R L"],
    proposal: Int[Array, "R L"],
    tokens: Int[Array, "R L"],
    step: Int[Array, ""],
    mask: int,
) -> Int[Array, "R L"]:
    """The next z: the surest proposals, a scheduled number of them, and what was clean."""
    counts = schedules.masked_counts(config.schedule, config.num_steps, tokens.shape[-1])
    anchors = remasking.select_by_count(scores, tokens == mask, jnp.asarray(counts)[step])
    return jnp.where(anchors, proposal, tokens)


def _keep_threshold(
    config: APSConfig,
    scores: Float[Array, "R L"],
    proposal: Int[Array, "R L"],
    tokens: Int[Array, "R L"],
    step: Int[Array, ""],
    mask: int,
) -> Int[Array, "R L"]:
    """The next z: proposals above a scheduled confidence, at the last timestep all of them."""
    limits = schedules.thresholds(config.threshold_schedule, config.num_steps)
    threshold = jnp.asarray(limits, jnp.float32)[step] * config.threshold
    threshold = jnp.where(step == config.num_steps - 1, 0.0, threshold)
    anchors = remasking.select_by_threshold(scores, tokens == mask, threshold)
    return jnp.where(anchors, proposal, tokens)


_RULES: dict[str, Callable[[APSConfig, Array, Array, Array, Array, int], Array]] = {
    "count": _keep_count,
    "threshold": _keep_threshold,
}
