"""SMC on the toy, where its target is the exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import LENGTH

from aps_jax import samplers
from aps_jax.samplers import selection
from aps_jax.samplers.smc import SMCConfig

# `test_samplers.py` holds the laws of every sampler; these proofs of one compile longer.
pytestmark = pytest.mark.slow

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3
SIGMA = 3.0  # weights of a few nats, so that a few dozen particles can be near the limit
ENERGY = toy.energies(toy.decoded_images(), Y, SIGMA)
POSTERIOR = toy.exact_posterior(JOINT, toy.decoded_images(), Y, SIGMA)
FROM_PRIOR = toy.total_variation(JOINT, POSTERIOR)

sample = jax.jit(samplers.sample, static_argnames="config")


def draw(count, **options):
    """Tokens of a sampler that decodes one token at a time, so that its prior is exact."""
    config = SMCConfig(
        **{"num_steps": LENGTH, "reveal": "random", "weights": "absolute", "sigma": SIGMA} | options
    )
    y = toy.batch_of(count, Y)
    return sample(toy.make_params(JOINT), y, jax.random.key(0), config=config).tokens


@pytest.mark.parametrize("ess_threshold", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ramp", ["linear", pytest.param("constant", marks=pytest.mark.slow)])
def test_many_particles_draw_from_the_posterior(ramp, ess_threshold):
    """Whether they are never resampled, or always; whatever the intermediate weights."""
    options = {"ramp": ramp, "ess_threshold": ess_threshold}
    if ramp == "constant":
        options |= {"fill": "mode"}
    else:
        options |= {"num_fills": 2}
    count = 1500
    tokens = draw(count, num_particles=32, **options)
    noise = np.sum(np.sqrt(2 * POSTERIOR / (np.pi * count))) / 2
    assert toy.total_variation(toy.frequencies(tokens), POSTERIOR) < 1.5 * noise
    assert FROM_PRIOR > 4 * noise


def test_one_particle_draws_from_the_prior():
    assert toy.chi_square_p(draw(4000, num_particles=1), JOINT) > 1e-3


@pytest.mark.slow
def test_the_reward_weight_tempers_the_likelihood():
    warm = toy.exact_posterior(JOINT, toy.decoded_images(), Y, SIGMA * np.sqrt(2))
    found = toy.frequencies(draw(3000, num_particles=16, reward_weight=0.5, fill="mode"))
    assert toy.total_variation(found, warm) < 0.6 * toy.total_variation(found, POSTERIOR)


@pytest.mark.slow
def test_standardized_weights_do_not_see_the_scale_of_energies():
    options = {"num_particles": 8, "weights": "standardized", "fill": "mode"}
    tokens = draw(500, **options)
    sharp = draw(500, **options | {"sigma": 0.05})
    assert np.mean(np.any(tokens != sharp, axis=1)) < 0.02  # rounding
    assert ENERGY[toy.index_of(tokens)].mean() < 0.8 * (JOINT @ ENERGY)
    best = draw(500, **options, output="best")
    assert ENERGY[toy.index_of(best)].mean() < ENERGY[toy.index_of(tokens)].mean()


def test_systematic_resampling():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), size=3).T
    keys = jax.random.split(jax.random.key(0), 2000)
    run = jax.vmap(lambda key: selection.systematic(jax.random.split(key, 3), jnp.log(weights)))
    index = np.asarray(run(keys))  # [2000, 5, 3]
    counts = (index[:, :, None, :] == np.arange(5)[:, None]).sum(axis=1)  # [2000, 5, 3]
    assert np.all(counts >= np.floor(5 * weights)) and np.all(counts <= np.ceil(5 * weights))
    np.testing.assert_allclose(counts.mean(axis=0), 5 * weights, atol=0.06)


def test_effective_size():
    w = jnp.log(jnp.array([[0.5, 1.0], [0.5, 1e-30]]))
    np.testing.assert_allclose(selection.effective_size(w), [2, 1], rtol=1e-6)
