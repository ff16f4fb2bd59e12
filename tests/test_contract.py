"""The contract of `aps_jax.sampling.run.Sampler`, for every sampler of the registry.

A new sampler is tested as it is entered there: its smallest options are found from its fields.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import samplers
from aps_jax.config import Evaluations
from aps_jax.samplers import SAMPLERS, sampler_of, target_of
from aps_jax.sampling.run import StepInfo

METHODS = {
    "init": ["target", "keys"],
    "step": ["target", "state", "keys"],
    "finish": ["target", "state", "keys"],
    "evaluations": [],
}
EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


@EVERY_SAMPLER
def test_signatures_and_state(name):
    """The functions have the names and arguments of the protocol, and the state can be scanned."""
    config = contract.smallest(name)
    sampler = sampler_of(config)
    for method, arguments in METHODS.items():
        assert list(inspect.signature(getattr(sampler, method)).parameters) == arguments
    assert isinstance(sampler.num_iterations, int) and sampler.num_iterations >= 1
    assert sampler.trace is False and hash(config) == hash(contract.smallest(name))
    promised = sampler.evaluations()
    assert isinstance(promised, Evaluations) and promised == config.evaluations()
    assert all(isinstance(count, int) and count >= 0 for count in promised)
    has_tokens, is_latent = name in contract.TOKENS, name in contract.LATENTS
    assert promised.decoder >= (1 if has_tokens or is_latent else 0)  # the final picture

    params, rows = contract.params_of(name), contract.BATCH * contract.SAMPLES
    y = params.operator(contract.random_images())

    def shapes_of(key):
        target = target_of(params, y, config=config)
        keys = target.keys(key)
        before = sampler.init(target, keys)
        after, info = sampler.step(target, before, keys)
        works = [state.tokens if has_tokens else state.x for state in (before, after)]
        found = (*works, sampler.finish(target, after, keys))
        return before, after, info, found, before.step

    before, after, info, works, step = jax.eval_shape(shapes_of, jax.random.key(0))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
    grid = (4, 4, contract.NUM_BITS) if is_latent else (contract.SIDE, contract.SIDE, 3)
    shape = (rows, contract.LENGTH) if has_tokens else (rows, *grid)
    for found in works:
        assert (found.shape, found.dtype) == (shape, jnp.int32 if has_tokens else jnp.float32)
    assert (step.shape, step.dtype) == ((), jnp.int32)
    assert isinstance(info, StepInfo) and info.trace is None
    assert [leaf.shape for leaf in jax.tree.leaves(info)] == [(rows,)] * 4


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in SAMPLERS if name not in contract.LATENTS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in contract.LATENTS),
    ],
)
def test_what_one_compilation_shows(name):
    """No mask left, known tokens, rows, keys, shapes, calls and compilations: `contract.check`."""
    contract.check(contract.smallest(name))


@pytest.mark.slow
@EVERY_SAMPLER
def test_an_image_alone_is_the_image_in_a_batch(name):
    params = contract.params_of(name)
    y = params.operator(contract.random_images())
    keys = jax.random.split(jax.random.key(3), contract.BATCH)
    sample = jax.jit(samplers.sample, static_argnames="config")
    run = functools.partial(sample, params, config=contract.smallest(name))
    together, alone = run(y, keys), run(y[1:2], keys[1:2])
    if name in contract.TOKENS:
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_allclose(alone.samples[0], together.samples[1], atol=1e-5)


@pytest.mark.slow
def test_results_do_not_depend_on_the_mesh():
    """Device counts are fixed when JAX starts, so the run has a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, Path(contract.__file__)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert facts["devices"] == 4 and set(facts["samplers"]) == set(SAMPLERS)
    for name, found in facts["samplers"].items():
        assert found["same_tokens"] and found["image_error"] < 1e-5, name
        assert found["shards"] == 4, name
