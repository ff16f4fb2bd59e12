"""The objective of test-time logits against float64 NumPy, on a codec that is one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import (
    BATCH,
    BITS,
    CODES,
    GRID,
    LENGTH,
    C,
    decode,
    f32,
    gaussian_gradient,
    gaussian_loss,
    log_softmax,
    make_params,
    make_problem,
    make_target,
    prior_term,
    softmax_vjp,
)
from scipy import special

from aps_jax import operators
from aps_jax.codec import expectation
from aps_jax.codec.lfq import LFQ
from aps_jax.sampling import objective
from aps_jax.types import Codec, Perceptual

GAUSSIAN = {"measurement_term": "gaussian", "sigma": 0.5}
problem = pytest.fixture(scope="module")(make_problem)


def losses_of(problem, weight=None, params=None, y=None, **options):
    return objective.loss(
        make_target(problem, params, y, **options),
        f32(problem["logits"]),
        f32(problem["prior"]),
        jnp.asarray(problem["tokens"]),
        weight,
    )


# The quantized expectation.


def test_quantized_expectation_is_a_code_with_the_gradient_of_the_mean(problem, rng):
    codec = make_params(problem).codec
    logits = rng.normal(scale=2, size=(BATCH, LENGTH, CODES))
    cotangent = rng.normal(size=(BATCH, LENGTH, BITS))

    def value(logits):
        codes, tokens = expectation.quantized_expectation(codec, logits, GRID)
        return jnp.sum(codes * f32(cotangent)), (codes, tokens)

    grad, (codes, tokens) = jax.grad(value, has_aux=True)(f32(logits))
    mean = np.exp(log_softmax(logits)) @ C
    np.testing.assert_array_equal(codes, np.sign(mean))  # exactly: no rounding is left over
    np.testing.assert_array_equal(C[np.asarray(tokens)], codes)
    np.testing.assert_allclose(grad, softmax_vjp(logits, cotangent @ C.T), atol=2e-6)
    found = expectation.expected_code(codec, f32(logits), GRID)
    np.testing.assert_allclose(found, mean, atol=1e-6)


def test_decoding_at_twice_the_size_averages_areas(rng):
    def tile(params, codes):
        return params[:, : 4 * codes.shape[1], : 4 * codes.shape[2]]

    field = rng.normal(size=(1, 12, 16, 3))
    codec = Codec(params=f32(field), quantizer=LFQ(BITS), decode=tile, stride=4)
    codes = jnp.zeros((1, 12, BITS))
    got = expectation.decode(codec, codes, (3, 4), (5, 7), 2)
    expected = [[field[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for j in range(7)]
                for i in range(5)]  # fmt: skip
    np.testing.assert_allclose(got[0], expected, atol=1e-6)
    np.testing.assert_array_equal(
        expectation.decode(codec, codes, (3, 4), (11, 13), 1), f32(field)[:, :11, :13]
    )


# The terms.


def test_gaussian_and_prior_terms(problem):
    expected = [
        gaussian_loss(problem, problem["logits"], sigma=0.5, prior_weight=w) for w in (0.0, 0.7)
    ]
    np.testing.assert_allclose(losses_of(problem, **GAUSSIAN), expected[0], rtol=1e-5)
    np.testing.assert_allclose(losses_of(problem, 0.7, **GAUSSIAN), expected[1], rtol=1e-5)
    assert np.all(expected[0] != expected[1])


def test_absolute_error_counts_measured_pixels_only(problem):
    """Times the number of tokens, so that it weighs against the prior as in any other size."""
    mask = problem["mask"]
    params = make_params(problem, operators.inpainting_mask(mask))
    residual = np.abs(decode(problem, problem["logits"]) - problem["y"]) * mask
    mean = residual.sum(axis=(1, 2, 3)) / (3 * mask.sum(axis=(1, 2, 3)))
    expected = LENGTH * mean + 0.7 * prior_term(problem, problem["logits"])
    # What stands in y at missing pixels is of no account.
    other = problem["y"] * mask + 9 * (1 - mask)
    for y in (problem["y"] * mask, other):
        np.testing.assert_allclose(losses_of(problem, 0.7, params, f32(y)), expected, rtol=1e-5)
    got = losses_of(problem, None, params, f32(other), **GAUSSIAN)
    expected = gaussian_loss(problem, problem["logits"], sigma=0.5, prior_weight=0, mask=mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_perceptual_term(problem):
    """Of what the operator gives, times the number of tokens, too."""

    def squares(params, a, b):
        return jnp.mean((a - b) ** 2, axis=(1, 2, 3))

    params = make_params(problem, perceptual=Perceptual(params=None, apply=squares))
    extra = losses_of(problem, None, params, perceptual_weight=0.5) - losses_of(problem)
    residual = decode(problem, problem["logits"]) - problem["y"]
    np.testing.assert_allclose(extra / LENGTH, 0.5 * (residual**2).mean(axis=(1, 2, 3)), rtol=1e-4)


def test_the_prior_term_is_least_where_the_prior_is_sure(rng):
    log_prior = f32(log_softmax(rng.normal(size=(1, 2, CODES))))
    is_masked = jnp.ones((1, 2), bool)
    modes = np.argmax(log_prior, axis=-1)
    values = []
    for tokens in np.ndindex(CODES, CODES):
        sure = f32(100 * np.eye(CODES))[jnp.asarray([tokens])]
        values.append(float(objective.prior_term(sure, log_prior, is_masked)[0]))
    assert np.argmin(values) == CODES * modes[0, 0] + modes[0, 1]
    assert min(values) < float(objective.prior_term(log_prior, log_prior, is_masked)[0])
    np.testing.assert_allclose(min(values), -np.max(log_prior, axis=-1).sum(), rtol=1e-5)


def test_the_divergence_of_two_laws(rng):
    """Normalised logits or not; least, and flat, where the laws agree."""
    phi = rng.normal(size=(1, 2, CODES))
    log_prior = log_softmax(rng.normal(size=(1, 2, CODES)))
    p = special.softmax(phi, axis=-1)
    for is_exact, inside in [(True, log_softmax(phi)), (False, phi)]:
        got = objective.kl_term(f32(phi), f32(log_prior), is_exact=is_exact)
        np.testing.assert_allclose(got, np.sum(p * (inside - log_prior), axis=-1), atol=1e-5)

    def exact(phi):
        return jnp.sum(objective.kl_term(phi, f32(log_prior), is_exact=True))

    value, slope = jax.value_and_grad(exact)(f32(log_prior))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


# Gradients.


def gradients(problem, weight, **options):
    return jax.grad(
        lambda logits: jnp.sum(losses_of({**problem, "logits": logits}, weight, **options))
    )(f32(problem["logits"]))


def test_gradient_of_the_smooth_relaxation_equals_finite_differences(problem, rng, monkeypatch):
    """With mean codes in place of quantized ones, whose gradient is exact."""

    def mean_codes(codec, logits, grid):
        mean = expectation.expected_code(codec, logits, grid)
        return mean, expectation.nearest(codec, mean, grid)

    monkeypatch.setattr(objective, "quantized_expectation", mean_codes)
    grad = np.float64(gradients(problem, 0.7, **GAUSSIAN))
    step = 1e-6
    for _ in range(4):
        direction = rng.normal(size=grad.shape)
        ends = [
            gaussian_loss(
                problem, problem["logits"] + sign * step * direction, sigma=0.5, prior_weight=0.7,
                quantized=False,
            ).sum()
            for sign in (1, -1)
        ]  # fmt: skip
        np.testing.assert_allclose(
            np.sum(grad * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-3
        )


def test_straight_through_gradient_equals_its_definition(problem):
    grad = gradients(problem, 0.7, **GAUSSIAN)
    expected = gaussian_gradient(problem, problem["logits"], sigma=0.5, prior_weight=0.7)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(grad[0, 1], 0)  # the known token
    assert np.all(np.abs(np.delete(np.asarray(grad), 1, axis=1)).max(axis=-1) > 1e-3)


def test_images_of_a_batch_do_not_meet(problem):
    changed = dict(problem)
    for name in ("y", "logits", "prior"):
        changed[name] = problem[name].copy()
        changed[name][1] = np.roll(problem[name][1], 1, axis=-1)
    a, b = (losses_of(p, 0.5) for p in (problem, changed))
    assert a[0] == b[0] and abs(a[1] - b[1]) > 1e-3
    a, b = (np.asarray(gradients(p, 0.5)) for p in (problem, changed))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3
