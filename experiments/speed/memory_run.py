"""Runs the sampler once with random weights, and holds its memory against XLA's plan."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.prior.transformer import num_params
from aps_jax.types import PyTree, image_keys


def confirm(compiled: Any, inputs: tuple[PyTree, ...], devices: int) -> dict[str, Any]:
    """Runs a compiled sampler once with random weights; its memory beside what XLA planned.

    Bytes are of all devices of the mesh: forced CPU devices share their host's memory.

    Args:
      compiled: the sampler.
      inputs: shapes of its parameters, measurement and keys.
      devices: how many it runs on.
    """
    planned = compiled.memory_analysis()
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(image_keys(jax.random.key(0), len(leaf)), leaf.sharding)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        scale = 1 / math.sqrt(math.prod(leaf.shape[-2:-1]) or 1)
        return jax.make_array_from_callback(
            leaf.shape,
            leaf.sharding,
            lambda index: _noise(rng, leaf, index) * np.asarray(scale, leaf.dtype),
        )

    before = _held("now")
    values = jax.block_until_ready(jax.tree.map(draw, inputs))
    gc.collect()  # JAX keeps the last NumPy arrays in a cycle.
    loaded = _held("now")
    Path("/proc/self/clear_refs").write_text("5")  # The peak of the process starts anew.
    began = time.perf_counter()
    result = jax.block_until_ready(compiled(*values))
    seconds, peak = time.perf_counter() - began, _held("peak")
    return {
        "prior_params": num_params(inputs[0].prior.params["model"]),
        "planned_argument_bytes": devices * planned.argument_size_in_bytes,
        "loaded_bytes": loaded - before,
        "planned_bytes_beside_them": devices
        * (planned.temp_size_in_bytes + planned.output_size_in_bytes),
        "peak_bytes_beside_them": peak - loaded,
        "is_finite": bool(jnp.isfinite(result.images).all()),
        "seconds": round(seconds, 1),
    }


def _noise(
    rng: np.random.Generator, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """Normal numbers for one device's part of an array."""
    shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
    return rng.standard_normal(shape, np.float32).astype(leaf.dtype)


def _held(when: str) -> int:
    """Bytes that all devices hold now or held at their peak; Linux knows it of a process."""
    if jax.default_backend() != "cpu":
        name = {"now": "bytes_in_use", "peak": "peak_bytes_in_use"}[when]
        return sum(device.memory_stats()[name] for device in jax.devices())
    name = {"now": "VmRSS", "peak": "VmHWM"}[when]
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError("--confirm needs Linux, which tells how much memory a process has")
