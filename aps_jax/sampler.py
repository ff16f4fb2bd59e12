"""Anchored Posterior Sampling (arXiv:2510.02291): glue; the mathematics is in the modules it calls.

z <- all masked
for i = 1..T:
  logits <- prior(z)
  phi    <- Adam steps on the measurement objective, starting from the logits
  propose tokens, keep anchors, mask the rest again
image <- decoder(code of z)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.config import APSConfig
from aps_jax.sampling import remasking
from aps_jax.sampling import schedules as schedule
from aps_jax.sampling.draws import draw_tokens
from aps_jax.sampling.estimate import encoder_logits, estimated_tokens
from aps_jax.sampling.likelihood import make_optimizer, quantized_expectation, refine
from aps_jax.sampling.rows import (
    fit_shapes,
    guided_logits,
    render,
    repeat_samples,
    require_perceptual,
    row_keys,
    start_tokens,
)
from aps_jax.sampling.sensitivity import pixel_sensitivity, token_evidence
from aps_jax.types import Array, Codec, ImageShape, Key, Params, PyTree


class SamplerState(NamedTuple):
    """Carry of the outer loop: only what the next step reads.

    Attributes:
      tokens: z, int32 [S * B, L], sample-major; the value K is the mask.
      step: timesteps done, int32.
      displacement: phi, or phi minus the prior's logits [S * B, L, K], as the warm start needs.
      evidence: how much the measurement says about each token [S * B, L], if weighed.
      moments: Adam's state, if it is carried over.
      estimate: tokens of the smooth estimate [S * B, L], if phi starts near them.
      is_open: bool [S * B, L], False for tokens that were given, if anchors may be masked again.
    """

    tokens: Array
    step: Array
    displacement: Array | None
    evidence: Array | None
    moments: PyTree
    estimate: Array | None
    is_open: Array | None


class StepInfo(NamedTuple):
    """Scalars of one timestep, each [S * B]; `trace` is None unless asked for."""

    loss: Array
    is_finite: Array
    num_masked: Array
    num_inner_steps: Array
    trace: Trace | None


class Trace(NamedTuple):
    """What `config.trace` adds: losses [M, S * B], tokens [S * B, L], images [S * B, H, W, 3]."""

    losses: Array
    tokens: Array
    images: Array


class SampleResult(NamedTuple):
    """Posterior samples.

    Attributes:
      images: the first sample per measurement, float32 [B, H, W, 3] in [-1, 1].
      tokens: its tokens, int32 [B, L], row-major over the (h, w) grid.
      info: per-timestep scalars with leading axes [T, S, B] (and the trace, if asked for).
      samples: all samples [B, S, H, W, 3].
      mean: pixelwise mean over the samples [B, H, W, 3].
      std: pixelwise standard deviation over the samples; 0 for a single one.
    """

    images: Array
    tokens: Array
    info: StepInfo
    samples: Array
    mean: Array
    std: Array


def aps_sample(
    params: Params,
    y: PyTree,
    key: Key,
    *,
    config: APSConfig = APSConfig(),
    known_tokens: Array | None = None,
) -> SampleResult:
    """Samples images from the posterior of the measurement; pure, jit with `config` static.

    Args:
      params: prior, codec, operator (random state drawn) and, for a perceptual term, LPIPS.
      y: measurement of B images, as from `measure`.
      key: one typed key, folded with the image index, or one key per image [B]. Image i depends on
        its own key and measurement only, not on the rest of the batch.
      config: options.
      known_tokens: int32 [B, L], tokens given from the start and never changed; K where unknown.

    Returns:
      Samples, with per-timestep diagnostics. A run that met a non-finite loss says so in
      `info.is_finite`.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together.
    """
    state = aps_init(params, y, config=config, known_tokens=known_tokens)

    def step(state: SamplerState, _: None) -> tuple[SamplerState, StepInfo]:
        return aps_step(params, y, state, key, config=config)

    state, info = jax.lax.scan(step, state, None, length=config.num_steps)
    return aps_finish(params, y, state, info, config=config)


def aps_init(
    params: Params, y: PyTree, *, config: APSConfig, known_tokens: Array | None = None
) -> SamplerState:
    """The state before the first timestep: everything masked but the known tokens.

    With `encoder_start` it computes the smooth estimate (`sampling.estimate.NUM_STEPS` gradients of
    the operator and one run of the encoder), with `evidence_floor` what y says about each token
    (`sampling.sensitivity.NUM_PROBES` gradients of the operator). Arguments and errors are those
    of `aps_sample`.
    """
    image_shape, grid = _shapes(params, y, config)
    batch, num_tokens = jax.tree.leaves(y)[0].shape[0], grid[0] * grid[1]
    num_codes = params.codec.num_codes
    tokens = start_tokens(
        known_tokens, batch, num_tokens, num_codes=num_codes, num_samples=config.num_samples
    )
    logits = jnp.zeros((*tokens.shape, num_codes), jnp.float32)
    estimate = None
    if config.encoder_start > 0:
        estimate = estimated_tokens(params, y, config, image_shape=image_shape, grid=grid)
    evidence = None
    if config.evidence_floor > 0:
        with jax.named_scope("evidence"):
            evidence = token_evidence(
                pixel_sensitivity(params.operator, y, image_shape=image_shape),
                tokens[:batch] == num_codes,
                grid=grid,
                stride=params.codec.stride,
                decode_scale=config.decode_scale,
                floor=config.evidence_floor,
            )
        evidence = jnp.tile(evidence, (config.num_samples, 1))
    return SamplerState(
        tokens=tokens,
        step=jnp.zeros((), jnp.int32),
        displacement=None if config.warm_start == "none" else logits,
        evidence=evidence,
        moments=make_optimizer(config).init(logits) if config.warm_moments else None,
        estimate=estimate,
        is_open=None if config.remdm == "none" else tokens == num_codes,
    )


def aps_step(
    params: Params, y: PyTree, state: SamplerState, key: Key, *, config: APSConfig
) -> tuple[SamplerState, StepInfo]:
    """One timestep; the scan of `aps_sample` and a host loop run this same function."""
    image_shape, grid = _shapes(params, y, config)
    num_codes = params.codec.num_codes
    is_masked = state.tokens == num_codes
    keys = row_keys(key, state.tokens.shape[0], config.num_samples)
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, state.step)))(keys)
    keys_draw, keys_keep = keys[:, 0], keys[:, 1]

    with jax.named_scope("denoiser"):
        logits = guided_logits(
            params.prior,
            state.tokens,
            grid,
            guidance_scale=config.guidance_scale,
            prior_temperature=config.prior_temperature,
        )
    log_prior = jax.nn.log_softmax(logits, axis=-1)
    start = _start(params.codec, state, log_prior, config)

    optimizer = make_optimizer(config)
    inner = refine(
        params,
        repeat_samples(y, config.num_samples),
        start,
        state.moments if config.warm_moments else optimizer.init(start),
        log_prior,
        state.tokens,
        jnp.asarray(schedule.elbo_weights(config.schedule, config.num_steps), jnp.float32)[
            state.step
        ],
        grid=grid,
        image_shape=image_shape,
        config=config,
        evidence=state.evidence,
        rates=_rates(state.step, config),
    )

    with jax.named_scope("remasking"):
        log_probs = jax.nn.log_softmax(inner.logits, axis=-1)
        proposal = _propose(params, inner.logits, keys_draw, config)
        tokens = _anchored(log_probs, log_prior, proposal, state, keys_keep, num_codes, config)

    trace = None
    if config.trace:
        shown = jnp.where(is_masked, proposal, state.tokens)
        trace = Trace(
            inner.losses, tokens, render(params, shown, grid, image_shape, config.decode_scale)
        )
    displacement = {
        "none": None,
        "logits": inner.logits,
        "displacement": inner.logits - log_prior,
    }[config.warm_start]
    moments = inner.opt_state if config.warm_moments else None
    is_finite = jnp.all(jnp.isfinite(inner.logits), axis=(1, 2))
    if config.num_inner_steps > 0:
        # The gradient of |NaN| is finite in JAX, so the logits alone would hide it.
        is_finite &= jnp.isfinite(inner.loss)
    info = StepInfo(
        loss=inner.loss,
        is_finite=is_finite,
        num_masked=jnp.sum(tokens == num_codes, axis=-1, dtype=jnp.int32),
        num_inner_steps=inner.num_steps,
        trace=trace,
    )
    state = state._replace(
        tokens=tokens,
        step=state.step + 1,
        displacement=displacement,
        moments=moments,
    )
    return state, info


def aps_finish(
    params: Params, y: PyTree, state: SamplerState, info: StepInfo, *, config: APSConfig
) -> SampleResult:
    """Decodes the final tokens; `info` is the stack of all steps' infos, with leading axis T."""
    image_shape, grid = _shapes(params, y, config)
    samples = render(params, state.tokens, grid, image_shape, config.decode_scale)
    return collect(state.tokens, samples, info, config.num_samples)


def collect(tokens: Array, images: Array, info: StepInfo, num_samples: int) -> SampleResult:
    """The result of rows that are samples of measurements, sample-major.

    Args:
      tokens: int32 [S * B, L].
      images: [S * B, H, W, 3].
      info: scalars with leading axes [T, S * B].
      num_samples: S.
    """

    def by_sample(leaf: Array) -> Array:
        return leaf.reshape(num_samples, -1, *leaf.shape[1:])

    samples = by_sample(images)
    split = jax.tree.map(lambda leaf: jax.vmap(by_sample)(leaf), info._replace(trace=None))
    return SampleResult(
        images=samples[0],
        tokens=by_sample(tokens)[0],
        info=split._replace(trace=info.trace),
        samples=jnp.swapaxes(samples, 0, 1),
        mean=jnp.mean(samples, axis=0),
        std=jnp.std(samples, axis=0),
    )


def _shapes(params: Params, y: PyTree, config: APSConfig) -> tuple[ImageShape, tuple[int, int]]:
    shapes = fit_shapes(params, y, image_shape=config.image_shape, decode_scale=config.decode_scale)
    require_perceptual(
        params,
        measurement_term=config.measurement_term,
        perceptual_weight=config.perceptual_weight,
    )
    return shapes


def _start(codec: Codec, state: SamplerState, log_prior: Array, config: APSConfig) -> Array:
    """Where phi begins: `config.warm_start` and `config.encoder_start`."""

    def fresh() -> Array:
        if state.estimate is None:
            return log_prior
        return log_prior + encoder_logits(codec, state.estimate, config.encoder_start)

    def carried() -> Array:
        kept = state.displacement
        if config.warm_start == "displacement":
            kept = log_prior + kept
        if state.evidence is None:
            return kept
        share = state.evidence[..., None]
        return share * kept + (1 - share) * fresh()

    if config.warm_start == "none":
        return fresh()
    return jax.lax.cond(state.step == 0, fresh, carried)


def _rates(step: Array, config: APSConfig) -> Array | None:
    """Share of the learning rate at every inner step of a timestep [M]; None if it is constant."""
    if config.learning_rate_schedule == "constant":
        return None
    rates = schedule.learning_rates(
        config.learning_rate_schedule, config.num_steps, config.num_inner_steps
    )
    return jnp.asarray(rates, jnp.float32)[step]


def _propose(params: Params, logits: Array, keys: Key, config: APSConfig) -> Array:
    if config.draw == "quantized":
        return quantized_expectation(params.codec, logits)[1]
    if config.draw == "argmax":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw_tokens(keys, logits)


def _anchored(
    log_probs: Array,
    log_prior: Array,
    proposal: Array,
    state: SamplerState,
    keys: Key,
    mask: int,
    config: APSConfig,
) -> Array:
    """The tokens of the next timestep: some proposals become anchors."""
    step = state.step
    if config.remasking == "random":
        scores = remasking.gumbel_scores(keys, jnp.zeros(proposal.shape, jnp.float32), 1.0)
    else:
        scored = log_probs if config.remasking == "anchored" else log_prior
        scores = remasking.confidence(scored, proposal)
    chance = remasking.scheduled_chance(config, step)
    keys_lose = None if chance is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    if config.rule == "threshold":
        limits = schedule.thresholds(config.threshold_schedule, config.num_steps, config.threshold)
        is_last = step == config.num_steps - 1
        threshold = jnp.where(is_last, 0.0, jnp.asarray(limits, jnp.float32)[step])
        anchors = remasking.select_by_threshold(scores, state.tokens == mask, threshold)
        tokens = jnp.where(anchors, proposal, state.tokens)
        if chance is None:
            return tokens
        is_lost = remasking.pick(keys_lose, chance, (state.tokens != mask) & state.is_open)
        return jnp.where(is_lost, mask, tokens)
    if config.gumbel_temperature > 0:
        temperature = config.gumbel_temperature * (1 - (step + 1) / config.num_steps)
        scores = remasking.gumbel_scores(keys, scores, temperature)
    counts = schedule.masked_counts(config.schedule, config.num_steps, proposal.shape[-1])
    return remasking.keep_and_lose(
        state.tokens,
        proposal,
        scores,
        jnp.asarray(counts, jnp.int32)[step],
        mask=mask,
        chance=chance,
        is_open=state.is_open,
        keys=keys_lose,
    )
