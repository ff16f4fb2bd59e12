"""One call of a sampler: the rows it works on, and what can be asked about them.

A row is one sample of one measurement; rows never influence each other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aps_jax.sampler import SampleResult, StepInfo, collect
from aps_jax.samplers.config import GradientConfig, PriorConfig, SamplerConfig
from aps_jax.sampling.estimate import encoder_logits, estimated_tokens
from aps_jax.sampling.likelihood import (
    gaussian_energy,
    measurement_loss,
    perceptual_targets,
    predict,
)
from aps_jax.sampling.rows import (
    fit_shapes,
    guided_logits,
    render,
    repeat_samples,
    require_perceptual,
    row_keys,
    start_tokens,
)
from aps_jax.types import Array, ImageShape, Key, Params, Prior, PyTree

#: Log-probability of what carry-over excludes at clean positions: exp(-70) is 0 next to 1.
LEAST_LOG_PROB = -70.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """Tokens to be sampled from a prior, one entry per row.

    Attributes:
      prior: masked transformer.
      tokens: int32 [R, L], what is known from the start; K where unknown.
      grid: (h, w) with h * w = L.
      config: options of the sampler.
    """

    prior: Prior
    tokens: Array
    grid: tuple[int, int]
    config: SamplerConfig

    @property
    def mask(self) -> int:
        """K, the mask token."""
        return self.prior.num_codes

    @property
    def is_unknown(self) -> Array:
        """Bool [R, L], False where a token is given and must not change."""
        return self.tokens == self.mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Field):
    """The arguments of a sampler, one entry per row.

    Attributes:
      params: models and operator.
      y: measurement [R, ...].
      keys: one key per row [R].
      image_shape: (H, W).
      targets: what the perceptual term needs of y, if there is one.
    """

    params: Params
    y: PyTree
    keys: Key
    image_shape: ImageShape
    targets: list[PyTree] | None


def pose(
    params: Params, y: PyTree, key: Key, *, config: SamplerConfig, known_tokens: Array | None
) -> Problem:
    """Checks the arguments of a sampler and lays them out by row.

    Raises:
      ValueError: shapes of y, operator, codec, prior and configuration do not fit together.
    """
    image_shape, grid = fit_shapes(
        params, y, image_shape=config.image_shape, decode_scale=config.decode_scale
    )
    num_samples = config.num_samples
    y_rows, targets = repeat_samples(y, num_samples), None
    if isinstance(config, GradientConfig):
        require_perceptual(
            params,
            measurement_term=config.measurement_term,
            perceptual_weight=config.perceptual_weight,
        )
        targets = perceptual_targets(params, y_rows, config)
    tokens = start_tokens(
        known_tokens,
        jax.tree.leaves(y)[0].shape[0],
        grid[0] * grid[1],
        num_codes=params.codec.num_codes,
        num_samples=num_samples,
    )
    return Problem(
        prior=params.prior,
        params=params,
        y=y_rows,
        keys=row_keys(key, tokens.shape[0], num_samples),
        tokens=tokens,
        grid=grid,
        image_shape=image_shape,
        config=config,
        targets=targets,
    )


def fold(keys: Key, index: Array | int) -> Key:
    """Keys [R] folded with one index."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def split(keys: Key, num: int) -> Key:
    """`num` sets of keys [num, R] from keys [R], to be unpacked by use."""
    return jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, num))(keys), 0, 1)


def prior_log_probs(field: Field, tokens: Array) -> Array:
    """Log p(x_l | tokens) [R, L, K]; clean tokens are carried over, so one-hot with a floor."""
    config = field.config
    assert isinstance(config, PriorConfig)
    with jax.named_scope("denoiser"):
        logits = guided_logits(
            field.prior,
            tokens,
            field.grid,
            guidance_scale=config.guidance_scale,
            prior_temperature=config.prior_temperature,
        )
    log_probs = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), LEAST_LOG_PROB)
    is_own = tokens[..., None] == jnp.arange(field.mask, dtype=jnp.int32)[None, None]
    carried = jnp.where(is_own, jnp.float32(0), LEAST_LOG_PROB)
    return jnp.where((tokens == field.mask)[..., None], log_probs, carried)


def encoder_bonus(problem: Problem) -> Array | float:
    """What `config.encoder_start` adds to the logits that phi starts from: [R, L, K], or 0."""
    config = problem.config
    assert isinstance(config, GradientConfig)
    if config.encoder_start == 0:
        return 0.0
    return encoder_logits(problem.params.codec, smooth_tokens(problem), config.encoder_start)


def smooth_tokens(problem: Problem) -> Array:
    """Tokens [R, L] that the encoder has for a smooth image that explains the measurement."""
    batch = problem.tokens.shape[0] // problem.config.num_samples
    return estimated_tokens(
        problem.params,
        jax.tree.map(lambda leaf: leaf[:batch], problem.y),
        problem.config,
        image_shape=problem.image_shape,
        grid=problem.grid,
    )


def codes_of(problem: Problem, tokens: Array) -> Array:
    """Codes [R, L, d] of clean tokens [R, L]."""
    return problem.params.codec.codebook[tokens]


def most_likely(log_probs: Array) -> Array:
    """Clean tokens int32 [R, L]: the mode of each position of [R, L, K]."""
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


def with_known_tokens(problem: Problem, tokens: Array) -> Array:
    """Tokens [R, L] with those given from the start put back."""
    return jnp.where(problem.is_unknown, tokens, problem.tokens)


def with_known_codes(problem: Problem, codes: Array) -> Array:
    """Codes [R, L, d] with those of the tokens given from the start put back."""
    known = codes_of(problem, jnp.where(problem.is_unknown, 0, problem.tokens))
    return jnp.where(problem.is_unknown[..., None], codes, known)


def _prediction(problem: Problem, codes: Array) -> PyTree:
    return predict(
        problem.params,
        codes,
        grid=problem.grid,
        image_shape=problem.image_shape,
        decode_scale=problem.config.decode_scale,
        num_samples=problem.config.num_samples,
    )


def energy(problem: Problem, tokens: Array) -> Array:
    """E(z) = ||A(D(z)) - y||^2 / (2 sigma^2) per row [R] of clean tokens; one decoder call."""
    prediction = _prediction(problem, codes_of(problem, tokens))
    with jax.default_matmul_precision("float32"):
        return gaussian_energy(problem.params.operator, prediction, problem.y, problem.config.sigma)


def measurement_term(problem: Problem, codes: Array) -> Array:
    """The term of `config.measurement_term` per row [R], differentiable in the codes [R, L, d]."""
    config = problem.config
    assert isinstance(config, GradientConfig)
    prediction = _prediction(problem, codes)
    with jax.default_matmul_precision("float32"):
        if config.measurement_term == "norm":
            halved = gaussian_energy(problem.params.operator, prediction, problem.y, sigma=1.0)
            # The least normal number keeps the gradient finite where the fit is perfect.
            return jnp.sqrt(2 * halved + jnp.finfo(jnp.float32).tiny)
        loss = measurement_loss(problem.params, prediction, problem.y, config, problem.targets)
    # The same scale as in APS: the gradient of a token does not shrink with the image.
    return codes.shape[1] * loss if config.measurement_term == "l1" else loss


def finish(problem: Problem, tokens: Array, info: StepInfo) -> SampleResult:
    """Decodes clean tokens [R, L]; `info` has leading axes [T, R]."""
    images = render(
        problem.params, tokens, problem.grid, problem.image_shape, problem.config.decode_scale
    )
    return collect(tokens, images, info, problem.config.num_samples)


def step_info(problem: Problem, tokens: Array, loss: Array | None = None) -> StepInfo:
    """Scalars of a step [R]: masked tokens and `loss`, NaN for samplers without one."""
    rows = tokens.shape[0]
    return StepInfo(
        loss=jnp.full(rows, jnp.nan, jnp.float32) if loss is None else loss,
        is_finite=jnp.ones(rows, bool) if loss is None else jnp.isfinite(loss),
        num_masked=jnp.sum(tokens == problem.mask, axis=-1, dtype=jnp.int32),
        num_inner_steps=jnp.full(rows, getattr(problem.config, "num_inner_steps", 0), jnp.int32),
        trace=None,
    )
