"""JAX's own switches change nothing: everything traces under each, to arrays of the same dtypes.

Other programs of the same user, or of the same process, need them: 64-bit numbers by default, and
no silent promotion of dtypes or ranks.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_operators as operator_cases
import test_samplers as sampler_cases
from conftest import NUM_BITS, NUM_CODES, make_tiny_codec, make_tiny_prior

from aps_jax import metrics
from aps_jax.config import VARIANTS
from aps_jax.operators import measure
from aps_jax.presets import PRESETS, make_config
from aps_jax.prior.windows import prior_logits
from aps_jax.sampler import aps_sample
from aps_jax.samplers import SAMPLERS

SWITCHES = {
    "x64": [lambda: jax.enable_x64(True)],
    "strict_dtypes": [lambda: jax.numpy_dtype_promotion("strict")],
    "no_rank_promotion": [lambda: jax.numpy_rank_promotion("raise")],
}
SWITCHES["all"] = [switch for switches in list(SWITCHES.values()) for switch in switches]


@pytest.fixture(params=SWITCHES)
def switch(request):
    with contextlib.ExitStack() as stack:
        for context in SWITCHES[request.param]:
            stack.enter_context(context())
        jax.clear_caches()  # What was traced before says nothing.
        yield request.param


def wide(jaxpr):
    """The 64-bit floating-point arrays inside a traced function, and inside its loops."""
    found = []
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            aval = variable.aval
            # A Python number is a scalar of the widest kind until it meets an array.
            if getattr(aval, "dtype", None) == np.float64 and aval.size > 1:
                found.append(str(equation)[:200])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                found += wide(getattr(inner, "jaxpr", inner))
    return found


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def trace(function, *arguments):
    """The output's shapes and dtypes; no float64 may be in it or on the way to it."""
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
    assert not wide(jaxpr.jaxpr)
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype.itemsize < 8, out
    return out


def test_the_watch_finds_wide_numbers():
    """`trace` must fail where something is computed in 64 bits, in a loop too."""
    with jax.enable_x64(True):
        x = jnp.zeros(3, jnp.float32)

        def looped(x):
            return jax.lax.fori_loop(0, 2, lambda _, c: (c.astype(float) * 2).astype(x.dtype), x)

        assert wide(jax.make_jaxpr(looped)(x).jaxpr)
        assert not wide(jax.make_jaxpr(lambda x: 2 * x + 0.5)(x).jaxpr)


Y = np.zeros((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(switch, name):
    params, key = sampler_cases.make_params(), jax.random.key(0)
    for options in sampler_cases.CASES[name]:
        config = SAMPLERS[name].config(**options, num_samples=2)
        sample = functools.partial(SAMPLERS[name].sample, config=config)
        result = trace(sample, params, jnp.asarray(Y), key)
        assert result.images.dtype == np.float32 and result.tokens.dtype == np.int32


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets(switch, preset, variant):
    config = make_config(preset=preset, sampler=variant, num_samples=2)
    params = sampler_cases.make_params()
    trace(functools.partial(aps_sample, config=config), params, jnp.asarray(Y), jax.random.key(0))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "threshold", "early_stop": 0.1},
        {"warm_start": "displacement", "warm_moments": True, "prior_term": "kl"},
        {"remasking": "random", "prior_weighting": "elbo", "prior_weight": 0.1},
        {"draw": "argmax", "gumbel_temperature": 1.0, "remdm": "cap", "rule": "threshold"},
        {"trace": True, "num_inner_steps": 0, "guidance_scale": 1.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_options_of_aps(switch, options):
    config = make_config(preset="paper", **options)
    params = sampler_cases.make_params()
    trace(functools.partial(aps_sample, config=config), params, jnp.asarray(Y), jax.random.key(0))


@pytest.mark.parametrize("name", operator_cases.CASES)
def test_operators(switch, name):
    key, shape = jax.random.key(0), operator_cases.SHAPE
    operator = operator_cases.make(name).init(key, shape)
    x = jnp.zeros((2, *shape, 3), jnp.float32)
    if name not in operator_cases.HOST_INIT:
        trace(lambda key: operator_cases.make(name).init(key, shape), key)
    y = trace(lambda operator, x: measure(key, x, operator=operator, sigma=0.1), operator, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {np.dtype(np.float32)}
    gradient = trace(lambda operator, x, y: jax.vjp(operator, x)[1](y)[0], operator, x, y)
    assert gradient.dtype == np.float32
    for leaf in jax.tree.leaves(operator):
        assert leaf.dtype != np.float64


def test_codec_and_prior(switch):
    codec, prior = make_tiny_codec(), make_tiny_prior()
    x = jnp.zeros((2, 24, 16, 3), jnp.float32)

    def there_and_back(codec, x):
        codes, tokens = codec.quantize(codec.codebook, codec.encode(codec.params, x))
        return codec.decode(codec.params, codes), tokens

    image, tokens = trace(there_and_back, codec, x)
    assert image.dtype == np.float32 and tokens.dtype == np.int32
    logits = jnp.zeros((2, 24, NUM_CODES), jnp.float32)
    assert trace(codec.mean_code, logits).shape == (2, 24, NUM_BITS)
    tokens = jnp.zeros(tokens.shape, jnp.int32)
    assert trace(prior_logits, prior, tokens).dtype == np.float32


def test_scores(switch):
    x = jnp.zeros((2, 16, 16, 3), jnp.float32)
    for score in (metrics.psnr, metrics.ssim):
        assert trace(score, x, x).dtype == np.float32
