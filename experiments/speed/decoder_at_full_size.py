"""Runs the full MagVIT-v2 decoder once with random weights, and reports seconds and memory.

    python -m experiments.decoder_at_full_size [--image-size 256] [--batch-size 1] [--gradient]

It shows that the tokenizer of 95 million parameters fits the code and the machine before any
weights are fetched. `--gradient` adds the backward pass to the codes, of which the sampler runs
T * M.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.codec.magvit2 import CodecConfig, init_codec_params, make_codec
from aps_jax.flops import count_flops
from aps_jax.io.files import write_json
from aps_jax.prior.transformer import num_params
from experiments.command import command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      image_size: side in pixels, a multiple of 16.
      batch_size: images at once.
      dtype: of activations.
      gradient: run the backward pass as well.
      out: JSON file for the result.
    """

    image_size: int = 256
    batch_size: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient: bool = False
    out: Path | None = None


def random_params(config: CodecConfig) -> Any:
    """Weights that keep activations of order one, without compiling an initialiser."""
    abstract = jax.eval_shape(lambda key: init_codec_params(key, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.1 * noise)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        return jnp.asarray(noise / np.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(draw, abstract)


@command("decoder_at_full_size", memory_cure="lower --image-size or --batch-size")
def main(arguments: Arguments) -> None:
    """Compiles the decoder, runs it once and prints what it took."""
    config = CodecConfig(dtype=arguments.dtype)
    codec = make_codec(config, random_params(config))
    side = arguments.image_size // config.stride
    shape = (arguments.batch_size, side, side)
    codes = codec.codebook[np.random.default_rng(1).integers(codec.num_codes, size=shape)]

    def decode(params: Any, codes: jax.Array) -> jax.Array:
        return codec.decode(params, codes)

    def run(params: Any, codes: jax.Array) -> tuple[jax.Array, ...]:
        if not arguments.gradient:
            return (decode(params, codes),)
        x, pull = jax.vjp(lambda codes: decode(params, codes), codes)
        return x, *pull(jnp.ones_like(x))

    began = time.perf_counter()
    compiled = jax.jit(run).lower(codec.params, codes).compile()
    seconds_to_compile, began = time.perf_counter() - began, time.perf_counter()
    cpu = time.process_time()
    outputs = jax.block_until_ready(compiled(codec.params, codes))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    expected = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    is_finite = all(bool(jnp.isfinite(output).all()) for output in outputs)
    if outputs[0].shape != expected or not is_finite:
        raise ArithmeticError(f"got {outputs[0].shape} instead of {expected}, or NaN")
    result = {
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "gradient": arguments.gradient,
        "device": jax.devices()[0].device_kind,
        "params": num_params(codec.params),
        "tflop": count_flops(run, codec.params, codes) / 1e12,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "seconds_to_compile": round(seconds_to_compile, 1),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
