"""APS-SMC on the toy: its weights by enumeration, and the exact posterior in the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from scipy import stats
from toy import CODES, FIELDS, LENGTH

from aps_jax import APSConfig, samplers
from aps_jax.sampler import make_aps
from aps_jax.samplers import APSSMCConfig

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3
SIGMA = 3.0  # weights of a few nats, so that a few dozen particles can be near the limit
ENERGY = toy.energies(toy.decoded_images(), Y, SIGMA)
POSTERIOR = toy.exact_posterior(JOINT, toy.decoded_images(), Y, SIGMA)
IN_ORDER = {"num_steps": LENGTH, "schedule": "linear"}

sample = jax.jit(samplers.sample, static_argnames="config")


def draw(count, config):
    return sample(toy.make_params(JOINT), toy.batch_of(count, Y), jax.random.key(0), config=config)


def test_weights_of_one_step_are_those_of_enumeration():
    """All tokens at once: posterior of the product law over the mixture that is drawn from."""
    share = 0.3
    options = {"sigma": SIGMA, "num_steps": 1, "num_inner_steps": 2, "learning_rate": 1.0}
    config = APSSMCConfig(num_particles=200, prior_share=share, **options)
    target, keys = toy.make_target(JOINT, config, y=Y)
    aps = make_aps(APSConfig(measurement_term="gaussian", **options))

    @jax.jit
    def run():
        start = config.init(target, keys)
        particles, log_w, *_ = config.step(target, start, keys)[0]
        log_prior, first = target.log_prior(target.tokens), start.particles
        phi = aps.refine(target, aps.init(target, keys), log_prior, log_prior).phi
        return particles.tokens, log_w, log_prior, phi, (first.log_prior + first.tilt)[7]

    tokens, log_w, log_prior, phi, own_phi = run()
    np.testing.assert_allclose(own_phi, phi, atol=1e-5)  # The proposal is that of APS.

    def law(log_probs):  # Of all 64 fields.
        each = np.exp(np.float64(log_probs[0]))
        each /= each.sum(axis=-1, keepdims=True)
        return np.prod([each[at, FIELDS[:, at]] for at in range(LENGTH)], axis=0)

    mixture = share * law(log_prior) + (1 - share) * law(phi)
    weights = law(log_prior) * np.exp(-ENERGY) / mixture
    index = toy.index_of(tokens[:, 0])
    assert len(np.unique(index)) > 15 and np.ptp(np.log(weights[index])) > 2
    # Weights are known up to a factor.
    found = np.float64(log_w[:, 0])
    np.testing.assert_allclose(
        found - found.max(), np.log(weights[index] / weights[index].max()), atol=1e-3
    )
    assert toy.chi_square_p(tokens[:, 0], mixture) > 1e-3


def noise_of(law, count):
    """Expected total variation of as many true samples."""
    return np.sum(np.sqrt(2 * law / (np.pi * count))) / 2


LIMITS = {
    "refined once": {"num_refinements": 1},
    "refined always": {"num_refinements": LENGTH, "ess_threshold": 1.0},
    "anchored order": {"num_refinements": 2, "order": "anchored", "ramp": "constant"},
    "published term": {"num_refinements": LENGTH, "measurement_term": "l1", "prior_weight": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", LIMITS.values(), ids=LIMITS)
def test_many_particles_draw_from_the_posterior(options):
    """However little phi knows, and whatever is carried over; few particles do not."""
    count, found = 1500, []
    for num_particles in (1, 8, 64):
        config = APSSMCConfig(
            num_particles=num_particles, num_inner_steps=2, sigma=SIGMA, **IN_ORDER, **options
        )
        shares = toy.frequencies(draw(count, config).tokens)
        found.append(toy.total_variation(shares, POSTERIOR))
    noise = noise_of(POSTERIOR, count)
    assert found[2] < 1.5 * noise
    assert found[0] > found[1] and found[0] > 3 * noise


@pytest.mark.slow
def test_several_tokens_at_once_have_the_law_of_that_decoding():
    """All three at once: the prior's marginals in place of its joint law, times the likelihood."""
    cube = JOINT.reshape(CODES, CODES, CODES)
    marginals = [cube.sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    product = np.einsum("i,j,k->ijk", *marginals).ravel()
    law = toy.exact_posterior(product, toy.decoded_images(), Y, SIGMA)
    config = APSSMCConfig(num_steps=1, num_particles=64, num_inner_steps=2, sigma=SIGMA)
    shares = toy.frequencies(draw(1500, config).tokens)
    noise = noise_of(law, 1500)
    assert toy.total_variation(shares, law) < 1.5 * noise
    assert toy.total_variation(law, POSTERIOR) > 3 * noise


@pytest.mark.slow
def test_one_particle_is_aps_with_random_remasking():
    options = {
        "sigma": SIGMA, "num_inner_steps": 3, "learning_rate": 1.0, "prior_weight": 0.5, **IN_ORDER
    }  # fmt: skip
    alone = APSSMCConfig(num_particles=1, num_refinements=LENGTH, prior_share=0.0, **options)
    aps = APSConfig(measurement_term="gaussian", draw="categorical", remasking="random", **options)
    counts = [3000 * toy.frequencies(draw(3000, config).tokens) for config in (alone, aps)]
    is_rare = counts[0] + counts[1] < 10
    table = [np.append(n[~is_rare], n[is_rare].sum()) for n in counts]
    assert stats.chi2_contingency(np.array(table)).pvalue > 1e-3
    assert toy.total_variation(counts[0] / 3000, POSTERIOR) > 0.1


@pytest.mark.slow
def test_a_whole_run_is_never_far_above_its_proposal():
    """The prior's share of particles bounds prior over proposal of all tokens together."""
    config = APSSMCConfig(
        num_particles=50, num_refinements=LENGTH, learning_rate=3.0, num_inner_steps=5,
        prior_share=0.25, ess_threshold=0.0, sigma=SIGMA, **IN_ORDER,
    )  # fmt: skip
    target, keys = toy.make_target(JOINT, config, count=20, y=Y)
    state = config.init(target, keys)
    step = jax.jit(lambda state: config.step(target, state, keys)[0])
    for _ in range(LENGTH):
        state = step(state)
    # Of log_odds, which began at log(0.25 / 0.75): log p / q_phi of the whole run.
    log_ratio = state.particles.log_odds - np.log(0.25 / 0.75)
    total = log_ratio - jnp.logaddexp(np.log(0.25) + log_ratio, np.log(0.75))
    assert np.max(total) <= np.log(4) + 1e-5
    weights = total - ENERGY[toy.index_of(state.particles.tokens)]
    centred = [w - jax.nn.logsumexp(w, axis=0) for w in (weights, state.log_weights)]
    np.testing.assert_allclose(*centred, atol=2e-3)
