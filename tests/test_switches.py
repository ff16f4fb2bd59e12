"""JAX's own switches change nothing: everything traces under each, to arrays of the same dtypes.

Other programs of the same user, or of the same process, need them: 64-bit numbers by default, and
no silent promotion of dtypes or ranks.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_operators as operator_cases
from conftest import make_tiny_codec, make_tiny_prior, mixing_prior, patch_codec
from contract import TOKENS, params_of, smallest

from aps_jax import Params, metrics, operators, samplers
from aps_jax.config import VARIANTS
from aps_jax.operators import measure
from aps_jax.presets import PRESETS, make_config
from aps_jax.prior.windows import prior_logits
from aps_jax.types import Perceptual

SWITCHES = {
    "x64": [lambda: jax.enable_x64(True)],
    "strict_dtypes": [lambda: jax.numpy_dtype_promotion("strict")],
    "no_rank_promotion": [lambda: jax.numpy_rank_promotion("raise")],
}
SWITCHES["all"] = [switch for switches in list(SWITCHES.values()) for switch in switches]


@pytest.fixture(params=SWITCHES, scope="module")
def switch(request):
    with contextlib.ExitStack() as stack:
        for context in SWITCHES[request.param]:
            stack.enter_context(context())
        jax.clear_caches()  # What was traced before says nothing.
        yield request.param


#: All switches together find what each finds; one by one, which says where, is a longer proof.
TOGETHER = pytest.mark.parametrize(
    "switch",
    [pytest.param(name, marks=[] if name == "all" else [pytest.mark.slow]) for name in SWITCHES],
    indirect=True,
)


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


def mean_square(params, a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def sampled(config):
    params = Params(
        prior=mixing_prior(window=4),
        codec=patch_codec(),
        operator=operators.super_resolution(scale=4),
        perceptual=Perceptual(params=None, apply=mean_square),
    )
    if config.NEEDS != "prior":
        params = params_of(config.NAME)
    run = functools.partial(samplers.sample, config=config)
    result = trace(run, params, jnp.asarray(Y), jax.random.key(0))
    assert result.images.dtype == np.float32
    assert result.tokens is None or result.tokens.dtype == np.int32


@TOGETHER
@pytest.mark.parametrize("name", TOKENS)
def test_samplers(switch, name):
    sampled(smallest(name))


@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name not in TOKENS])
def test_samplers_with_a_denoiser(name):
    with contextlib.ExitStack() as stack:
        for context in SWITCHES["all"]:
            stack.enter_context(context())
        sampled(smallest(name))


# "fine" is "draft" at the scale of "aps-l".
@TOGETHER
@pytest.mark.parametrize(
    ("preset", "variant"),
    [
        # What presets and variants add to each other is a longer proof.
        pytest.param(*pair, marks=[] if "draft" in pair or "aps" in pair else [pytest.mark.slow])
        for pair in itertools.product([name for name in PRESETS if name != "fine"], VARIANTS)
    ],
)
def test_presets(switch, preset, variant):
    sampled(make_config(preset=preset, sampler=variant, num_samples=2))


@TOGETHER
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "threshold", "warm_start": True},
        {"remasking": "random", "prior_weighting": "elbo", "prior_weight": 0.1},
        {"draw": "argmax", "encoder_start": 0.5},
        {"trace": True, "num_inner_steps": 0, "guidance_scale": 1.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_options_of_aps(switch, options):
    sampled(make_config(preset="paper", **options))


@TOGETHER
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


@TOGETHER
def test_codec_and_prior(switch):
    codec, prior = make_tiny_codec(), make_tiny_prior()
    for leaf in jax.tree.leaves((codec, prior)):
        assert leaf.dtype == np.float32
    x = jnp.zeros((2, 24, 16, 3), jnp.float32)
    features = trace(codec.encode, codec.params, x)
    assert trace(codec.decode, codec.params, features).dtype == np.float32
    tokens = trace(lambda codec, features: codec.quantizer.nearest(features), codec, features)
    assert tokens.dtype == np.int32
    tokens = jnp.zeros(tokens.shape, jnp.int32)
    assert trace(prior_logits, prior, tokens).dtype == np.float32


@TOGETHER
def test_scores(switch):
    x = jnp.zeros((2, 16, 16, 3), jnp.float32)
    for score in (metrics.psnr, metrics.ssim):
        assert trace(score, x, x).dtype == np.float32
