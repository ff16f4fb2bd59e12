"""What one tokenizer's models make of held-out faces, for `experiments.tokenizers`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import aps_jax
from aps_jax import metrics
from aps_jax.codec import expectation
from aps_jax.codec.magvit2 import encode_tokens, reconstruct
from aps_jax.io.rows import Row
from aps_jax.operators import make_operator
from aps_jax.presets import make_config
from aps_jax.pretrained import Model
from aps_jax.sampler import APS, make_aps
from aps_jax.sampling import objective
from aps_jax.sampling.run import run
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.sampling.target import Target, measurement_target, most_likely
from aps_jax.scores.lpips import PerceptualUnavailable
from aps_jax.types import Array, Codec, Key, Params, Perceptual, Prior, bind
from experiments.bench import restoring
from experiments.photos import Crops
from experiments.studies.tokenizer_models import Plan, folder_of
from experiments.train.prior_scores import cross_entropy

WITH_PRIOR, NO_PRIOR = "aps", "no prior"
#: Masked counts that the bound of a face is averaged over.
_NUM_COUNTS = 8


def soft_expectation(target: Target, phi: Float[Array, "R L K"]) -> Float[Array, "R L d"]:
    """The mean code itself, which no token has; tokens are quantised between the timesteps."""
    return target.expected_code(phi)


def likeliest_code(target: Target, phi: Float[Array, "R L K"]) -> Float[Array, "R L d"]:
    """The code of the likeliest token, with the gradient of the mean code."""
    codes = target.codes(most_likely(phi))
    return expectation.straight_through(target.expected_code(phi), codes)


#: Other estimators than the quantized expectation.
ESTIMATORS: dict[str, Callable[[Target, Array], Array]] = {
    "soft expectation": soft_expectation,
    "likeliest code": likeliest_code,
}


def loss(
    target: Target,
    phi: Float[Array, "R L K"],
    log_x_theta: Float[Array, "R L K"],
    tokens: Array,
    weight: Any,
    *,
    estimate: Callable[[Target, Array], Array],
) -> Float[Array, " R"]:
    """`objective.loss` of something else than the quantized expectation.

    `estimate` gives the codes [R, L, d] that are decoded, of target and phi.
    """
    codes = target.known_codes(estimate(target, phi), tokens)
    term = objective.prior_term(phi, log_x_theta, tokens == target.mask)
    return target.objective_of(codes) + (0.0 if weight is None else weight) * term


def samplers(plan: Plan) -> dict[str, APS]:
    """The samplers by method."""
    config = make_config(**{"sigma": plan.sigma} | plan.options)
    aps = make_aps(config)
    others = {
        name: dataclasses.replace(aps, loss=bind(loss, estimate=code))
        for name, code in ESTIMATORS.items()
    }
    alone = make_aps(dataclasses.replace(config, prior_weight=0.0))
    return {WITH_PRIOR: aps, NO_PRIOR: alone} | others


def methods_on(plan: Plan, task: str) -> list[str]:
    """What is run on a task."""
    others = list(ESTIMATORS) if task in plan.estimators_on else []
    return [WITH_PRIOR, NO_PRIOR, *others]


def perceptual_or_none() -> Perceptual | None:
    """LPIPS, or a note that there is none."""
    try:
        return aps_jax.load_lpips()
    except PerceptualUnavailable as error:
        print(f"note: no LPIPS in the rows: {error}", flush=True)
        return None


def load(runs: Path, label: str) -> Model:
    """The models of a tokenizer."""
    return aps_jax.load_pretrained(folder_of(runs, label) / "prior" / "model")


_reconstruct = jax.jit(reconstruct)
_encode = jax.jit(encode_tokens)


def reconstructed(codec: Codec, crops: Crops, perceptual: Perceptual | None) -> list[Row]:
    """PSNR and LPIPS of encoded and decoded faces."""
    x = jnp.asarray(crops.images)
    images = jnp.clip(_reconstruct(codec, x), -1, 1)
    found = {"psnr": metrics.psnr(images, x)}
    if perceptual is not None:
        found["lpips"] = jax.jit(perceptual.__call__)(images, x)
    scores = [
        {name: round(float(values[i]), 5) for name, values in found.items()} for i in range(len(x))
    ]
    return _rows("reconstruction", "codec", crops, scores)


def _rows(task: str, method: str, crops: Crops, scores: list[dict[str, Any]]) -> list[Row]:
    return [
        {"task": task, "method": method, "image": name} | score
        for name, score in zip(crops.names, scores, strict=True)
    ]


@jax.jit
def _masked_losses(prior: Prior, tokens: Array, rank: Array, counts: Array) -> Float[Array, " B"]:
    """Mean cross-entropy in nats over the tokens of rank below `counts` [B]."""
    is_masked = rank < counts.reshape(-1, *(1,) * (rank.ndim - 1))
    logits = prior.apply(prior.params, jnp.where(is_masked, prior.num_codes, tokens))
    losses, _ = cross_entropy(logits, tokens)
    axes = tuple(range(1, tokens.ndim))
    return jnp.sum(losses * is_masked, axis=axes) / counts


def bits_per_pixel(model: Model, crops: Crops, seed: int, batch_size: int = 16) -> list[Row]:
    """Bits per pixel that the prior's bound gives the tokens of every face.

    -log p(z) is at most L times the mean, over counts n from 1 to L and places, of the
    cross-entropy of a masked token where n are masked (arXiv:2406.07524, Eq. 10).
    """
    side = crops.images.shape[1]
    bounds = []
    for start in range(0, len(crops.names), batch_size):
        index = np.resize(np.arange(start, min(start + batch_size, len(crops.names))), batch_size)
        tokens = _encode(model.codec, jnp.asarray(crops.images[index]))
        length = math.prod(tokens.shape[1:])
        rng = np.random.default_rng((seed, start))
        offsets = rng.random(batch_size)
        total = np.zeros(batch_size)
        for part in range(_NUM_COUNTS):
            counts = np.ceil((part + offsets) / _NUM_COUNTS * length).clip(1, length)
            rank = np.argsort(rng.random((batch_size, length)), axis=-1).reshape(tokens.shape)
            losses = _masked_losses(model.prior, tokens, rank, counts.astype(np.float32))
            total += np.asarray(losses, np.float64)
        bits = total / _NUM_COUNTS * length / math.log(2) / side**2
        bounds += bits[: len(crops.names) - start].tolist()
    scores = [{"bits_per_pixel": round(value, 5)} for value in bounds]
    return _rows("bits", "prior", crops, scores)


def facts(model: Model) -> Row:
    """What the cards say of the trainings."""
    codec, prior = model.card["codec_training"], model.card["prior_training"]
    return {"task": "training", "method": "card", "image": ""} | {
        "codec_seconds": codec["seconds"], "codec_steps": codec["steps"],
        "prior_seconds": prior["seconds"], "prior_steps": prior["steps"],
        "prior_parameters": prior["parameters"], "codes_used": prior["codes_used"],
        "unigram_ce": prior["unigram_ce"], "uniform_ce": prior["uniform_ce"],
        "parameters_of_codec": sum(leaf.size for leaf in jax.tree.leaves(model.codec.params)),
    }  # fmt: skip


@jax.jit
def _smooth(operator: Any, y: Any, x: Array, sigma: Array) -> Array:
    return smooth_estimate(operator, y, image_shape=x.shape[1:3], sigma=sigma)


def smoothed(plan: Plan, task: str, crops: Crops, perceptual: Perceptual | None) -> list[Row]:
    """The smooth estimate, which needs no model."""
    operator, x, y, _ = measurement(plan, task, crops)
    images = _smooth(operator, y, x, jnp.float32(plan.sigma))
    scores = restoring.scored(operator, perceptual, images, x, y)
    return _rows(task, "smooth estimate", crops, scores)


def measurement(plan: Plan, task: str, crops: Crops) -> tuple[Any, Array, Any, Key]:
    """Operator, faces, their measurements, and the keys of sampling."""
    options = dict(plan.tasks[task])
    key, noise, keys = restoring.keys_of(plan.seed, crops.positions)
    operator = make_operator(options.pop("task"), **options).init(key, (plan.size, plan.size))
    x = jnp.asarray(crops.images)
    return operator, x, restoring.measured(operator, noise, x, plan.sigma), keys


@jax.jit(static_argnames="sampler")
def _sample(params: Params, y: Any, keys: Key, *, sampler: APS) -> Array:
    target = measurement_target(params, y, config=sampler.config)
    return run(sampler, target, keys).images


def restored(
    plan: Plan,
    task: str,
    method: str,
    model: Model,
    crops: Crops,
    perceptual: Perceptual | None,
) -> tuple[list[Row], Array]:
    """Rows and images of a method on a task."""
    operator, x, y, keys = measurement(plan, task, crops)
    sampler = samplers(plan)[method]
    prior = restoring.uniform_prior(model.prior) if method == NO_PRIOR else model.prior
    images = _sample(Params(prior, model.codec, operator), y, keys, sampler=sampler)
    return _rows(task, method, crops, restoring.scored(operator, perceptual, images, x, y)), images
