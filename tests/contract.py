"""What every sampler promises, on models too small to draw anything; a program for a mesh, too."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import NUM_BITS, NUM_CODES, mixing_prior, patch_codec

from aps_jax import Denoiser, Params, PixelParams, operators, samplers, sharding
from aps_jax.samplers import SAMPLERS
from aps_jax.types import Perceptual, bind

LENGTH, BATCH, SAMPLES, SIDE = 16, 3, 2, 16

#: What samples need to differ from each other; a sampler that is missing needs nothing.
RANDOM = {"aps": {"draw": "categorical"}}

#: Options with which more parts of a sampler run.
BUSY = {"resample": {"interval": 1}}

CALLS = {"denoiser": 0, "decoder": 0}

#: Samplers over tokens, which have a prior; the others have a denoiser, of pixels or of latents.
TOKENS = samplers.samplers_of("prior")
LATENTS = samplers.samplers_of("latent denoiser")


def smallest(name, **options):
    """Two or three of everything that the sampler counts, or the least that it allows."""
    config_class = SAMPLERS[name].config
    options = RANDOM.get(name, {}) | BUSY.get(name, {}) | {"num_samples": SAMPLES} | options
    for field in dataclasses.fields(config_class):
        if field.name.startswith("num_") and field.name not in options:
            options[field.name] = _least(config_class, field.name)
    return config_class(**options)


def _least(config_class, name):
    for value in range(3 if name == "num_steps" else 2, 10):
        try:
            config_class(**{name: value})
        except ValueError:
            continue
        return value
    raise AssertionError(f"{config_class.__name__} takes no small {name}")


def _count(name, _):
    CALLS[name] += 1


def _counted(*args, inner, name):
    """`inner`, and a note that it ran; mapped over candidates, it notes each of them."""
    jax.debug.callback(functools.partial(_count, name), jnp.ravel(args[-1])[0])
    return inner(*args)


def _mean_square(params, a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def make_params():
    """Plain models, with what may be counted counted."""
    prior, codec = mixing_prior(window=4), patch_codec()
    return Params(
        prior=prior.replace(
            apply=bind(_counted, inner=prior.apply, name="denoiser"),
            apply_unconditional=bind(_counted, inner=prior.apply_unconditional, name="denoiser"),
        ),
        codec=codec.replace(decode=bind(_counted, inner=codec.decode, name="decoder")),
        operator=operators.super_resolution(scale=4),
        perceptual=Perceptual(params=None, apply=_mean_square),
    )


def shrink(params, x, sigma):
    """The denoiser of independent normal pixels of mean and variance `params`."""
    mean, variance = params
    share = (variance / (variance + sigma**2)).reshape(-1, 1, 1, 1)
    return mean + share * (x - mean)


def make_denoiser_params(is_latent=False):
    """The same with a denoiser."""
    return PixelParams(
        denoiser=Denoiser(
            params=(jnp.float32(0.1), jnp.float32(0.3)),
            apply=bind(_counted, inner=shrink, name="denoiser"),
            num_channels=NUM_BITS if is_latent else 3,
            codec=make_params().codec if is_latent else None,
        ),
        operator=operators.super_resolution(scale=4),
    )


def params_of(name):
    """Models that the sampler of this name takes."""
    return make_params() if name in TOKENS else make_denoiser_params(name in LATENTS)


@functools.cache
def random_images(batch=BATCH):
    rng = np.random.default_rng(7)
    return jnp.asarray(np.tanh(rng.normal(size=(batch, SIDE, SIDE, 3))), jnp.float32)


def some_known_tokens():
    """Three tokens of the first image are given."""
    known = np.full((BATCH, LENGTH), NUM_CODES)
    known[0, [0, 5, 15]] = [3, 0, 15]
    return jnp.asarray(known)


def check(config):
    """All that one compilation can show of a configuration with two samples and a trace."""
    config = dataclasses.replace(config, num_samples=SAMPLES, trace=True)
    if config.NEEDS != "prior":
        check_continuous(config)
        return
    params, known = make_params(), some_known_tokens()
    y, keys = params.operator(random_images()), jax.random.split(jax.random.key(3), BATCH)
    compiled = jax.jit(lambda *args, **named: samplers.sample(*args, **named))

    def run(y=y, keys=keys, known=known, config=config):
        return compiled(params, y, keys, config=config, known_tokens=known)

    CALLS.update(denoiser=0, decoder=0)
    result = run()
    jax.block_until_ready(result)
    jax.effects_barrier()
    check_calls(config, dict(CALLS), result)
    check_shapes(config, result)
    check_tokens(params, result)

    # Chance plays a part, in the samples too, and the same key plays the same part.
    assert np.any(result.samples[:, 0] != result.samples[:, 1])
    np.testing.assert_array_equal(run().tokens, result.tokens)
    others = jax.random.split(jax.random.key(4), BATCH)
    assert np.any(run(keys=others).tokens != result.tokens)
    # The rest of the batch is of no account: its measurement, its keys and what is known of it.
    moved = run(y=y.at[1:].set(0.5), keys=keys.at[1:].set(others[1:]), known=known.at[1:, 3].set(7))
    np.testing.assert_array_equal(moved.samples[0], result.samples[0])
    assert np.any(moved.tokens[1:] != result.tokens[1:])
    backwards = run(y[::-1], keys[::-1], known[::-1])
    np.testing.assert_array_equal(backwards.tokens[::-1], result.tokens)
    np.testing.assert_allclose(backwards.samples[::-1], result.samples, atol=1e-5)
    # Numbers such as sigma may change without another compilation.
    run(config=jax.tree.map(lambda number: 0.9 * number, config))
    run(config=dataclasses.replace(config, sigma=0.31))
    assert compiled._cache_size() == 1


def check_continuous(config):
    """The same of a sampler with a denoiser."""
    params = params_of(config.NAME)
    y, keys = params.operator(random_images()), jax.random.split(jax.random.key(3), BATCH)
    compiled = jax.jit(lambda *args, **named: samplers.sample(*args, **named))

    def run(y=y, keys=keys, config=config):
        return compiled(params, y, keys, config=config)

    CALLS.update(denoiser=0, decoder=0)
    result = run()
    jax.block_until_ready(result)
    jax.effects_barrier()
    if config.NEEDS == "denoiser":
        assert config.evaluations().decoder == CALLS["decoder"] == 0
        # What is counted in its place is the operator.
        CALLS["decoder"] = config.evaluations().decoder_gradient + config.num_iterations
    check_calls(config, dict(CALLS), result)
    steps = config.num_iterations
    assert result.images.shape == (BATCH, SIDE, SIDE, 3) and result.images.dtype == jnp.float32
    assert result.samples.shape == (BATCH, SAMPLES, SIDE, SIDE, 3)
    assert result.mean.shape == result.std.shape == result.images.shape
    assert result.tokens is None and result.info.trace.tokens is None
    assert result.info.trace.images.shape == (steps, *result.samples.shape)
    assert result.info.trace.losses.shape[:3] == result.info.loss.shape == (steps, BATCH, SAMPLES)
    assert np.all(result.info.is_finite) and np.all(result.info.num_masked == 0)
    assert np.max(np.abs(result.samples)) <= 1
    np.testing.assert_array_equal(result.samples[:, 0], result.images)

    assert np.any(result.samples[:, 0] != result.samples[:, 1])
    np.testing.assert_array_equal(run().samples, result.samples)
    others = jax.random.split(jax.random.key(4), BATCH)
    assert np.any(run(keys=others).samples != result.samples)
    moved = run(y=y.at[1:].set(0.5), keys=keys.at[1:].set(others[1:]))
    np.testing.assert_array_equal(moved.samples[0], result.samples[0])
    assert np.any(moved.samples[1:] != result.samples[1:])
    backwards = run(y[::-1], keys[::-1])
    np.testing.assert_allclose(backwards.samples[::-1], result.samples, atol=1e-5)
    assert np.any(run(y=-y).samples != result.samples)
    run(config=jax.tree.map(lambda number: 0.9 * number, config))
    run(config=dataclasses.replace(config, sigma=0.31))
    assert compiled._cache_size() == 1


def check_calls(config, calls, result):
    """`evaluations()` tells what is called, per row: a call takes all rows at once."""
    promised = config.evaluations()
    assert calls["denoiser"] == promised.denoiser
    # A gradient evaluates the decoder once on its way; so does the picture of every traced step.
    num_traced = samplers.sampler_of(config).num_iterations
    assert calls["decoder"] == promised.decoder + promised.decoder_gradient + num_traced
    gradients = np.sum(result.info.num_inner_steps, axis=0)
    np.testing.assert_array_equal(gradients, promised.decoder_gradient)


def check_shapes(config, result):
    steps = samplers.sampler_of(config).num_iterations
    assert result.images.shape == (BATCH, SIDE, SIDE, 3) and result.images.dtype == jnp.float32
    assert result.samples.shape == (BATCH, SAMPLES, SIDE, SIDE, 3)
    assert result.mean.shape == result.std.shape == result.images.shape
    assert result.tokens.shape == (BATCH, LENGTH) and result.tokens.dtype == jnp.int32
    info = result.info
    for leaf in (info.loss, info.num_masked, info.is_finite, info.num_inner_steps):
        assert leaf.shape == (steps, BATCH, SAMPLES)
    # Particles have inner steps of their own, of which there is no trace.
    inner = 0 if hasattr(config, "num_particles") else int(info.num_inner_steps[0, 0, 0])
    assert info.trace.losses.shape == (steps, BATCH, SAMPLES, inner)
    assert info.trace.tokens.shape == (steps, BATCH, SAMPLES, LENGTH)
    assert info.trace.images.shape == (steps, *result.samples.shape)


def check_tokens(params, result):
    """No mask is left, what is known is kept, and images are the pictures of their tokens."""
    tokens, info = np.asarray(result.tokens), result.info
    assert 0 <= tokens.min() and tokens.max() < NUM_CODES
    assert tokens[0, [0, 5, 15]].tolist() == [3, 0, 15]
    assert np.all(info.is_finite) and np.all(info.num_masked[-1] == 0)
    traced = np.asarray(info.trace.tokens)
    np.testing.assert_array_equal((traced == NUM_CODES).sum(axis=-1), info.num_masked)
    np.testing.assert_array_equal(
        traced[:, 0][..., [0, 5, 15]], np.broadcast_to([3, 0, 15], (*traced.shape[:1], SAMPLES, 3))
    )
    for found, images in [(tokens, result.images), (traced[-1, :, 0], info.trace.images[-1, :, 0])]:
        codes = params.codec.codebook[found].reshape(BATCH, 4, 4, -1)
        expected = jnp.clip(params.codec.decode(params.codec.params, codes), -1, 1)
        np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_array_equal(result.samples[:, 0], result.images)


def main():
    """Prints by sampler whether images that are spread over all devices are those of one."""
    params = make_params()
    params = params.replace(prior=mixing_prior(window=4), codec=patch_codec())
    mesh = sharding.make_mesh()
    y = params.operator(random_images(mesh.size))
    keys = jax.random.split(jax.random.key(3), mesh.size)
    placed = sharding.shard_params(params, mesh, rules=((".*", None),))
    batch = sharding.shard_batch((y, keys), mesh)
    facts = {"devices": mesh.size, "samplers": {}}
    sample = jax.jit(samplers.sample, static_argnames="config")
    for name in SAMPLERS:
        config = smallest(name, num_samples=1)
        has_tokens = name in TOKENS
        model = params if has_tokens else params_of(name)
        there = placed if has_tokens else jax.device_put(model, sharding.replicated(mesh))
        alone = sample(model, y, keys, config=config)
        spread = sample(there, *batch, config=config)
        facts["samplers"][name] = {
            "same_tokens": not has_tokens or bool(np.array_equal(alone.tokens, spread.tokens)),
            "image_error": float(np.max(np.abs(alone.samples - spread.samples))),
            "shards": len(set(map(str, spread.images.sharding.devices_indices_map(
                spread.images.shape).values()))),
        }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
