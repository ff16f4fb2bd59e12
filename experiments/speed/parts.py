"""What `experiments.speed` times inside JAX: the loop, its parts, and more devices or sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax import sharding
from aps_jax.codec import convolution
from aps_jax.codec.magvit2 import init_codec_params, make_codec
from aps_jax.flops import count_flops
from aps_jax.presets import make_config
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import init_transformer_params
from aps_jax.sampling import objective
from aps_jax.types import Array, Params, image_keys
from experiments.speed import timing
from experiments.speed.step import Step, codes_like, images, sample, with_lpips


def loop_section(params: Params, arguments: Any) -> dict[str, Any]:
    """One inner iteration inside the compiled sampler against the same one as a jitted call.

    Inside: the difference between `aps_sample` with 1 + n and with 1 inner steps, over n, so that
    the denoiser and the remasking cancel. XLA's CPU backend can compile the gradient of a
    convolution far worse inside a loop; "stock gradient" is JAX's own. The first two have the
    published objective; "preset balanced" is what the command line runs, with the prior term,
    evidence and the best phi.
    """
    published = aps_jax.APSConfig()
    result = {"library gradient": _inside_and_alone(params, published, arguments)}
    with _replaced(convolution, "_unit_stride", convolution._unit_stride.fun):
        result["stock gradient"] = _inside_and_alone(params, published, arguments)
    balanced = make_config(preset="balanced")
    result["preset balanced"] = _inside_and_alone(params, balanced, arguments)
    return result


def _inside_and_alone(params: Params, config: aps_jax.APSConfig, arguments: Any) -> dict[str, Any]:
    count, side = arguments.inner_steps, arguments.matmul_side
    long = dataclasses.replace(config, num_steps=1, num_inner_steps=1 + count)
    short = dataclasses.replace(long, num_inner_steps=1)
    step = Step(params, arguments.batch_size, arguments.image_size, long)
    alone, key = step.alone(), jax.random.key(0)
    seconds = timing.interleave(
        {
            "long": lambda: sample(params, step.y, key, config=long),
            "short": lambda: sample(params, step.y, key, config=short),
            "alone": lambda: [alone() for _ in range(count)][-1],
            "matmul": timing.matmuls(side, arguments.dtype),
        },
        arguments.repeats,
    )
    inside, outside = (seconds["long"] - seconds["short"]) / count, seconds["alone"] / count
    flop = count_flops(step.gradient(), *step.arguments())
    return {
        "inside": timing.spread(inside),
        "alone": timing.spread(outside),
        "inside over alone": timing.ratio(inside, outside),
        "FLOP": flop,
        "inside: FLOP/s over matmul": timing.over_matmul(flop, inside, seconds["matmul"], side),
        "matmul FLOP/s": timing.matmul_rate(seconds["matmul"], side),
    }


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another form of one function of the library; compiled code is forgotten before and after."""
    ours = getattr(module, name)
    setattr(module, name, value)
    jax.clear_caches()
    try:
        yield
    finally:
        setattr(module, name, ours)
        jax.clear_caches()


def _part_runs(step: Step, arguments: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Every part of a timestep, repeated in a compiled loop, and the FLOP of some, by name."""
    params, optimizer, grid = step.params, step.optimizer, step.tokens_grid()
    codec, phi, count = params.codec, step.log_prior, arguments.inner_steps
    codes = codes_like(codec, grid.shape)
    target = images(arguments.batch_size, arguments.image_size)
    both = jax.grad(lambda codes, params: jnp.sum((codec.decode(params, codes) - target) ** 2))
    expectation = jax.grad(lambda phi, codec: jnp.sum(codec.quantizer.expect(phi) ** 2))
    prior_term = jax.grad(lambda phi, p: jnp.sum(objective.prior_term(phi, p, step.tokens >= 0)))

    def adam(carry: Any) -> Any:
        phi, opt_state = carry
        updates, opt_state = optimizer.update(phi, opt_state)
        return phi + updates, opt_state

    def denoise(tokens: Array, params: Any) -> Array:
        logits = step.params.prior.apply(params, tokens)
        return jnp.where(logits[..., 0] > 1e9, 0, tokens)

    def decode(codes: Array, params: Any) -> Array:
        return codes + _TINY * jnp.mean(codec.decode(params, codes))

    runs: dict[str, Callable[[], Any]] = {
        "whole iteration": step.loop(),
        "decoder forward": _repeated(decode, count, codes, codec.params),
        "decoder forward and backward": _repeated(_nudged(both), count, codes, codec.params),
        "expectation, both ways": _repeated(_nudged(expectation), count, phi, codec),
        "prior term, both ways": _repeated(_nudged(prior_term), count, phi, phi),
        "adam": _repeated(adam, count, (phi, step.opt_state)),
        "denoiser": _repeated(denoise, count, grid, params.prior.params),
    }
    with_distance = with_lpips(params, arguments.image_size)
    if with_distance is not None:
        lpips = with_distance.perceptual
        distance = jax.grad(lambda a, b, lpips: jnp.sum(lpips.distance_to(a, b)))
        reference = jax.jit(lambda b, lpips: lpips.reference(b))(target, lpips)
        runs["LPIPS, both ways"] = _repeated(
            _nudged(distance), count, 0.5 * target, reference, lpips
        )
    return runs, {
        "decoder forward": count_flops(codec.decode, codec.params, codes),
        "decoder forward and backward": count_flops(both, codes, codec.params),
        "denoiser": count_flops(params.prior.apply, params.prior.params, grid),
    }


def part_section(params: Params, arguments: Any) -> dict[str, Any]:
    """Seconds of the parts of a timestep, and the FLOP rate of the networks.

    Each part is repeated in a compiled loop, as it is in the sampler, every round with what the one
    before has left: single calls would spend their time on fresh memory for their results.
    FLOP are those of products and convolutions (`aps_jax.flops`); they are compared with matrix
    products of the networks' dtype, in turns.
    """
    count = arguments.inner_steps
    config = aps_jax.APSConfig(num_steps=1, num_inner_steps=count)
    step = Step(params, arguments.batch_size, arguments.image_size, config)
    runs, flops = _part_runs(step, arguments)
    runs["matmul"] = timing.matmuls(arguments.matmul_side, arguments.dtype)
    seconds = timing.interleave(runs, arguments.repeats)
    products = seconds.pop("matmul")
    rows: dict[str, Any] = {name: timing.spread(values / count) for name, values in seconds.items()}
    for name, number in flops.items():
        rows[name]["FLOP"] = number
        rows[name]["FLOP/s over matmul"] = timing.over_matmul(
            number * count, seconds[name], products, arguments.matmul_side
        )
    return {"seconds": rows, "matmul FLOP/s": timing.matmul_rate(products, arguments.matmul_side)}


#: Leaves what it multiplies without effect, but not without use.
_TINY = 1e-12


def _nudged(gradient: Callable[..., Array]) -> Callable[..., Array]:
    """A gradient as a step of its argument, so that repetitions depend on each other."""
    return lambda x, *others: x + _TINY * gradient(x, *others)


def _repeated(step: Callable[..., Any], count: int, start: Any, *others: Any) -> Callable[[], Any]:
    """`count` applications of `step(carry, *others)` in a compiled loop."""

    @jax.jit
    def run(start: Any, *others: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, carry: step(carry, *others), start)

    return lambda: run(start, *others)


def core_section(params: Params, arguments: Any) -> dict[str, Any]:
    """The sampler, and the decoder's gradient, on one device and spread over all there are.

    Both have the same cores, and so have the matrix products, on one device. One device hands parts
    of single operations to the cores, several devices hand images.
    """
    count = len(jax.devices())
    batch = math.ceil(arguments.batch_size / count) * count
    config = aps_jax.APSConfig(num_steps=arguments.num_steps, num_inner_steps=arguments.inner_steps)
    codec = params.codec
    gradient = jax.jit(jax.grad(lambda codes, params: jnp.sum(codec.decode(params, codes) ** 2)))
    side = arguments.image_size // codec.stride
    codes = codes_like(codec, (batch, side, side))
    y = params.operator(images(batch, arguments.image_size))
    keys = image_keys(jax.random.key(0), batch)
    runs: dict[str, Callable[[], Any]] = {}
    for name, mesh in (
        ("one device", sharding.make_mesh(1)),
        (f"{count} devices", sharding.make_mesh()),
    ):
        own = sharding.shard_params(params, mesh)
        own_y, own_keys, own_codes = sharding.shard_batch((y, keys, codes), mesh)
        runs[f"sampler, {name}"] = functools.partial(sample, own, own_y, own_keys, config=config)
        runs[f"decoder, {name}"] = functools.partial(gradient, own_codes, own.codec.params)
    runs["matmul"] = timing.matmuls(arguments.matmul_side, arguments.dtype)
    seconds = timing.interleave(runs, arguments.repeats)
    products = seconds.pop("matmul")
    flops = count_flops(gradient, codes, codec.params)
    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        part = name.split(",")[0]
        rows[name] = timing.spread(values) | {
            "over one device": timing.ratio(values, seconds[f"{part}, one device"])
        }
        if part == "decoder":
            rows[name]["FLOP/s over matmul"] = timing.over_matmul(
                flops, values, products, arguments.matmul_side
            )
    rate = timing.matmul_rate(products, arguments.matmul_side)
    return {"batch": batch, "devices": count, "seconds": rows, "matmul FLOP/s": rate}


def whole_run(
    params: Params, *, batch: int, side: int, bits: int, T: int, M: int
) -> Callable[[], Any]:
    """A whole sampler call of these sizes, on random weights if `bits` are not the model's."""
    if bits != params.codec.quantizer.num_features:
        params = _random_model(params, bits)
    config = aps_jax.APSConfig(num_steps=T, num_inner_steps=M)
    y = params.operator(images(batch, side))
    return lambda: sample(params, y, jax.random.key(0), config=config).images


def _random_model(params: Params, bits: int) -> Params:
    """The same architecture with another codebook and random weights."""
    codec = dataclasses.replace(dict(params.codec.decode.settings)["config"], num_bits=bits)
    prior = dict(params.prior.apply.settings)["config"]
    prior = dataclasses.replace(
        prior,
        vocab_size=2**bits + 1,
        num_outputs=2**bits,
        code_bits=None if prior.code_bits is None else bits,
    )
    rng = np.random.default_rng(0)

    def draw(init: Callable[..., Any], config: Any) -> Any:
        shapes = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
        return jax.tree.map(
            lambda leaf: jnp.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype), shapes
        )

    return params.replace(
        codec=make_codec(codec, draw(init_codec_params, codec)),
        prior=make_prior(prior, draw(init_transformer_params, prior), window=params.prior.window),
    )
