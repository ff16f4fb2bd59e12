"""SGDD on the toy: its augmented target can be written down, and Gibbs has to draw from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import CODES, FIELDS, LENGTH

from aps_jax import samplers
from aps_jax.codec.vq import VQ
from aps_jax.samplers.sgdd import SGDDConfig
from aps_jax.sampling.target import fold

# `test_samplers.py` holds the laws of every sampler; these proofs of one compile longer.
pytestmark = pytest.mark.slow

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3
SIGMA = 2.0  # energies of a few nats: the prior matters, and chains move
ENERGY = toy.energies(toy.decoded_images(), Y, SIGMA)
POSTERIOR = toy.exact_posterior(JOINT, toy.decoded_images(), Y, SIGMA)
HAMMING = (FIELDS[:, None] != FIELDS[None]).sum(axis=-1)

sample = jax.jit(samplers.sample, static_argnames="config")


def draw(config, count=3000):
    y = toy.batch_of(count, Y)
    return sample(toy.make_params(JOINT), y, jax.random.key(0), config=config).tokens


def augmented(u):
    """pi(x, z) [64, 64] = p(x) exp(-E(z)) D(x, z)."""
    changed, kept = u / CODES, 1 - u + u / CODES
    target = JOINT[:, None] * np.exp(-ENERGY)[None] * changed**HAMMING * kept ** (LENGTH - HAMMING)
    return target / target.sum()


def test_gibbs_draws_from_the_augmented_target():
    """x and z together: 4096 cells, chains in parallel and averaged over time."""
    u, count, burn, length = 0.5, 1500, 25, 60
    config = SGDDConfig(
        num_steps=1, num_likelihood_steps=4, num_denoise_steps=LENGTH, method="gibbs",
        first_noise=u, last_noise=u, sigma=SIGMA,
    )  # fmt: skip

    @jax.jit
    def run(target, keys):
        def step(state, i):
            # Step 0 again and again: the noise stays, the keys must not.
            after, _ = config.step(target, state._replace(step=jnp.zeros_like(i)), fold(keys, i))
            return after, (after.x, after.tokens)

        return jax.lax.scan(step, config.init(target, keys), jnp.arange(burn + length))[1]

    xs, zs = run(*toy.make_target(JOINT, config, count, Y))
    cells = 64 * toy.index_of(xs[burn:]) + toy.index_of(zs[burn:])
    found = np.bincount(cells.ravel(), minlength=4096) / cells.size
    target = augmented(u)
    assert toy.total_variation(found, target.ravel()) < 0.05
    # Marginals are sharper: they tell the target from the posterior and from the prior.
    found = found.reshape(64, 64)
    for axis, other in [(1, JOINT), (0, POSTERIOR)]:
        marginal = target.sum(axis=axis)
        assert toy.total_variation(found.sum(axis=axis), marginal) < 0.02
        assert toy.total_variation(other, marginal) > 0.08


@pytest.mark.parametrize("proposal", ["uniform", pytest.param("bit", marks=pytest.mark.slow)])
def test_gibbs_tends_to_the_posterior(proposal):
    config = SGDDConfig(
        num_steps=40, num_likelihood_steps=4, num_denoise_steps=LENGTH, method="gibbs",
        last_noise=0.05, sigma=SIGMA, proposal=proposal,
    )  # fmt: skip
    found = toy.frequencies(draw(config))
    # Annealed a little too fast to be in equilibrium, and 64 cells of 3000 draws are noisy.
    assert toy.total_variation(found, augmented(0.05).sum(axis=0)) < 0.1
    assert toy.total_variation(found, POSTERIOR) < 0.25 * toy.total_variation(JOINT, POSTERIOR)


def test_renoising_without_likelihood_steps_keeps_the_prior():
    """A prior sample, partly masked and completed exactly, is a prior sample again."""
    config = SGDDConfig(
        num_steps=3, num_likelihood_steps=0, num_denoise_steps=40, last_noise=0.2, sigma=SIGMA
    )
    assert min(config.denoise_steps) >= LENGTH
    assert toy.chi_square_p(draw(config), JOINT) > 1e-3


def test_renoising_moves_towards_the_posterior():
    config = SGDDConfig(
        num_steps=12, num_likelihood_steps=8, num_denoise_steps=12, last_noise=0.05, sigma=SIGMA
    )
    found = toy.frequencies(draw(config))
    from_prior = toy.total_variation(JOINT, POSTERIOR)
    assert toy.total_variation(found, POSTERIOR) < 0.6 * from_prior
    gained = (JOINT @ ENERGY - found @ ENERGY) / (JOINT @ ENERGY - POSTERIOR @ ENERGY)
    assert gained > 0.5


def test_couplings():
    u = 0.3
    exact = SGDDConfig().log_coupling(jnp.float32(u), CODES)
    np.testing.assert_allclose(exact, np.log(u / 4) - np.log(1 - u + u / 4), rtol=1e-5)
    # The released code's a = (1 - exp(-alpha sigma)) (N - 1) / N, with u = 1 - exp(-sigma).
    time = -np.log(1 - u)
    a = (1 - np.exp(-10 * time)) * 3 / 4
    code = SGDDConfig(coupling="code").log_coupling(jnp.float32(u), CODES)
    np.testing.assert_allclose(code, np.log(a + 1e-5) - np.log(1 - a), rtol=1e-4)


def test_noise_levels_and_calls():
    config = SGDDConfig(num_steps=3, num_denoise_steps=10, last_noise=0.01)
    np.testing.assert_allclose(config.noises, [1, 0.1, 0.01])
    assert config.denoise_steps == (10, 1, 1)
    gibbs = SGDDConfig(num_steps=3, num_denoise_steps=10, method="gibbs")
    assert gibbs.denoise_steps == (10, 10, 10)


def test_bits_need_a_power_of_two():
    params = toy.make_params(JOINT)
    codec = params.codec.replace(quantizer=VQ(jnp.zeros((3, 2))))
    params = params.replace(codec=codec, prior=params.prior.replace(num_codes=3))
    with pytest.raises(ValueError, match=r"needs 2\*\*d codes, got 3"):
        samplers.sample(
            params, toy.batch_of(1), jax.random.key(0), config=SGDDConfig(proposal="bit")
        )
