"""Laws of the sampler that hold for every option, on models too small to draw anything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_CODES, mixing_prior, patch_codec

import aps_jax
from aps_jax import APSConfig, Params, operators, schedules
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.sampler import make_aps
from aps_jax.samplers import MaskGITConfig
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.sampling.starts import encoder_logits
from aps_jax.sampling.target import measurement_target
from aps_jax.types import Perceptual, image_keys

SIDE, LENGTH, BATCH = 16, 16, 2  # 16x16 pixels are 4x4 tokens of stride 4
SMALL = {"num_steps": 4, "num_inner_steps": 2, "learning_rate": 0.5}

sample = jax.jit(aps_jax.aps_sample, static_argnames="config")


@functools.cache
def random_images(batch=8, height=SIDE, width=SIDE):
    rng = np.random.default_rng(7)
    return jnp.asarray(np.tanh(rng.normal(size=(batch, height, width, 3))), jnp.float32)


def random_mask(seed=0, height=SIDE, width=SIDE):
    return np.random.default_rng(seed).uniform(size=(height, width)) > 0.5


def make_params(operator=None, seed=0, **settings):
    return Params(
        prior=mixing_prior(window=4, seed=seed),
        codec=patch_codec(seed=seed),
        operator=operators.super_resolution(scale=4) if operator is None else operator,
        **settings,
    )


def measured(params, batch=BATCH):
    return params.operator(random_images()[:batch])


def mean_square(params, a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


# Laws over all options.

OPTIONS = {
    "aps": {},
    "aps-i": {"remasking": "standard"},
    "aps-l": {"decode_scale": 2},
    "random": {"remasking": "random", "draw": "argmax"},
    "categorical": {"draw": "categorical", "schedule": "square", "prior_weight": 0.1},
    "threshold": {"rule": "threshold", "threshold": 0.3},
    "linear": {"schedule": "linear", "warm_start": True},
    "sqrt": {"schedule": "sqrt", "remasking": "random"},
    "gaussian": {"measurement_term": "gaussian", "prior_weight": 1.0, "prior_weighting": "elbo"},
    "perceptual, one step": {"perceptual_weight": 0.1, "num_steps": 1},
    "guidance": {"guidance_scale": 1.5},
    "sensitivity": {"sensitivity_floor": 0.3, "warm_start": True, "prior_weight": 0.01},
    "cosine rate": {"learning_rate_schedule": "cosine", "keep_best": True, "warm_start": True},
    "encoder start": {
        "encoder_start": 2.0,
        "decode_scale": 2,
        "num_samples": 2,
        "remasking": "random",
    },
    "no inner steps": {"num_inner_steps": 0, "draw": "categorical"},
    "more steps than tokens": {"num_steps": 20, "num_inner_steps": 1},
    "samples": {"num_samples": 3, "draw": "categorical"},
}
OPERATORS = {
    "inpainting": operators.inpainting_mask(random_mask()),
    "stack": operators.stack([operators.colorization(), operators.super_resolution(scale=2)]),
}
CASES = [(name, None, options) for name, options in OPTIONS.items()]
CASES += [(name, operator, {}) for name, operator in OPERATORS.items()]
MASKS = np.stack([random_mask(seed)[..., None] for seed in range(BATCH)])
CASES += [("mask per image, samples", operators.inpainting_mask(MASKS), OPTIONS["samples"])]


@pytest.mark.parametrize(("operator", "options"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_laws_of_every_option(operator, options):
    config = APSConfig(**{**SMALL, "trace": True, **options})
    params = make_params(operator, perceptual=Perceptual(params=None, apply=mean_square))
    # Image 0 starts with three known tokens, image 1 with none.
    length = LENGTH * config.decode_scale**2
    known = np.full((BATCH, length), NUM_CODES)
    known[0, [0, 5, 15]] = [3, 0, 15]
    y = measured(params)
    run = functools.partial(sample, params, y, config=config, known_tokens=jnp.asarray(known))
    result = run(jax.random.key(0))
    steps, samples = config.num_steps, config.num_samples

    assert np.abs(result.samples).max() <= 1
    assert np.all(result.info.is_finite)

    # Nothing is masked at the end, and no token changes once it is revealed.
    given = np.broadcast_to(known[:, None], (1, BATCH, samples, length))
    history = np.concatenate([given, result.info.trace.tokens])
    assert history.shape == (steps + 1, BATCH, samples, length)
    assert 0 <= history.min() and history.max() == NUM_CODES
    assert history[-1].max() < NUM_CODES
    for before, after in zip(history, history[1:], strict=False):
        np.testing.assert_array_equal(after[before < NUM_CODES], before[before < NUM_CODES])
    np.testing.assert_array_equal(result.tokens, history[-1, :, 0])

    # The number of masked tokens follows the schedule; each step reveals at least one.
    num_masked = (history == NUM_CODES).sum(axis=-1)
    np.testing.assert_array_equal(result.info.num_masked, num_masked[1:])
    most = np.maximum(num_masked[:-1] - 1, 0)
    if config.rule == "count":
        counts = schedules.masked_counts(config.schedule, steps, length)[:, None, None]
        np.testing.assert_array_equal(num_masked[1:], np.minimum(counts, most))
    else:
        assert np.all(num_masked[1:] <= most)

    # The images are the decoded tokens of the last step.
    np.testing.assert_allclose(result.samples, result.info.trace.images[-1], atol=1e-6)
    assert result.info.trace.losses.shape == (steps, BATCH, samples, config.num_inner_steps)
    assert np.all(np.isfinite(result.info.trace.losses))

    # Same key, same answer; only chance may answer to another key.
    np.testing.assert_array_equal(run(jax.random.key(0)).tokens, result.tokens)
    other = run(jax.random.key(1))
    differs = any(np.any(a != b) for a, b in zip(other.info.trace.tokens, history[1:], strict=True))
    # In a single step there is no order to be drawn.
    assert differs == config.is_random


def test_a_threshold_of_one_reveals_one_token_per_step():
    # Nothing is ever that sure, so each step reveals one token and the last all the rest.
    config = APSConfig(**SMALL, rule="fixed_threshold", threshold=1.0)
    result = sample(make_params(), measured(make_params()), jax.random.key(0), config=config)
    np.testing.assert_array_equal(result.info.num_masked[:, 0, 0], [15, 14, 13, 0])


def test_the_learning_rate_falls_over_the_run():
    params = make_params()
    y, key = measured(params), jax.random.key(0)
    options = {"learning_rate_schedule": "cosine", "warm_start": True, "learning_rate": 0.2}
    config = APSConfig(num_steps=4, num_inner_steps=1, **options)
    state, moves = aps_jax.aps_init(params, y, config=config), []
    for _ in range(config.num_steps):
        before = state.phi
        state, _ = aps_jax.aps_step(params, y, state, key, config=config)
        moves.append(np.abs(state.phi - before).max())
    # The first step of Adam is as long as the learning rate; the first phi is the prior's.
    cosine = (1 + np.cos(np.pi * np.array([1, 2, 3]) / 4)) / 2
    np.testing.assert_allclose(moves[1:], 0.2 * cosine, rtol=1e-3)


# Known tokens.


def test_all_known_tokens_are_returned_as_they_are(rng):
    params = make_params()
    config = APSConfig(**SMALL)
    known = jnp.asarray(rng.integers(0, NUM_CODES, size=(BATCH, LENGTH)))
    run = functools.partial(sample, params, measured(params), jax.random.key(0), config=config)
    result = run(known_tokens=known)
    np.testing.assert_array_equal(result.tokens, known)
    codes = params.codec.codebook[known].reshape(BATCH, 4, 4, -1)
    expected = params.codec.decode(params.codec.params, codes)
    np.testing.assert_allclose(result.images, expected, atol=1e-6)
    # None known is the same as saying nothing.
    nothing = jnp.full((BATCH, LENGTH), NUM_CODES)
    np.testing.assert_array_equal(run(known_tokens=nothing).tokens, run().tokens)
    with pytest.raises(ValueError, match=r"known_tokens has shape \(2, 15\).*needs \(2, 16\)"):
        run(known_tokens=known[:, :15])


# Independence of batch, compilation and driver.

ALL_AT_ONCE = APSConfig(
    num_steps=4,
    num_inner_steps=10,
    sensitivity_floor=0.3,
    encoder_start=0.3,
    draw="categorical",
    warm_start=True,
    prior_weight=0.1,
    learning_rate_schedule="cosine",
    keep_best=True,
)


def test_image_alone_equals_image_in_a_batch():
    params = make_params()
    y = measured(params, batch=8)
    keys = image_keys(jax.random.key(3), 8)
    both = sample(params, y, keys, config=ALL_AT_ONCE)
    assert len(np.unique(both.tokens, axis=0)) == 8
    for index in (0, 5):
        alone = sample(params, y[index : index + 1], keys[index : index + 1], config=ALL_AT_ONCE)
        np.testing.assert_array_equal(alone.tokens[0], both.tokens[index])
        np.testing.assert_allclose(alone.images[0], both.images[index], atol=1e-5)
        for name in ("loss", "num_masked", "num_inner_steps"):
            np.testing.assert_allclose(
                getattr(alone.info, name)[:, 0], getattr(both.info, name)[:, index], rtol=1e-4
            )


def test_jit_equals_eager():
    params = make_params()
    y, key = measured(params), jax.random.key(5)
    # Eagerly, estimate and sensitivity are the same compiled loops.
    config = dataclasses.replace(
        ALL_AT_ONCE, num_steps=2, num_inner_steps=2, encoder_start=0.0, sensitivity_floor=0.0
    )
    # One key stands for its folds with the image index.
    jitted = sample(params, y, image_keys(key, BATCH), config=config)
    eager = aps_jax.aps_sample(params, y, key, config=config)
    np.testing.assert_array_equal(eager.tokens, jitted.tokens)
    np.testing.assert_allclose(eager.images, jitted.images, atol=1e-5)


def test_the_scan_equals_a_host_loop():
    params = make_params()
    y, key = measured(params), jax.random.key(5)
    jitted = sample(params, y, key, config=ALL_AT_ONCE)
    step = jax.jit(aps_jax.aps_step, static_argnames="config")
    state, infos = aps_jax.aps_init(params, y, config=ALL_AT_ONCE), []
    for _ in range(ALL_AT_ONCE.num_steps):
        state, info = step(params, y, state, key, config=ALL_AT_ONCE)
        infos.append(info)
    info = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
    looped = aps_jax.aps_finish(params, y, state, info, config=ALL_AT_ONCE)
    assert step._cache_size() == 1  # the state keeps its shapes and dtypes
    np.testing.assert_array_equal(looped.tokens, jitted.tokens)
    np.testing.assert_allclose(looped.images, jitted.images, atol=1e-5)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(jitted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(looped.info.loss, jitted.info.loss, rtol=1e-4)


def test_second_call_compiles_nothing():
    num_traces = 0

    def counted(params, y, key, *, config):
        nonlocal num_traces
        num_traces += 1
        return aps_jax.aps_sample(params, y, key, config=config)

    run = jax.jit(counted, static_argnames="config")
    results = []
    for seed in range(3):  # new weights, mask, measurement and key each time
        params = make_params(operators.inpainting_mask(random_mask(seed)), seed=seed)
        y = params.operator(random_images()[seed : seed + BATCH])
        results.append(run(params, y, jax.random.key(seed), config=APSConfig(**SMALL)))
    assert num_traces == 1 and run._cache_size() == 1
    assert not np.array_equal(results[0].tokens, results[1].tokens)
    # Nothing was baked in: the last call equals a fresh trace of its own arguments.
    fresh = sample(params, y, jax.random.key(2), config=APSConfig(**SMALL))
    np.testing.assert_array_equal(results[2].tokens, fresh.tokens)


def test_vmap_over_keys():
    params = make_params()
    y, keys = measured(params), jax.random.split(jax.random.key(0), 3)
    many = jax.jit(
        jax.vmap(lambda key: aps_jax.aps_sample(params, y, key, config=ALL_AT_ONCE).tokens)
    )(keys)
    one = sample(params, y, keys[1], config=ALL_AT_ONCE)
    np.testing.assert_array_equal(many[1], one.tokens)
    assert np.any(many[0] != many[1])


def test_samples_of_one_measurement():
    params = make_params()
    y, key = measured(params), jax.random.key(2)
    options = {**SMALL, "draw": "categorical"}
    many = sample(params, y, key, config=APSConfig(**options, num_samples=3))
    one = sample(params, y, key, config=APSConfig(**options))
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.images, one.images, atol=1e-5)
    np.testing.assert_allclose(many.info.loss[..., 0], one.info.loss[..., 0], rtol=1e-4)
    samples = np.float64(many.samples)
    assert np.abs(samples[:, 0] - samples[:, 1]).max() > 0.1
    assert np.abs(samples[:, 1] - samples[:, 2]).max() > 0.1
    np.testing.assert_allclose(many.mean, samples.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(many.std, samples.std(axis=1), atol=1e-6)
    np.testing.assert_array_equal(one.std, 0)
    # The posterior is drawn per image: the other images of the batch are no part of it.
    alone = sample(params, y[:1], key, config=APSConfig(**options, num_samples=3))
    np.testing.assert_allclose(alone.samples[0], many.samples[0], atol=1e-5)


def test_trace_is_off_by_default_and_changes_nothing():
    params = make_params()
    config = APSConfig(**SMALL)
    result = sample(params, measured(params), jax.random.key(0), config=config)
    assert result.info.trace is None
    traced = sample(
        params, measured(params), jax.random.key(0), config=APSConfig(**SMALL, trace=True)
    )
    np.testing.assert_array_equal(result.tokens, traced.tokens)
    np.testing.assert_allclose(result.info.loss, traced.info.trace.losses[..., -1], rtol=1e-5)
    carried = jax.eval_shape(lambda: aps_jax.aps_init(params, measured(params), config=config))
    assert carried.phi is None and carried.sensitivity is None and carried.estimate is None


# What a step computes.


def test_guidance_is_a_combination_of_logits():
    """(1 + g) cond - g uncond, then the temperature; seen through the loss-free proposal."""
    params = make_params()
    tokens = jnp.full((1, LENGTH), NUM_CODES)
    field = tokens.reshape(1, 4, 4)
    prior = params.prior
    cond = prior.apply(prior.params, field).reshape(1, LENGTH, -1)
    uncond = prior.apply_unconditional(prior.params, field).reshape(1, LENGTH, -1)
    config = APSConfig(
        num_steps=1,
        num_inner_steps=0,
        draw="argmax",
        warm_start=True,
        guidance_scale=2.0,
    )
    y = measured(params, batch=1)
    state = aps_jax.aps_init(params, y, config=config)
    after, _ = aps_jax.aps_step(params, y, state, jax.random.key(0), config=config)
    expected = jax.nn.log_softmax(3 * cond - 2 * uncond, axis=-1)
    np.testing.assert_allclose(after.phi, expected, atol=1e-4)
    np.testing.assert_array_equal(after.tokens, np.argmax(expected, axis=-1))
    sharper = MaskGITConfig(guidance_scale=2.0, prior_temperature=0.5)
    target = measurement_target(params, y, config=sharper)
    np.testing.assert_allclose(
        target.log_prior(state.tokens), jax.nn.log_softmax(2 * expected, axis=-1), atol=1e-4
    )
    assert np.abs(expected - jax.nn.log_softmax(cond, axis=-1)).max() > 0.1

    mute = params.replace(prior=prior.replace(apply_unconditional=None))
    with pytest.raises(ValueError, match="no unconditional form"):
        aps_jax.aps_step(mute, y, state, jax.random.key(0), config=config)


@pytest.mark.parametrize("warm_start", [False, True])
def test_warm_start_is_where_phi_begins(warm_start):
    params = make_params()
    y = measured(params)
    config = APSConfig(num_steps=3, num_inner_steps=0, warm_start=warm_start)
    state = aps_jax.aps_init(params, y, config=config)
    log_prior = jax.nn.log_softmax(
        params.prior.apply(params.prior.params, state.tokens.reshape(-1, 4, 4)), axis=-1
    ).reshape(BATCH, LENGTH, -1)
    shift = jnp.sin(jnp.arange(log_prior.size, dtype=jnp.float32)).reshape(log_prior.shape)
    expected = shift if warm_start else log_prior
    if warm_start:
        state = state._replace(phi=shift, step=state.step + 1)
    after, _ = aps_jax.aps_step(params, y, state, jax.random.key(0), config=config)
    # With no inner steps, phi is handed on as it began.
    if warm_start:
        np.testing.assert_array_equal(after.phi, shift)
    else:
        assert after.phi is None
    # The quantized proposal of the revealed tokens is that of the expected start.
    mean = np.asarray(jax.nn.softmax(expected, axis=-1) @ params.codec.codebook)
    proposal = (mean > 0) @ np.array([8, 4, 2, 1])
    is_new = np.asarray(after.tokens) < NUM_CODES
    assert is_new.any()
    np.testing.assert_array_equal(np.asarray(after.tokens)[is_new], proposal[is_new])


@pytest.mark.parametrize("warm_start", [False, True])
def test_encoder_start_is_the_estimates_codes_times_the_prior(warm_start):
    """At the first timestep, or at every one of a cold start; seen without inner steps."""
    params = make_params()
    y = measured(params)
    weight, options = 0.4, {"num_steps": 3, "num_inner_steps": 0, "draw": "argmax"}
    config = APSConfig(**options, warm_start=warm_start, encoder_start=weight)
    state = aps_jax.aps_init(params, y, config=config)
    x = smooth_estimate(params.operator, y, image_shape=(SIDE, SIDE), sigma=config.sigma)
    tokens = encode_tokens(params.codec, x).reshape(BATCH, LENGTH)
    np.testing.assert_array_equal(state.estimate, tokens)
    differing = np.bitwise_count(np.asarray(tokens)[..., None] ^ np.arange(NUM_CODES))

    def log_prior(state):
        field = state.tokens.reshape(-1, 4, 4)
        logits = params.prior.apply(params.prior.params, field)
        return jax.nn.log_softmax(logits, axis=-1).reshape(BATCH, LENGTH, -1)

    expected = log_prior(state) - 2 * weight * differing
    for step in range(2):
        after, _ = aps_jax.aps_step(params, y, state, jax.random.key(0), config=config)
        if step and not warm_start:
            expected = log_prior(state) - 2 * weight * differing
        is_new = (np.asarray(state.tokens) == NUM_CODES) & (np.asarray(after.tokens) < NUM_CODES)
        assert is_new.any()
        proposal = np.argmax(expected, axis=-1)
        np.testing.assert_array_equal(np.asarray(after.tokens)[is_new], proposal[is_new])
        state = after


def test_anchored_remasking_keeps_by_the_tilted_confidence_and_standard_by_the_prior():
    params = make_params()
    y = measured(params)
    shift = 3 * jnp.sin(jnp.arange(BATCH * LENGTH * NUM_CODES, dtype=jnp.float32) ** 2)
    shift = shift.reshape(BATCH, LENGTH, NUM_CODES)
    kept = {}
    for remasking in ("anchored", "standard"):
        config = APSConfig(
            num_steps=4, num_inner_steps=0, warm_start=True, draw="argmax", remasking=remasking
        )
        state = aps_jax.aps_init(params, y, config=config)._replace(phi=shift)
        state = state._replace(step=state.step + 2)
        after, _ = aps_jax.aps_step(params, y, state, jax.random.key(0), config=config)
        kept[remasking] = np.asarray(after.tokens) < NUM_CODES
    proposal = np.argmax(shift, axis=-1)[..., None]
    tilted = np.take_along_axis(np.asarray(jax.nn.log_softmax(shift, axis=-1)), proposal, -1)[
        ..., 0
    ]
    field = jnp.full((BATCH, 4, 4), NUM_CODES)
    prior = params.prior.apply(params.prior.params, field).reshape(BATCH, LENGTH, -1)
    standard = np.take_along_axis(np.asarray(jax.nn.log_softmax(prior, -1)), proposal, -1)[..., 0]
    num_kept = LENGTH - schedules.masked_counts("cosine", 4, LENGTH)[2]
    for name, scores in [("anchored", tilted), ("standard", standard)]:
        assert np.all(kept[name].sum(axis=1) == num_kept)
        for row in range(BATCH):
            worst_kept = scores[row][kept[name][row]].min()
            assert worst_kept >= scores[row][~kept[name][row]].max()
    assert np.any(kept["anchored"] != kept["standard"])


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start": True, "draw": "categorical"},
        {"warm_start": True, "sensitivity_floor": 0.3, "draw": "categorical"},
        {"guidance_scale": 1.0, "prior_weight": 0.1, "draw": "argmax"},
    ],
)
def test_codes_that_the_prior_excludes_are_never_drawn(options):
    """A prior may say -inf; no difference of two of them turns into NaN."""
    params = make_params()
    allowed = jnp.arange(params.prior.num_codes) % 2 == 0

    def exclude(apply):
        return lambda *args, **kw: jnp.where(allowed, apply(*args, **kw), -jnp.inf)

    prior = params.prior.replace(apply=exclude(params.prior.apply))
    if prior.apply_unconditional is not None:
        prior = prior.replace(apply_unconditional=exclude(prior.apply_unconditional))
    params = params.replace(prior=prior)
    config = APSConfig(**SMALL, **options)
    result = aps_jax.aps_sample(params, measured(params), jax.random.key(0), config=config)
    assert np.all(result.info.is_finite)
    assert np.all(np.asarray(result.tokens) % 2 == 0)


def test_each_step_draws_afresh():
    params = make_params()
    y = measured(params)
    config = APSConfig(
        num_steps=3, num_inner_steps=0, draw="categorical", rule="threshold", threshold=0.0
    )
    step = jax.jit(aps_jax.aps_step, static_argnames="config")
    state = aps_jax.aps_init(params, y, config=config)
    later = state._replace(step=state.step + 1)
    drawn = [step(params, y, s, jax.random.key(0), config=config)[0].tokens for s in (state, later)]
    assert np.max(drawn) < NUM_CODES  # a threshold of 0 keeps everything at once
    assert np.mean(drawn[0] != drawn[1]) > 0.2


def test_inner_steps_lower_the_loss():
    params = make_params()
    config = APSConfig(num_steps=2, num_inner_steps=30, measurement_term="gaussian", trace=True)
    result = sample(params, measured(params), jax.random.key(0), config=config)
    losses = np.asarray(result.info.trace.losses)
    assert np.all(losses[0, ..., -10:].mean(axis=-1) < 0.75 * losses[0, ..., 0])


# Sizes.


@pytest.mark.parametrize("decode_scale", [1, 2])
def test_images_that_do_not_fit_the_stride_or_the_window(decode_scale):
    height, width = 30, 37
    params = make_params()
    y = params.operator(random_images(2, height, width))
    assert y.shape == (2, 8, 10, 3)
    config = APSConfig(
        **{**SMALL, "num_inner_steps": 1}, image_shape=(height, width), decode_scale=decode_scale
    )
    result = sample(params, y, jax.random.key(0), config=config)
    assert result.images.shape == (2, height, width, 3)
    grid = (8, 10) if decode_scale == 1 else (15, 19)  # all larger than the prior's window of 4
    assert result.tokens.shape == (2, grid[0] * grid[1])
    assert np.max(result.tokens) < NUM_CODES and np.all(result.info.is_finite)


def test_real_networks(tiny_codec, tiny_prior):
    """The convolutional codec and the transformer, on a field of two windows."""
    operator = operators.inpainting_mask(random_mask(width=18))
    params = Params(prior=tiny_prior, codec=tiny_codec, operator=operator)
    y = operator(random_images(8, SIDE, 18)[:2])
    config = APSConfig(num_steps=3, num_inner_steps=2, draw="categorical", prior_weight=0.05)
    keys = jax.random.split(jax.random.key(0), 2)
    result = sample(params, y, keys, config=config)
    assert result.images.shape == y.shape and np.max(result.tokens) < NUM_CODES
    assert np.all(result.info.is_finite) and len(np.unique(result.tokens)) > 4
    # The other image of the batch is of no account.
    other = sample(params, y.at[1].set(0.0), keys, config=config)
    np.testing.assert_array_equal(other.tokens[0], result.tokens[0])
    np.testing.assert_array_equal(other.images[0], result.images[0])
    assert np.any(other.tokens[1] != result.tokens[1])


# Bad input.


def test_measurement_that_does_not_fit():
    params = make_params()
    key = jax.random.key(0)
    with pytest.raises(
        ValueError, match=r"y has shape \(2, 4, 4, 1\); operator 'super_resolution'"
    ):
        aps_jax.aps_sample(params, jnp.zeros((2, 4, 4, 1)), key)
    config = APSConfig(image_shape=(20, 16))
    with pytest.raises(ValueError, match=r"gives \(2, 5, 4, 3\) for images of \(20, 16\)"):
        aps_jax.aps_sample(params, jnp.zeros((2, 4, 4, 3)), key, config=config)
    with pytest.raises(ValueError, match="first axis must be the batch"):
        aps_jax.aps_sample(params, jnp.zeros(48), key)
    params = make_params(operators.inpainting_mask(random_mask()))
    with pytest.raises(ValueError, match="mask of shape"):
        aps_jax.aps_sample(params, jnp.zeros((2, 16, 12, 3)), key)
    with pytest.raises(ValueError, match="random state"):
        aps_jax.aps_sample(
            make_params(operators.inpainting_random()), jnp.zeros((2, 16, 16, 3)), key
        )


def test_models_that_do_not_belong_together():
    params = make_params().replace(prior=mixing_prior(num_codes=8))
    with pytest.raises(ValueError, match="the prior has 8 codes, the codec 16"):
        aps_jax.aps_sample(params, measured(params), jax.random.key(0))


def test_perceptual_term_without_its_network():
    config = APSConfig(**SMALL, perceptual_weight=1e-3)
    params = make_params()
    with pytest.raises(ValueError, match="load_lpips"):
        aps_jax.aps_sample(params, measured(params), jax.random.key(0), config=config)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.PRNGKey(0), "typed key"),
        (jax.random.split(jax.random.key(0), 3), r"one per image \[2\], got \(3,\)"),
    ],
)
def test_bad_keys(key, message):
    params = make_params()
    with pytest.raises(ValueError, match=message):
        aps_jax.aps_sample(params, measured(params), key, config=APSConfig(**SMALL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "gumbel"}, "draw is 'gumbel'; choose from"),
        ({"schedule": "cos"}, "schedule is 'cos'; choose from"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_inner_steps": -1}, "num_inner_steps must be an integer of at least 0"),
        ({"num_steps": 2.5}, "num_steps must be an integer"),
        ({"num_samples": True}, "num_samples must be an integer"),
        ({"sigma": -0.1}, "sigma must be positive, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"prior_weight": -1.0}, "prior_weight must not be negative"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        ({"draw": "argmax", "num_samples": 2}, "nothing is random here: set draw="),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        APSConfig(**options)


def test_config_is_a_static_argument():
    assert hash(APSConfig(image_shape=[4, 8])) == hash(APSConfig(image_shape=(4, 8)))
    assert APSConfig() != APSConfig(num_steps=3)


def test_a_damaged_measurement_is_reported():
    params = make_params()
    y = measured(params).at[1, 0, 0, 0].set(jnp.nan)
    result = sample(params, y, jax.random.key(0), config=APSConfig(**SMALL))
    np.testing.assert_array_equal(result.info.is_finite[-1, :, 0], [True, False])
    # The other image is not touched.
    clean = sample(params, measured(params), jax.random.key(0), config=APSConfig(**SMALL))
    np.testing.assert_array_equal(result.tokens[0], clean.tokens[0])


def test_unmeasured_tokens_start_afresh_at_every_timestep():
    """With scaled updates, a token behind missing pixels only is not moved by the optimiser."""
    mask = np.ones((SIDE, SIDE), np.float32)
    mask[:, SIDE // 2 :] = 0
    params = make_params(operators.inpainting_mask(mask))
    y = measured(params)
    config = APSConfig(
        num_steps=3, num_inner_steps=4, warm_start=True, sensitivity_floor=0.3, encoder_start=0.5
    )
    state = aps_jax.aps_init(params, y, config=config)
    side = SIDE // params.codec.stride
    target = measurement_target(params, y, config=config)
    bonus = encoder_logits(target, state.estimate, config.encoder_start)
    assert np.ptp(bonus) > 1
    for _ in range(2):
        before = state
        state, _ = aps_jax.aps_step(params, y, before, jax.random.key(0), config=config)
        log_prior = jax.nn.log_softmax(
            params.prior.apply(params.prior.params, before.tokens.reshape(-1, side, side))
        ).reshape(state.phi.shape)
        moved = np.abs(state.phi - (log_prior + bonus)).max(axis=(0, 2))
        moved = moved.reshape(side, side)
        assert moved[:, : side // 2].max() > 1
        np.testing.assert_allclose(moved[:, side // 2 :], 0, atol=1e-4)


def test_a_warm_start_carries_over_as_much_as_the_sensitivity():
    params = make_params()
    config = APSConfig(warm_start=True, sensitivity_floor=0.3, encoder_start=0.5)
    y = measured(params)
    state = aps_jax.aps_init(params, y, config=config)
    rng = np.random.default_rng(0)
    carried, log_prior = rng.normal(size=(2, *state.phi.shape))
    share = rng.uniform(size=(*state.sensitivity.shape, 1))
    state = state._replace(
        step=jnp.asarray(1, jnp.int32),
        phi=jnp.asarray(carried, jnp.float32),
        sensitivity=jnp.asarray(share[..., 0], jnp.float32),
    )
    target = measurement_target(params, y, config=config)
    start = make_aps(config).initial_phi(target, state, jnp.asarray(log_prior, jnp.float32))
    fresh = log_prior + encoder_logits(target, state.estimate, 0.5)
    np.testing.assert_allclose(start, share * carried + (1 - share) * fresh, atol=1e-4)


# Numbers as arguments.

#: Options whose numbers may change without another compilation, twice.
NUMBERS = {
    "sigma": (0.3, 0.5),
    "data_consistency": (0.05, 0.2),
    "learning_rate": (0.5, 0.2),
    "prior_weight": (0.1, 0.4),
    "perceptual_weight": (0.1, 0.5),
    "sensitivity_floor": (0.3, 0.9),
    "encoder_start": (0.4, 0.1),
    "threshold": (0.9, 0.01),
    "guidance_scale": (0.5, 1.5),
}
assert set(NUMBERS) == {f.name for f in dataclasses.fields(APSConfig) if f.type == "float"}


@pytest.mark.parametrize("measurement_term", ["l1", "gaussian"])
def test_other_numbers_need_no_other_compilation(measurement_term):
    params = make_params(perceptual=Perceptual(params=None, apply=mean_square))
    y, key = measured(params), jax.random.key(0)
    options = {"num_steps": 3, "num_inner_steps": 2, "rule": "threshold", "warm_start": True}
    options |= {"measurement_term": measurement_term, "prior_weighting": "elbo"}
    first, second = ({name: pair[i] for name, pair in NUMBERS.items()} for i in (0, 1))
    run = jax.jit(lambda *args, **named: aps_jax.aps_sample(*args, **named))
    start = run(params, y, key, config=APSConfig(**options, **first))
    idle = {"l1": (), "gaussian": ("perceptual_weight",)}[measurement_term]
    for name in NUMBERS:  # each is read, but for those of the other term
        changed = run(params, y, key, config=APSConfig(**options, **first | {name: second[name]}))
        seen = [(r.info.loss, r.images) for r in (changed, start)]
        is_same = all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))
        assert is_same == (name in idle), name
    both = run(params, y, key, config=APSConfig(**options, **second))
    assert run._cache_size() == 1
    for numbers, result in [(first, start), (second, both)]:
        static = sample(params, y, key, config=APSConfig(**options, **numbers))
        np.testing.assert_array_equal(result.tokens, static.tokens)
        np.testing.assert_allclose(result.info.loss, static.info.loss, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["data_consistency", "prior_weight", "sensitivity_floor", "encoder_start", "guidance_scale"],
)
def test_a_number_of_zero_is_absent(name):
    """Nothing is computed for it, which takes a compilation of its own."""
    params = make_params()
    y, key = measured(params), jax.random.key(0)
    present, absent = APSConfig(**SMALL, **{name: 0.2}), APSConfig(**SMALL, **{name: 0.0})
    assert len(jax.tree.leaves(absent)) == len(jax.tree.leaves(present)) - 1

    def work(config):
        lowered = jax.jit(aps_jax.aps_sample).lower(params, y, key, config=config)
        return len(lowered.as_text())

    assert work(absent) < work(present)
    # It is the limit of small numbers, here where all tokens are measured.
    tiny = sample(params, y, key, config=dataclasses.replace(present, **{name: 1e-12}))
    gone = jax.jit(aps_jax.aps_sample)(params, y, key, config=absent)
    np.testing.assert_array_equal(gone.tokens, tiny.tokens)
    np.testing.assert_array_equal(gone.tokens, sample(params, y, key, config=absent).tokens)


# Samples differ.


@pytest.mark.parametrize(
    "options",
    [{}, {"draw": "argmax"}, {"remasking": "random", "num_steps": 1}, {"remasking": "standard"}],
)
def test_equal_samples_are_refused_with_the_cure(options):
    with pytest.raises(ValueError, match="num_samples=2 would give equal samples") as error:
        APSConfig(num_samples=2, **options)
    message = str(error.value)
    assert 'set draw="categorical", or remasking="random" with num_steps above 1' in message
    assert "\n" not in message
    assert APSConfig(num_samples=1, **options).is_random is False


@pytest.mark.parametrize(
    "cure",
    [{"draw": "categorical", "num_steps": 1}, {"remasking": "random"}, {"draw": "categorical"}],
)
def test_the_cures_make_samples_differ(cure):
    params = make_params()
    config = APSConfig(**SMALL | {"num_samples": 3, "num_inner_steps": 5} | cure, trace=True)
    result = sample(params, measured(params), jax.random.key(0), config=config)
    tokens = np.asarray(result.info.trace.tokens[-1])
    assert all(len(np.unique(rows, axis=0)) == 3 for rows in tokens)
    assert config.is_random and np.asarray(result.std).max() > 0.1
