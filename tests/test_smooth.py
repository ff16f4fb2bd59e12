"""Data consistency: what samples still owe the measurement, against dense algebra."""

import dataclasses

import contract
import jax
import numpy as np
import pytest
from conftest import channel_matrix
from test_starts import SIDE, SIGMA, columns, differences, for_linear_operators, images

from aps_jax import operators, samplers
from aps_jax.sampling.smooth import SMOOTHNESS, smooth_estimate

sample = jax.jit(samplers.sample, static_argnames="config")


@for_linear_operators
@pytest.mark.parametrize("smoothness", [0.05, SMOOTHNESS])
def test_the_change_around_an_image_solves_its_normal_equations(operator, smoothness):
    x = images()
    y = operator(x) + SIGMA * jax.random.normal(jax.random.key(0), operator(x).shape)
    around = 0.8 * x + 0.1 * jax.random.uniform(jax.random.key(1), x.shape)
    found = smooth_estimate(
        operator, y, image_shape=(SIDE, SIDE), sigma=SIGMA, around=around, smoothness=smoothness
    )
    a, d = channel_matrix(operator, SIDE), differences()
    left = a.T @ a / SIGMA**2 + d.T @ d / smoothness**2
    change = np.linalg.solve(left, a.T @ (columns(y) - a @ columns(around)) / SIGMA**2)
    size = np.sqrt(np.mean(change**2))
    assert size > 0.03
    best = np.clip(columns(around) + change, -1, 1)
    assert np.sqrt(np.mean((columns(found) - best) ** 2)) < 0.05 * size


def test_what_explains_the_measurement_exactly_stays():
    x, operator = images(), operators.gaussian_blur(kernel_size=7, std=1.5)
    found = smooth_estimate(operator, operator(x), image_shape=(SIDE, SIDE), sigma=SIGMA, around=x)
    np.testing.assert_allclose(found, x, atol=1e-3)


@pytest.mark.parametrize(
    "operator",
    [
        operators.quantization(bits=2),
        operators.compose(operators.jpeg(quality=20), operators.super_resolution(scale=2)),
        operators.stack([operators.denoising(), operators.quantization(bits=2)]),
    ],
    ids=["quantization", "compose", "stack"],
)
def test_a_gradient_that_is_a_stand_in_changes_nothing(operator):
    params, plain = contract.params_of("aps"), contract.smallest("aps")
    x = contract.random_images()
    params, y = params.replace(operator=operator), operator(x)
    config = dataclasses.replace(plain, data_consistency=0.1)
    if not operator.is_image:
        config = dataclasses.replace(config, image_shape=x.shape[1:3])
    found = sample(params, y, jax.random.key(3), config=config)
    np.testing.assert_array_equal(found.samples, found.decoded)


@pytest.mark.parametrize("name", ["aps", "dps", "psld"])
def test_samples_of_every_kind_of_sampler_explain_more_and_keep_their_tokens(name):
    params, plain = contract.params_of(name), contract.smallest(name)
    config = dataclasses.replace(plain, data_consistency=0.1)
    y, key = params.operator(contract.random_images()), jax.random.key(3)
    without, found = sample(params, y, key, config=plain), sample(params, y, key, config=config)
    for s in range(plain.num_samples):
        expected = smooth_estimate(
            params.operator, y, image_shape=without.images.shape[1:3], sigma=plain.sigma,
            around=without.samples[:, s], smoothness=0.1,
        )  # fmt: skip
        np.testing.assert_allclose(found.samples[:, s], expected, atol=2e-3)
    np.testing.assert_array_equal(found.images, found.samples[:, 0])
    np.testing.assert_allclose(found.decoded, without.samples, atol=1e-6)
    np.testing.assert_array_equal(without.decoded, without.samples)
    np.testing.assert_allclose(found.mean, found.samples.mean(1), atol=1e-6)
    if without.tokens is not None:
        np.testing.assert_array_equal(found.tokens, without.tokens)

    def misfit(x):
        return np.mean((np.asarray(params.operator(x)) - y) ** 2)

    assert misfit(found.images) < 0.5 * misfit(without.images)
