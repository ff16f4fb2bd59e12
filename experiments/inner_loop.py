"""One inner iteration inside the compiled sampler against the same iteration as a jitted call.

    python -m experiments.inner_loop [--out runs/inner_loop.json]

XLA's CPU backend can compile the gradient of a convolution far worse inside a loop than outside
it; `aps_jax.convolution` exists to avoid that, and this shows that it does. Both sides run the
embedded model in this process, alternating, and the medians and spreads are of the same machine
state. `stock gradient` repeats the measurement with JAX's own convolution gradient.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import aps_jax
from aps_jax import convolution, likelihood
from aps_jax.files import write_json
from aps_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      model: embedded model or folder.
      image_size: side of the images.
      batch_size: images at once.
      inner_steps: iterations per timed loop.
      repeats: timed runs per side.
      out: JSON file for the result.
    """

    model: str = "photo64"
    image_size: int = 64
    batch_size: int = 4
    inner_steps: int = 10
    repeats: int = 9
    out: Path | None = None


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def compare(params: Params, arguments: Arguments) -> dict[str, float]:
    """Median seconds per iteration inside the sampler and outside it, and their ratio.

    Inside: the difference between `aps_sample` with 1 + n and with 1 inner steps, over n, so that
    the denoiser and the remasking cancel. Outside: the same objective, gradient and Adam update as
    one jitted call.
    """
    side, steps = arguments.image_size, arguments.inner_steps
    key = jax.random.key(0)
    x = jax.random.uniform(key, (arguments.batch_size, side, side, 3), minval=-1, maxval=1)
    y = aps_jax.measure(key, x, operator=params.operator, sigma=0.05)
    config = aps_jax.APSConfig(num_steps=1, num_inner_steps=1 + steps)
    one = dataclasses.replace(config, num_inner_steps=1)
    sample = jax.jit(aps_jax.aps_sample, static_argnames="config")

    grid = (side // params.codec.stride,) * 2
    tokens = jnp.full((arguments.batch_size, grid[0] * grid[1]), params.codec.num_codes)
    log_prior = jax.nn.log_softmax(
        params.prior.apply(params.prior.params, tokens.reshape(-1, *grid)).reshape(
            *tokens.shape, -1
        )
    )
    optimizer = likelihood.make_optimizer(config)

    @jax.jit
    def iteration(params, y, phi, opt_state, log_prior, tokens):
        def total(phi):
            losses = likelihood.objective(
                params, y, phi, log_prior, tokens, jnp.ones(()),
                grid=grid, image_shape=(side, side), config=config,
            )  # fmt: skip
            return jnp.sum(losses)

        updates, opt_state = optimizer.update(jax.grad(total)(phi), opt_state)
        return phi + updates, opt_state

    opt_state = optimizer.init(log_prior)
    runs = {
        "loop": lambda: sample(params, y, key, config=config),
        "one": lambda: sample(params, y, key, config=one),
        "alone": lambda: iteration(params, y, log_prior, opt_state, log_prior, tokens),
    }
    for function in runs.values():
        _seconds(function)
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, function in runs.items():
            repeat = steps if name == "alone" else 1
            times[name].append(sum(_seconds(function) for _ in range(repeat)) / repeat)
    inside = (np.array(times["loop"]) - np.array(times["one"])) / steps
    outside = np.array(times["alone"])
    return {
        "inside": float(np.median(inside)),
        "inside_spread": float(np.std(inside)),
        "outside": float(np.median(outside)),
        "outside_spread": float(np.std(outside)),
        "ratio": float(np.median(inside) / np.median(outside)),
    }


def main(arguments: Arguments) -> None:
    """Measures with the library's convolution gradient, then with JAX's own."""
    model = aps_jax.load_pretrained(arguments.model)
    operator = aps_jax.operators.super_resolution(scale=4)
    params = Params(prior=model.prior, codec=model.codec, operator=operator)
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    result |= {"arguments": {k: str(v) for k, v in dataclasses.asdict(arguments).items()}}
    result["library gradient"] = compare(params, arguments)
    ours = convolution._unit_stride
    convolution._unit_stride = convolution._unit_stride.fun
    jax.clear_caches()
    try:
        result["stock gradient"] = compare(params, arguments)
    finally:
        convolution._unit_stride = ours
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
