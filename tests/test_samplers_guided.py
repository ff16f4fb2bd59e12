"""SVDD-PM and G2D2 against laws that can be written down on the toy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import CODES, FIELDS, LENGTH, STATES

from aps_jax import samplers
from aps_jax import schedules as schedule
from aps_jax.samplers import g2d2, selection
from aps_jax.samplers.g2d2 import G2D2Config
from aps_jax.samplers.svdd import SVDDConfig
from aps_jax.sampling import objective

# `test_samplers.py` holds the laws of every sampler; these proofs of one compile longer.
pytestmark = pytest.mark.slow

JOINT = toy.skewed_joint()
Y = toy.decoded_images()[7] + 0.3


sample = jax.jit(samplers.sample, static_argnames="config")


def draw(config, count=4000):
    return sample(toy.make_params(JOINT), toy.batch_of(count, Y), jax.random.key(0), config=config)


def mean_energy(tokens, sigma=1.0):
    return toy.energies(toy.decoded_images(), Y, sigma)[toy.index_of(tokens)].mean()


# Selection.


def test_weights_of_candidates():
    values = jnp.array([[1.0, 0.0], [3.0, jnp.nan], [2.0, -jnp.inf]])
    plain = selection.log_weights(values, "sample", 0.5)
    np.testing.assert_allclose(plain[:, 0], [2, 6, 4])
    assert plain[0, 1] == 0 and np.all(np.isneginf(plain[1:, 1]))
    scaled = selection.log_weights(1e4 * values, "standardized", 2.0)
    np.testing.assert_allclose(scaled[:, 0], np.array([-1, 1, 0]) / np.sqrt(2 / 3) / 2, rtol=1e-5)
    equal = selection.log_weights(jnp.full((3, 1), 7e4), "standardized", 1.0)
    np.testing.assert_allclose(equal, 0)
    keys = jax.random.split(jax.random.key(0), 2)
    for rule in selection.RULES:
        assert selection.select(keys, values, rule, 1e-3).tolist() == [1, 0]
    nothing = jnp.full((3, 2), jnp.nan)
    for rule in selection.RULES:
        assert np.all(selection.select(keys, nothing, rule, 1.0) < 3)
    taken = selection.take({"a": values}, jnp.array([2, 0]))
    np.testing.assert_array_equal(taken["a"], [2, 0])


# SVDD-PM.


def test_svdd_follows_the_tilted_kernel_when_candidates_are_many():
    """As M grows, each step draws z_s from p(z_s | z_t) exp(-E(fill of z_s) / alpha)."""
    steps, alpha, sigma, count = 3, 8.0, 1.0, 3000
    energy = toy.energies(toy.decoded_images(), Y, sigma)
    fills = [np.argmax(toy.conditionals(JOINT, state), axis=1) for state in STATES]
    tilt = np.exp(-energy[toy.index_of(fills)] / alpha)
    gammas = schedule.masked_share("linear", steps)

    def kernel(i, state):
        stays = gammas[i + 1] / gammas[i]
        probs = toy.conditionals(JOINT, state)
        rows = np.zeros((3, CODES + 1))
        for row, token, prob in zip(rows, state, probs, strict=True):
            if token < CODES:
                row[token] = 1
            else:
                row[:CODES], row[CODES] = (1 - stays) * prob, stays
        law = toy.product_law(rows) * tilt
        return law / law.sum()

    law = toy.chain_law(kernel, steps)
    options = {"num_steps": steps, "sigma": sigma, "selection_temperature": alpha}
    config = SVDDConfig(**options, num_candidates=32, selection="sample")
    tokens = draw(config, count=count).tokens
    noise = np.sum(np.sqrt(2 * law / (np.pi * count))) / 2  # expected distance of a true sample
    assert toy.total_variation(toy.frequencies(tokens), law) < 1.5 * noise
    # What the law is not.
    assert toy.total_variation(JOINT, law) > 5 * noise
    exact = toy.exact_posterior(JOINT, toy.decoded_images(), Y, sigma * np.sqrt(alpha))
    assert toy.total_variation(exact, law) > 2 * noise


@pytest.mark.slow
def test_svdd_with_more_candidates_fits_better():
    def energy_of(num_candidates):
        config = SVDDConfig(num_steps=3, num_candidates=num_candidates)
        return mean_energy(draw(config, count=500).tokens)

    prior = JOINT @ toy.energies(toy.decoded_images(), Y, 1.0)
    one, many = energy_of(1), energy_of(24)
    assert abs(one - prior) < 0.2 * prior
    best = toy.energies(toy.decoded_images(), Y, 1.0).min()
    assert many - best < 0.2 * (one - best)


# G2D2.


def star_law(steps, forget):
    """Of G2D2 without inner steps: phi is the prior, mixed with the phi of the step before.

    Enumerates all paths, because phi depends on every state so far; clean tokens are one-hot.
    """
    counts = schedule.masked_counts("linear", steps, LENGTH)
    law = np.zeros(64)

    def follow(i, state, carried, mass):
        log_prior = np.maximum(np.log(np.maximum(toy.conditionals(JOINT, state), 1e-99)), -70)
        phi = log_prior if i == 0 else forget * log_prior + (1 - forget) * carried
        probs = np.exp(phi - np.logaddexp.reduce(phi, axis=1, keepdims=True))
        proposals = np.einsum("i,j,k->ijk", *probs).ravel()
        masks = list(itertools.combinations(range(LENGTH), counts[i]))
        for field, share in zip(FIELDS, proposals, strict=True):
            if share < 1e-6:
                continue
            for mask in masks:
                after = field.copy()
                after[list(mask)] = CODES
                if i == steps - 1:
                    law[toy.index_of(after)] += mass * share
                else:
                    follow(i + 1, after, np.log(probs), mass * share / len(masks))

    follow(0, np.full(LENGTH, CODES), None, 1.0)
    return law / law.sum()


@pytest.mark.parametrize("forget", [1.0, 0.3])
def test_the_star_shaped_process_without_guidance(forget):
    config = G2D2Config(num_steps=2, num_inner_steps=0, forget=forget, top_p=1.0)
    result = draw(config)
    np.testing.assert_array_equal(result.info.num_masked[0], 1)
    assert toy.chi_square_p(result.tokens, star_law(2, forget)) > 1e-3
    assert toy.chi_square_p(result.tokens, star_law(2, 0.7)) < 1e-3


def test_without_a_likelihood_the_exact_kl_keeps_the_prior():
    """The published KL instead flattens phi, an extra softmax(phi) in its gradient."""

    def tokens(**options):
        config = G2D2Config(
            num_steps=2, num_inner_steps=6, forget=1.0, top_p=1.0, kl_weight=1.0, kl_span=0.0,
            measurement_term="gaussian", sigma=1e4, learning_rate=1.0, learning_rate_span=0.0,
            **options,
        )  # fmt: skip
        return draw(config).tokens

    assert toy.chi_square_p(tokens(kl_exact=True), star_law(2, 1.0)) > 1e-3
    assert toy.chi_square_p(tokens(kl_exact=False), star_law(2, 1.0)) < 1e-3


def test_gradients_of_the_two_kls():
    rng = np.random.default_rng(0)
    phi, log_prior = (
        np.float32(np.log(rng.dirichlet(np.ones(CODES), size=(1, 2)))) for _ in range(2)
    )
    probs = np.exp(phi)
    kl = np.sum(probs * (phi - log_prior), axis=-1, keepdims=True)
    exact = probs * (phi - log_prior - kl)
    for is_exact, expected in [(True, exact), (False, exact + probs)]:
        kl_term = functools.partial(
            objective.kl_term, log_prior=jnp.asarray(log_prior), is_exact=is_exact
        )
        np.testing.assert_allclose(jnp.sum(kl_term(jnp.asarray(phi))), kl.sum(), rtol=1e-4)
        gradient = jax.grad(lambda phi, kl_term=kl_term: jnp.sum(kl_term(phi)))(jnp.asarray(phi))
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_markov_transition_is_bayes_rule():
    """Against the kernel's matrices: z_0 -> z_s -> z_t, all of VQ-Diffusion's mask-and-uniform."""
    uniform, gamma_s, gamma_t = 0.05, 0.3, 0.6

    def matrix(keep, noise, mask):  # from column to row
        m = np.zeros((CODES + 1, CODES + 1))
        m[:CODES, :CODES] = keep * np.eye(CODES) + noise
        m[CODES, :CODES], m[CODES, CODES] = mask, 1
        return m

    to_s = matrix(1 - gamma_s - uniform, uniform / CODES, gamma_s)
    to_t = matrix(1 - gamma_t - uniform, uniform / CODES, gamma_t)
    between = to_t @ np.linalg.inv(to_s)
    phi = np.random.default_rng(0).dirichlet(np.ones(CODES), size=5)
    tokens = np.array([0, 1, 2, 3, CODES])
    expected = np.zeros((5, CODES + 1))
    for row, (token, probs) in enumerate(zip(tokens, phi, strict=True)):
        for clean in range(CODES):
            law = between[token] * to_s[:, clean] / to_t[token, clean]
            expected[row] += probs[clean] * law
    np.testing.assert_allclose(expected.sum(axis=1), 1)
    found = g2d2.markov_log_probs(
        jnp.log(phi)[None], jnp.asarray(tokens)[None], jnp.float32(gamma_t), jnp.float32(gamma_s),
        uniform_mass=uniform,
    )  # fmt: skip
    np.testing.assert_allclose(np.exp(found[0]), expected, atol=1e-5)


@pytest.mark.parametrize("transition", ["star", "markov"])
def test_guidance_lowers_the_energy(transition):
    config = G2D2Config(
        num_steps=8, num_inner_steps=8, kl_weight=0.0, transition=transition, learning_rate=2.0
    )
    result = draw(config, count=300)
    prior = JOINT @ toy.energies(toy.decoded_images(), Y, 1.0)
    best = toy.energies(toy.decoded_images(), Y, 1.0).min()
    assert mean_energy(result.tokens) - best < 0.35 * (prior - best)
    num_masked = np.asarray(result.info.num_masked)[:, :, 0]
    if transition == "star":
        counts = schedule.masked_counts("linear", 8, LENGTH)
        np.testing.assert_array_equal(num_masked, np.broadcast_to(counts[:, None], (8, 300)))
    else:
        assert np.all(np.diff(num_masked, axis=0) <= 0)  # it never masks a token again
