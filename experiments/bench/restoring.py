"""Restores and scores one batch of photos."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import metrics
from aps_jax.codec.magvit2 import reconstruct
from aps_jax.config import APSConfig
from aps_jax.denoiser import PixelParams
from aps_jax.flops import flops_of
from aps_jax.operators import measure
from aps_jax.operators.residuals import absolute_error
from aps_jax.samplers import sample
from aps_jax.samplers.budget import decoder_evaluations
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.scores import report
from aps_jax.types import Array, Key, Operator, Params, Perceptual, Prior, PyTree, bind
from experiments.bench.budgets import TOLERANCE, Work
from experiments.bench.study import Method

#: Measures a batch: `(operator, keys, x) -> y`.
_measure = jax.jit(
    lambda operator, keys, x, sigma: measure(keys, x, operator=operator, sigma=sigma),
    static_argnames="sigma",
)


class Restored(NamedTuple):
    """What a method makes of a batch.

    Attributes:
      images: [B, H, W, 3].
      is_finite: bool [B], False where the objective of the sample shown was not.
      cost: model calls per photo by name, each [B]; none for yardsticks.
    """

    images: Array
    is_finite: np.ndarray
    cost: dict[str, np.ndarray]


#: `(params, x, y, keys) -> Restored`, compiled.
Restorer = Callable[[Any, Array, PyTree, Key], Restored]


def keys_of(seed: int, positions: np.ndarray) -> tuple[Key, Key, Key]:
    """Keys of the operator, of the noise [B] and of sampling [B] for photos at these positions."""
    return _keys_of(jax.random.key(seed), jnp.asarray(positions))


@jax.jit
def _keys_of(key: Key, positions: Array) -> tuple[Key, Key, Key]:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(positions + 2)
    keys = jax.vmap(jax.random.split)(keys)
    return jax.random.fold_in(key, 1), keys[:, 0], keys[:, 1]


def measured(operator: Operator, keys: Key, x: Array, sigma: float) -> PyTree:
    """The noisy measurement of a batch."""
    return _measure(operator, keys, x, sigma)


def uniform_prior(prior: Prior) -> Prior:
    """A prior without an opinion, for the same optimisation without a prior."""
    # The zeros are an argument: as a constant, XLA would spend a minute folding what follows.
    zeros = jnp.zeros(prior.num_codes)
    return Prior(params=zeros, apply=bind(_uniform), num_codes=prior.num_codes)


def _uniform(params: Array, tokens: Array) -> Array:
    return jnp.broadcast_to(params, (*tokens.shape, params.shape[0]))


def compile_method(
    method: Method, config: Any, sigma: float, params: Params | PixelParams, x: Array, y: PyTree,
    keys: Key, limit: int | Work | None = None,
) -> Restorer:  # fmt: skip
    """Compiles a method for batches like `x`, so that its runs can be timed alone.

    Yardsticks run once for that.

    Args:
      method: as parsed.
      config: configuration of its sampler, None for yardsticks.
      sigma: std of the noise; 0 leaves the sampler's own.
      params: models and operator; LPIPS only if it is scored or part of the objective.
      x: photos [B, H, W, 3].
      y: their measurement.
      keys: one per photo.
      limit: of its budget.

    Raises:
      ValueError: if it makes more FLOPs than its budget has.
    """
    if method.kind != "sampler":
        run = _yardstick(method, sigma, x.shape[1:3])
        jax.block_until_ready(run(params, x, y, keys))
        return run
    needed = _needed(params, method, config)
    traced = _run.trace(
        needed, y, keys, draw=sample, config=config, is_mean=method.estimate == "mean"
    )
    flops = _flops_per_photo(traced, method, config, len(x), limit)
    return functools.partial(_sampled, traced.lower().compile(), method, config, flops)


def _flops_per_photo(
    traced: Any, method: Method, config: Any, batch: int, limit: int | Work | None
) -> float | None:
    """Of what is going to run, or of its networks alone where loops or branches depend on values.

    Raises:
      ValueError: beyond the limit.
    """
    calls = 1e9 * config.num_samples * limit.cost(config) if isinstance(limit, Work) else None
    try:
        least, flops = (flops_of(traced.jaxpr.jaxpr, of_branches=of) / batch for of in (min, max))
        if calls is not None and least < (1 - TOLERANCE) * flops:
            flops = calls
    except ValueError:
        flops = calls
    if flops is not None and isinstance(limit, Work) and method.budgeted:
        limit.require(method.label, flops / config.num_samples)
    return flops


def _yardstick(method: Method, sigma: float, image_shape: tuple[int, int]) -> Restorer:
    if method.kind == "codec":
        return lambda params, x, y, keys: _plain(jnp.clip(_reconstruct(params.codec, x), -1, 1))
    if method.kind == "measurement":
        return _baseline
    sigma = sigma or APSConfig().sigma
    return lambda params, x, y, keys: _plain(
        _estimate(params.operator, y, image_shape=image_shape, sigma=sigma)
    )


@functools.partial(jax.jit, static_argnames=("draw", "config", "is_mean"))
def _run(
    params: Params | PixelParams, y: PyTree, keys: Key, *, draw: Callable[..., Any], config: Any,
    is_mean: bool,
) -> tuple[Array, Array]:  # fmt: skip
    result = draw(params, y, keys, config=config)
    is_finite = jnp.all(result.info.is_finite, axis=0)
    if is_mean:
        return jnp.mean(result.samples, axis=1), jnp.all(is_finite, axis=1)
    return _best(params.operator, result.samples, result.decoded, y, is_finite)


def _needed(params: Params | PixelParams, method: Method, config: Any) -> Params | PixelParams:
    """Only what the method reads, so that nothing else is passed to the device."""
    if isinstance(params, PixelParams):
        return params
    if method.prior == "none":
        params = params.replace(prior=uniform_prior(params.prior))
    if getattr(config, "perceptual_weight", 0) == 0:
        params = params.replace(perceptual=None)
    return params


def _sampled(
    compiled: Any, method: Method, config: Any, flops: float | None,
    params: Params | PixelParams, x: Array, y: PyTree, keys: Key,
) -> Restored:  # fmt: skip
    images, is_finite = compiled(_needed(params, method, config), y, keys)
    calls, batch = config.evaluations(), x.shape[0]
    is_pixels = config.NEEDS == "denoiser"
    per_sample = {
        "denoiser_evaluations": calls.denoiser,
        "decoder_evaluations": 0 if is_pixels else decoder_evaluations(config),
        # Of either network: operators alone cost nothing.
        "gradient_evaluations": calls.decoder_gradient,
    }
    if is_pixels:
        per_sample["gradient_evaluations"] = calls.denoiser * config.HAS_DENOISER_GRADIENT
    cost = {n: np.full(batch, config.num_samples * count) for n, count in per_sample.items()}
    cost |= {} if flops is None else {"flops": np.full(batch, flops)}
    return Restored(images, np.asarray(is_finite), cost)


def _best(
    operator: Operator, samples: Array, decoded: Array, y: PyTree, is_finite: Array
) -> tuple[Array, Array]:
    """Of samples [B, S, H, W, 3] those of least residual [B, H, W, 3], and if they are finite.

    The residual is that of the decoded samples, since data consistency leaves all with one alike.

    A sample whose objective was not finite (`is_finite` [B, S]) is chosen only if all are so.
    """
    if samples.shape[1] == 1:
        return samples[:, 0], is_finite[:, 0]
    residual = jnp.stack(
        [absolute_error(operator, operator(decoded[:, s]), y) for s in range(samples.shape[1])],
        axis=1,
    )
    is_sound = is_finite & ~jnp.isnan(residual)
    best = jnp.argmin(jnp.where(is_sound, residual, jnp.inf), axis=1)
    index = jnp.arange(samples.shape[0])
    return samples[index, best], is_finite[index, best]


_reconstruct = jax.jit(reconstruct)
_estimate = jax.jit(smooth_estimate, static_argnames=("image_shape", "sigma"))


def _plain(images: Array) -> Restored:
    return Restored(images, np.ones(images.shape[0], bool), {})


def _baseline(params: Params, x: Array, y: PyTree, keys: Key) -> Restored:
    del keys
    shown = [report.baseline(one[None], params.operator, x.shape[1:3]) for one in y]
    return _plain(jnp.stack([image for _, image in shown]))


def has_baseline(operator: Operator, image_shape: tuple[int, int]) -> bool:
    """Whether a measurement of this operator can stand for a restoration."""
    shape = operator.output_shape((1, *image_shape, 3))
    if not isinstance(shape, tuple) or not isinstance(shape[0], int):
        return False
    return report.baseline(jnp.zeros(shape), operator, image_shape) is not None


def timed(run: Restorer, params: Any, x: Array, y: PyTree, keys: Key) -> tuple[Restored, float]:
    """A batch restored, and the seconds it took per photo."""
    began = time.perf_counter()
    restored = jax.block_until_ready(run(params, x, y, keys))
    return restored, (time.perf_counter() - began) / x.shape[0]


@jax.jit
def _scores(
    operator: Operator, perceptual: Perceptual | None, images: Array, x: Array, y: PyTree
) -> dict[str, Array]:
    scores = {
        "psnr": metrics.psnr(images, x),
        "ssim": metrics.ssim(images, x),
        "residual": absolute_error(operator, operator(images), y),
    }
    if perceptual is not None:
        scores["lpips"] = perceptual(jnp.clip(images, -1, 1), x)
    return scores


def scored(
    operator: Operator, perceptual: Perceptual | None, images: Array, x: Array, y: PyTree
) -> list[dict[str, float]]:
    """PSNR, SSIM, residual and, if there is a distance, LPIPS of each photo; none if not finite."""
    table = jax.device_get(_scores(operator, perceptual, images, x, y))
    rows = [{name: float(values[i]) for name, values in table.items()} for i in range(len(x))]
    return [
        {name: round(value, 5) for name, value in row.items()}
        if all(map(math.isfinite, row.values()))
        else {}
        for row in rows
    ]
