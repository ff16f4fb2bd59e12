"""EntRGi: its estimator against the two that it lies between, and what guidance does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import BITS, CODES, LENGTH

from aps_jax import samplers
from aps_jax.samplers import entrgi
from aps_jax.samplers.entrgi import EntRGiConfig

# `test_samplers.py` holds the laws of every sampler; these proofs of one compile longer.
pytestmark = pytest.mark.slow

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3
ENERGY = toy.energies(toy.decoded_images(), Y, 1.0)

sample = jax.jit(samplers.sample, static_argnames="config")


def draw(count=400, **options):
    config = EntRGiConfig(**{"num_steps": LENGTH, "num_trajectories": 1, "sigma": 1.0} | options)
    return sample(toy.make_params(JOINT), toy.batch_of(count, Y), jax.random.key(0), config=config)


def test_codes_and_gradients_of_the_three_mixings():
    """Value soft + w (hard - soft), gradient that of soft; clean tokens have their own code."""
    rng = np.random.default_rng(0)
    phi = jnp.asarray(rng.normal(size=(1, LENGTH, CODES)), jnp.float32)
    slope = jnp.asarray(rng.normal(size=(1, LENGTH, BITS)), jnp.float32)
    tokens = jnp.array([[CODES, 2, CODES]])
    config = EntRGiConfig(temperature=0.7)
    book = np.asarray(toy.toy_codec().codebook)
    logits = np.asarray(phi)
    probs = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum(axis=-1, keepdims=True)
    soft = probs @ book
    plain = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    entropy = -(plain * np.log(plain)).sum(axis=-1, keepdims=True) / np.log(CODES)
    np.testing.assert_allclose(entrgi.normalized_entropy(phi), entropy[..., 0], rtol=1e-5)

    # d/dphi sum slope * softmax(phi / tau) C
    scores = np.asarray(slope) @ book.T
    expected = probs * (scores - (probs * scores).sum(axis=-1, keepdims=True)) / 0.7
    expected[:, 1] = 0
    found = {}
    for mixing in ("hard", "soft", "entropy"):
        mixed = dataclasses.replace(config, mixing=mixing)
        target, keys = toy.make_target(JOINT, mixed)
        codes = functools.partial(mixed.mixed_codes, target, keys, tokens=tokens)
        found[mixing] = np.asarray(codes(phi))
        gradient = jax.grad(lambda phi: jnp.sum(slope * codes(phi)))(phi)  # noqa: B023
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.all(np.abs(np.abs(found["hard"]) - 1) < 1e-6)
    np.testing.assert_allclose(found["soft"][:, [0, 2]], soft[:, [0, 2]], atol=1e-5)
    between = soft + entropy * (found["hard"] - soft)
    np.testing.assert_allclose(found["entropy"][:, [0, 2]], between[:, [0, 2]], atol=1e-5)
    for codes in found.values():
        np.testing.assert_array_equal(codes[0, 1], book[2])


def test_without_inner_steps_it_decodes_where_the_prior_is_surest():
    """Temperature 1, one token at a time: still a draw from the joint, in a greedy order."""
    result = draw(4000, num_inner_steps=0, temperature=1.0)
    assert toy.chi_square_p(result.tokens, JOINT) > 1e-3


def test_the_surest_position_comes_first():
    config = EntRGiConfig(num_steps=LENGTH, num_inner_steps=0)
    target, keys = toy.make_target(JOINT, config)
    state, _ = config.step(target, config.init(target, keys), keys)
    marginals = toy.conditionals(JOINT, np.full(LENGTH, CODES))
    entropy = -(marginals * np.log(marginals)).sum(axis=1)
    assert np.flatnonzero(np.asarray(state.tokens)[0] < CODES).tolist() == [np.argmin(entropy)]


def test_guidance_lowers_the_energy():
    prior = JOINT @ ENERGY
    for mixing in ("entropy", "hard", "soft"):
        tokens = draw(mixing=mixing, num_inner_steps=20, learning_rate=0.5).tokens
        assert ENERGY[toy.index_of(tokens)].mean() < 0.6 * prior, mixing


def test_the_best_trajectory_is_returned():
    result = draw(num_inner_steps=1, num_trajectories=3)
    loss = np.asarray(result.info.loss)[:, :, 0]  # the least so far, at every timestep
    assert loss.shape == (3 * LENGTH, 400)
    assert np.all(np.isinf(loss[: LENGTH - 1])) and np.all(np.diff(loss[LENGTH - 1 :], axis=0) <= 0)
    assert np.any(loss[-1] < loss[LENGTH - 1])
    found = ENERGY[toy.index_of(result.tokens)]
    np.testing.assert_allclose(found, loss[-1], rtol=1e-4)
