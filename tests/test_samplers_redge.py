"""ReDGE: its estimators draw from softmax(phi), with the gradients that they claim."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import CODES, LENGTH, STATES

from aps_jax import samplers
from aps_jax import schedules as schedule
from aps_jax.codec.vq import VQ
from aps_jax.samplers import redge
from aps_jax.samplers.redge import ReDGEConfig

# `test_samplers.py` holds the laws of every sampler; these proofs of one compile longer.
pytestmark = pytest.mark.slow

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3
ENERGY = toy.energies(toy.decoded_images(), Y, 1.0)
PHI = np.log(np.array([0.55, 0.3, 0.1, 0.05], np.float32)) + 2  # not normalised

sample = jax.jit(samplers.sample, static_argnames="config")


def draw(count=400, **options):
    config = ReDGEConfig(**{"num_steps": LENGTH, "sigma": 1.0} | options)
    return sample(toy.make_params(JOINT), toy.batch_of(count, Y), jax.random.key(0), config=config)


@pytest.mark.parametrize(
    ("estimator", "error"), [("straight_through", 0.01), ("gumbel", 0.01), ("redge", 0.03)]
)
def test_samples_have_the_law_of_phi(estimator, error):
    """For "redge" as the noise levels grow in number."""
    config = ReDGEConfig(estimator=estimator, num_diffusion_steps=60, first_noise=0.02)
    rows = 8000
    target, keys = toy.make_target(JOINT, config, rows)
    # The codes of this table are the tokens, one-hot.
    target = target.replace(codec=target.codec.replace(quantizer=VQ(jnp.eye(CODES))))
    phi = jnp.broadcast_to(PHI, (rows, LENGTH, CODES))
    one_hot = jax.jit(config.sample_code)(target, keys, phi)
    hard = np.round(np.asarray(one_hot))
    np.testing.assert_allclose(one_hot, hard, atol=1e-5)
    np.testing.assert_array_equal(hard.sum(axis=-1), 1)
    expected = np.exp(PHI) / np.exp(PHI).sum()
    assert np.abs(hard.mean(axis=(0, 1)) - expected).max() < error


def test_the_reverse_diffusion_against_numpy_and_finite_differences():
    x = np.random.default_rng(0).normal(size=(1, 1, CODES))
    alphas = [1.0, 0.4, 0.26670, 0.13340, 1e-4]
    np.testing.assert_allclose(alphas[1:], np.linspace(0.4, 1e-4, 4), atol=1e-4)

    def reference(phi):
        z = x
        for t in (4, 3, 2, 1):
            at, before = alphas[t], alphas[t - 1]
            logits = phi + at * z / (1 - at) ** 2
            mean = np.exp(logits) / np.exp(logits).sum()
            z = before * mean + (1 - before) * (z - at * mean) / (1 - at)
        np.testing.assert_allclose(z, mean)  # without noise, the sample is its mean
        return mean

    def found(phi):
        return redge.diffuse(
            phi, jnp.asarray(x, jnp.float32), num_diffusion_steps=5, first_noise=0.6
        )

    phi = np.float64(PHI)[None, None]
    np.testing.assert_allclose(found(jnp.asarray(phi, jnp.float32)), reference(phi), atol=1e-3)
    jacobian = jax.jacobian(found)(jnp.asarray(phi, jnp.float32))[0, 0, :, 0, 0]
    for k in range(CODES):
        step = 1e-5 * np.eye(CODES)[k]
        slope = (reference(phi + step) - reference(phi - step)) / 2e-5
        np.testing.assert_allclose(jacobian[:, k], slope[0, 0], atol=2e-3)


def test_guidance_lowers_the_energy():
    result = draw(kl_weight=0.1, num_steps=4)
    prior = JOINT @ ENERGY
    assert ENERGY[toy.index_of(result.tokens)].mean() < 0.5 * prior
    counts = schedule.masked_counts("linear", 4, LENGTH)
    num_masked = np.asarray(result.info.num_masked)[:, :, 0]
    np.testing.assert_array_equal(num_masked, np.broadcast_to(counts[:, None], (4, 400)))


def test_the_star_without_guidance():
    """Masked tokens are drawn given the others, clean ones stay, then any are masked."""
    counts = schedule.masked_counts("linear", LENGTH, LENGTH)

    def kernel(i, state):
        probs = toy.product_law(np.pad(toy.conditionals(JOINT, state), ((0, 0), (0, 1))))
        law = np.zeros(len(STATES))
        masks = list(itertools.combinations(range(LENGTH), counts[i]))
        for index in np.flatnonzero(probs):
            for mask in masks:
                after = STATES[index].copy()
                after[list(mask)] = CODES
                law[after @ [25, 5, 1]] += probs[index] / len(masks)
        return law

    law = toy.chain_law(kernel, LENGTH)
    assert toy.chi_square_p(draw(4000, num_inner_steps=0).tokens, law) > 1e-3
    assert toy.chi_square_p(draw(4000, num_inner_steps=0, num_steps=1).tokens, law) < 1e-3
