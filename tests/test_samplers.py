"""Laws that hold for every sampler of the registry, on models too small to draw anything."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aps_jax.sampling.estimate import smooth_estimate
from conftest import NUM_CODES, mixing_prior, patch_codec

from aps_jax import Params, operators
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.samplers import SAMPLERS, budget
from aps_jax.types import Perceptual

LENGTH, BATCH, SIDE = 16, 2, 16

#: Options that keep a sampler small; several sets where they change the course of its loop.
CASES = {
    "aps": [
        {"num_steps": 3, "num_inner_steps": 2, "draw": "categorical"},
        {"num_steps": 4, "num_inner_steps": 1, "remdm": "cap", "remask_strength": 0.5},
    ],
    "maskgit": [
        {"num_steps": 3, "guidance_scale": 1.0},
        {"num_steps": 3, "reveal": "remdm-conf", "remask_strength": 1.0},
    ],
    "mmada": [{"num_steps": 3, "guidance_scale": 1.0}],
    "best_of_n": [{"num_steps": 2, "num_candidates": 3}],
    "straight_through": [
        {"num_inner_steps": 4},
        {"num_inner_steps": 3, "variables": "tokens", "measurement_term": "l1"},
    ],
    "svdd_pm": [
        {"num_steps": 2, "num_candidates": 3},
        {"num_steps": 2, "num_candidates": 2, "selection": "standardized", "guidance_scale": 0.5},
    ],
    "g2d2": [
        {"num_steps": 3, "num_inner_steps": 2},
        {"num_steps": 2, "num_inner_steps": 2, "transition": "markov", "measurement_term": "l1"},
        {"num_steps": 4, "num_inner_steps": 1, "remdm": "rescale", "remask_strength": 0.9},
    ],
    "sgdd": [
        {"num_steps": 2, "num_likelihood_steps": 3, "num_denoise_steps": 2, "proposal": "bit"},
        {
            "num_steps": 2,
            "num_likelihood_steps": 2,
            "num_denoise_steps": 3,
            "method": "gibbs",
            "coupling": "code",
            "guidance_scale": 1.0,
        },
        {
            "num_steps": 2,
            "num_likelihood_steps": 2,
            "num_denoise_steps": 4,
            "remdm": "rescale",
            "remask_strength": 0.9,
        },
    ],
    "smc": [
        {"num_steps": 2, "num_particles": 3, "num_fills": 2, "weights": "absolute"},
        {"num_steps": 2, "num_particles": 2, "fill": "mode", "output": "best"},
    ],
    "entrgi": [
        {"num_steps": 2, "num_inner_steps": 2, "num_trajectories": 2, "order": "anchor"},
        {"num_steps": 4, "num_inner_steps": 1, "remdm": "cap", "remask_strength": 0.5},
    ],
    "redge": [
        {"num_steps": 3, "num_inner_steps": 2},
        {"num_steps": 2, "num_inner_steps": 2, "estimator": "gumbel", "guidance_scale": 1.0},
        {"num_steps": 4, "num_inner_steps": 1, "remdm": "rescale", "remask_strength": 0.9},
    ],
}
# The first options of every sampler, and the others, which compile as long again, as slow tests.
PAIRS = [
    pytest.param(
        name,
        options,
        id=f"{name}-{'-'.join(map(str, options.values()))}",
        marks=[pytest.mark.slow] if index else [],
    )
    for name, cases in CASES.items()
    for index, options in enumerate(cases)
]


@functools.cache
def jitted(name):
    return jax.jit(SAMPLERS[name].sample, static_argnames="config")


@functools.cache
def random_images(batch=3):
    rng = np.random.default_rng(7)
    return jnp.asarray(np.tanh(rng.normal(size=(batch, SIDE, SIDE, 3))), jnp.float32)


def mean_square(params, a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def make_params():
    return Params(
        prior=mixing_prior(window=4),
        codec=patch_codec(),
        operator=operators.super_resolution(scale=4),
        perceptual=Perceptual(params=None, apply=mean_square),
    )


def test_every_sampler_is_tested_and_every_default_has_a_source():
    assert set(CASES) == set(SAMPLERS)
    for sampler in SAMPLERS.values():
        assert sampler.sample.__doc__ and sampler.config.__doc__
        assert re.search(r"arXiv:\d{4}\.\d{4,5}|no paper", sampler.paper)
        options = [option for group in sampler.defaults.values() for option in group]
        assert sorted(options) == sorted(f.name for f in dataclasses.fields(sampler.config))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"maskgit", "mmada"}))
@pytest.mark.parametrize("evaluations", [16, 40, 120, 1000])
def test_budgets_are_used_up_and_never_exceeded(name, evaluations):
    start = SAMPLERS[name].config()
    config = budget.with_budget(start, evaluations, fixed=())
    cost = budget.decoder_evaluations(config)
    knob = budget.KNOBS[type(config)]
    assert evaluations / 2 <= cost <= evaluations
    # One more would be too many.
    more = dataclasses.replace(config, **{knob.name: getattr(config, knob.name) + 1})
    assert budget.decoder_evaluations(more) > evaluations
    changed = {knob.name, "num_steps"} if knob.scales_steps else {knob.name}
    for field in dataclasses.fields(config):
        if field.name not in changed:
            assert getattr(config, field.name) == getattr(start, field.name)
    if knob.scales_steps:
        fixed = budget.with_budget(
            dataclasses.replace(start, num_steps=2), evaluations, fixed=["num_steps"]
        )
        assert fixed.num_steps == 2
        assert budget.decoder_evaluations(fixed) <= evaluations


def test_impossible_budgets():
    with pytest.raises(ValueError, match="of 14 decoder evaluations is too small.*needs 15"):
        budget.with_budget(SAMPLERS["aps"].config(), 14)
    with pytest.raises(ValueError, match="too small for SMCConfig"):
        budget.with_budget(SAMPLERS["smc"].config(), 7)
    with pytest.raises(ValueError, match="decides num_candidates"):
        budget.with_budget(SAMPLERS["svdd_pm"].config(), 99, fixed=["num_candidates"])
    with pytest.raises(ValueError, match="it has no budget"):
        budget.with_budget(SAMPLERS["maskgit"].config(), 99)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_laws_of_every_sampler(name, options):
    params = make_params()
    y = params.operator(random_images())
    config = SAMPLERS[name].config(**options, num_samples=2)
    known = np.full((3, LENGTH), NUM_CODES)
    known[0, [0, 5, 15]] = [3, 0, 15]
    run = functools.partial(jitted(name), config=config)
    keys = jax.random.split(jax.random.key(3), 3)
    result = run(params, y, keys, known_tokens=jnp.asarray(known))

    assert result.images.shape == (3, SIDE, SIDE, 3) and result.images.dtype == jnp.float32
    assert result.samples.shape == (3, 2, SIDE, SIDE, 3)
    assert result.tokens.shape == (3, LENGTH) and result.tokens.dtype == jnp.int32
    assert 0 <= np.min(result.tokens) and np.max(result.tokens) < NUM_CODES
    assert np.asarray(result.tokens)[0, [0, 5, 15]].tolist() == [3, 0, 15]
    for leaf in (result.info.loss, result.info.num_masked, result.info.is_finite):
        assert leaf.shape[1:] == (2, 3)
    assert np.all(result.info.is_finite) and np.all(result.info.num_masked[-1] == 0)
    # The image is the picture of the tokens.
    codes = params.codec.codebook[result.tokens].reshape(3, 4, 4, -1)
    expected = jnp.clip(params.codec.decode(params.codec.params, codes), -1, 1)
    np.testing.assert_allclose(result.images, expected, atol=1e-6)
    # Chance plays a part, in the samples too, and the same key plays the same part.
    assert np.any(result.samples[:, 0] != result.samples[:, 1])
    again = run(params, y, keys, known_tokens=jnp.asarray(known))
    np.testing.assert_array_equal(again.tokens, result.tokens)
    others = jax.random.split(jax.random.key(4), 3)
    assert np.any(run(params, y, others, known_tokens=jnp.asarray(known)).tokens != result.tokens)
    # The rest of the batch is of no account.
    moved = run(params, y.at[1:].set(0.5), keys, known_tokens=jnp.asarray(known))
    np.testing.assert_array_equal(moved.tokens[0], result.tokens[0])
    backwards = run(params, y[::-1], keys[::-1], known_tokens=jnp.asarray(known[::-1]))
    np.testing.assert_array_equal(backwards.tokens[::-1], result.tokens)
    np.testing.assert_allclose(backwards.samples[::-1], result.samples, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_images_alone_equal_images_in_a_batch(name, options):
    """A loss that were averaged over the batch would show here and nowhere else."""
    params = make_params()
    y, keys = params.operator(random_images()), jax.random.split(jax.random.key(3), 3)
    run = functools.partial(jitted(name), params, config=SAMPLERS[name].config(**options))
    together, alone = run(y, keys), run(y[1:2], keys[1:2])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_allclose(alone.images[0], together.images[1], atol=1e-5)


CALLS = {"denoiser": 0, "decoder": 0}


def count_call(name, _):
    CALLS[name] += 1


def counted_prior(params, tokens):
    jax.debug.callback(functools.partial(count_call, "denoiser"), tokens[0, 0, 0])
    return mixing_prior().apply(params, tokens)


def counted_unconditional(params, tokens):
    jax.debug.callback(functools.partial(count_call, "denoiser"), tokens[0, 0, 0])
    return mixing_prior().apply_unconditional(params, tokens)


def counted_decode(params, codes):
    jax.debug.callback(functools.partial(count_call, "decoder"), codes[0, 0, 0, 0])
    return patch_codec().decode(params, codes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_evaluations_are_those_that_happen(name, options):
    params = make_params()
    params = params.replace(
        prior=params.prior.replace(apply=counted_prior, apply_unconditional=counted_unconditional),
        codec=params.codec.replace(decode=counted_decode),
    )
    y = params.operator(random_images(1))
    config = SAMPLERS[name].config(**options)
    CALLS.update(denoiser=0, decoder=0)
    jax.block_until_ready(jitted(name)(params, y, jax.random.key(0), config=config))
    jax.effects_barrier()
    promised = config.evaluations()
    assert CALLS["denoiser"] == promised.denoiser
    # A gradient evaluates the decoder once on its way.
    assert CALLS["decoder"] == promised.decoder + promised.decoder_gradient


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_and_shapes_are_checked(name):
    config_class = SAMPLERS[name].config
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        config_class(sigma=0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        config_class(num_samples=0)
    config = config_class(image_shape=[20, 16])
    assert config == config_class(image_shape=(20, 16)) and hash(config)
    with pytest.raises(ValueError, match=r"y has shape \(2, 4, 4, 3\).*\(2, 5, 4, 3\)"):
        SAMPLERS[name].sample(
            make_params(), jnp.zeros((2, 4, 4, 3)), jax.random.key(0), config=config
        )


BAD_OPTIONS = [
    ("maskgit", {"reveal": "best"}, "reveal is 'best'; choose from"),
    ("maskgit", {"remask_strength": 1.5}, r"remask_strength must be in \[0, 1\]"),
    ("maskgit", {"schedule": "cos"}, "schedule is 'cos'; choose from"),
    ("maskgit", {"prior_temperature": 0.0}, "prior_temperature must be positive"),
    ("best_of_n", {"num_candidates": 0}, "num_candidates must be an integer of at least 1"),
    ("straight_through", {"variables": "codes"}, "variables is 'codes'; choose from"),
    ("straight_through", {"measurement_term": "l2"}, "measurement_term is 'l2'; choose from"),
    ("straight_through", {"learning_rate": -1.0}, "learning_rate must be positive"),
    ("svdd_pm", {"selection": "best"}, "selection is 'best'; choose from"),
    ("svdd_pm", {"selection_temperature": 0.0}, "selection_temperature must be positive"),
    ("g2d2", {"transition": "stars"}, "transition is 'stars'; choose from"),
    ("g2d2", {"forget": 1.2}, r"forget must be in \[0, 1\]"),
    ("sgdd", {"method": "exact"}, "method is 'exact'; choose from"),
    ("sgdd", {"last_noise": 0.0}, "last_noise must be positive"),
    ("sgdd", {"first_noise": 1.5}, r"first_noise must be in \[0, 1\]"),
    ("sgdd", {"num_likelihood_steps": -1}, "num_likelihood_steps must be an integer of at least 0"),
    ("smc", {"weights": "even"}, "weights is 'even'; choose from"),
    ("smc", {"num_particles": 0}, "num_particles must be an integer of at least 1"),
    ("entrgi", {"mixing": "both"}, "mixing is 'both'; choose from"),
    ("entrgi", {"temperature": 0.0}, "temperature must be positive"),
    ("redge", {"estimator": "st"}, "estimator is 'st'; choose from"),
    ("redge", {"num_diffusion_steps": 2}, "num_diffusion_steps must be an integer of at least 3"),
    ("g2d2", {"top_p": 0.0}, "top_p must be positive"),
    ("g2d2", {"transition": "markov", "remdm": "cap"}, "remdm masks clean tokens again"),
    ("aps", {"remdm": "conf"}, "remdm is 'conf'; choose from"),
    ("redge", {"remdm": "cap", "remask_strength": -1}, r"remask_strength must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].config(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("straight_through", {"init_noise": 0.0}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("aps", {"num_steps": 1}),
                ("g2d2", {"num_steps": 1}),
                ("redge", {"num_steps": 1}),
                ("entrgi", {"num_steps": 1, "num_trajectories": 1}),
                ("straight_through", {"init_noise": 0.0, "variables": "tokens"}),
            ]
        ),
    ],
)
def test_every_gradient_sampler_can_start_from_the_encoder(name, options):
    """With a strong start and no learning, all samples are the codes of the smooth estimate."""
    params = make_params()
    y = params.operator(random_images()[:BATCH])
    options = options | {"num_inner_steps": 1, "learning_rate": 1e-6, "num_samples": 2}
    config = SAMPLERS[name].config(**options, encoder_start=40.0)
    result = jitted(name)(params, y, jax.random.key(0), config=config)
    x = smooth_estimate(params.operator, y, image_shape=(SIDE, SIDE), sigma=config.sigma)
    np.testing.assert_array_equal(result.tokens, encode_tokens(params.codec, x).reshape(BATCH, -1))
    np.testing.assert_allclose(result.samples[:, 0], result.samples[:, 1], atol=1e-6)
    plain = dataclasses.replace(config, encoder_start=0.0)
    other = jitted(name)(params, y, jax.random.key(0), config=plain)
    assert np.mean(np.asarray(other.tokens) == np.asarray(result.tokens)) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aps", "g2d2", "redge", "entrgi"])
def test_remdm_masks_clean_tokens_again_and_keeps_the_schedule(name):
    """Step by step: with a strength of 1 many clean tokens are lost, known ones never."""
    params = make_params()
    y = params.operator(random_images())
    known = np.full((3, LENGTH), NUM_CODES)
    known[0, :8] = 3
    plain = SAMPLERS[name].config(num_steps=4, num_inner_steps=1)
    remdm = dataclasses.replace(plain, remdm="rescale", remask_strength=1.0)
    run = functools.partial(jitted(name), params, y, jax.random.key(0))
    results = [run(config=config, known_tokens=jnp.asarray(known)) for config in (plain, remdm)]
    assert np.any(results[0].tokens != results[1].tokens)
    for result in results:
        assert np.all(np.asarray(result.tokens)[0, :8] == 3)
        num_masked = np.asarray(result.info.num_masked)
        if num_masked.shape[0] > 1:  # Half known, half as many masked.
            np.testing.assert_array_equal(num_masked[-1], 0)
