"""The inner loop against Adam in float64 NumPy, on a codec that is one matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import f32, gaussian_gradient, gaussian_loss, make_problem, make_target

from aps_jax import APSConfig
from aps_jax.sampler import APSState, make_aps
from aps_jax.sampling import inner_loop

problem = pytest.fixture(scope="module")(make_problem)


@functools.partial(jax.jit, static_argnames="config")
def refine(config, target, state, phi, log_prior):
    return make_aps(config).refine(target, state, phi, log_prior)


def run(problem, *, sensitivity=None, step=0, **options):
    """What APS does within one timestep."""
    options = {"measurement_term": "gaussian", "sigma": 0.5, "prior_weight": 0.7} | options
    state = APSState(
        tokens=jnp.asarray(problem["tokens"]),
        step=jnp.asarray(step, jnp.int32),
        phi=None,
        sensitivity=sensitivity,
        estimate=None,
    )
    target, phi = make_target(problem, **options), f32(problem["logits"])
    return refine(APSConfig(**options), target, state, phi, f32(problem["prior"]))


def numpy_adam(problem, num_steps, learning_rate, share=1.0, rates=None, weight=0.7):
    phi = problem["logits"]
    first, second, losses = 0.0, 0.0, []
    for step in range(1, num_steps + 1):
        losses.append(gaussian_loss(problem, phi, sigma=0.5, prior_weight=weight))
        grad = gaussian_gradient(problem, phi, sigma=0.5, prior_weight=weight)
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        rate = learning_rate * (1 if rates is None else rates[step - 1])
        phi = phi - share * rate * mean / (np.sqrt(square) + 1e-8)
    return phi, np.array(losses)


def test_it_is_adam(problem):
    result = run(problem, num_inner_steps=6, learning_rate=0.3)
    phi, losses = numpy_adam(problem, 6, 0.3)
    np.testing.assert_allclose(result.phi, phi, atol=2e-4)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    np.testing.assert_array_equal(result.loss, result.losses[-1])
    assert np.abs(phi - problem["logits"]).max() > 0.05


def test_the_bound_scales_the_prior_term_of_each_timestep(problem):
    """Theorem 3.3: w_t = (alpha_s - alpha_t) / (1 - alpha_t); 1/4, 1/3, 1/2, 1 if linear."""
    options = {"num_inner_steps": 1, "prior_weighting": "elbo", "schedule": "linear"}
    for step, weight in enumerate([1 / 4, 1 / 3, 1 / 2, 1]):
        result = run(problem, num_steps=4, step=step, **options)
        expected = gaussian_loss(problem, problem["logits"], sigma=0.5, prior_weight=0.7 * weight)
        np.testing.assert_allclose(result.loss, expected, rtol=1e-5)


def test_sensitivity_scales_the_updates(problem):
    share = np.array([[0.2, 1.0, 0.7], [0.0, 0.5, 1.0]])
    result = run(problem, num_inner_steps=4, learning_rate=0.3, sensitivity=f32(share))
    phi, losses = numpy_adam(problem, 4, 0.3, share=share[..., None])
    np.testing.assert_allclose(result.phi, phi, atol=2e-4)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    np.testing.assert_array_equal(result.phi[1, 0], f32(problem["logits"][1, 0]))


def test_the_learning_rate_falls_over_all_timesteps(problem):
    options = {"num_inner_steps": 3, "num_steps": 2, "learning_rate_schedule": "cosine"}
    rates = (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    for step in (0, 1):
        result = run(problem, step=step, learning_rate=0.3, **options)
        phi, losses = numpy_adam(problem, 3, 0.3, rates=rates[3 * step :])
        np.testing.assert_allclose(result.phi, phi, atol=2e-4)
        np.testing.assert_allclose(result.loss, losses[-1], rtol=1e-4)


def test_the_best_phi_is_kept(problem):
    # Steps so long that the loss goes up and down.
    options = {"learning_rate": 3.0, "keep_best": True}
    result = run(problem, num_inner_steps=7, **options)
    path = [numpy_adam(problem, n, 3.0) for n in range(8)]
    losses = path[-1][1]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3)
    best = 3 + np.argmin(losses[3:], axis=0)  # in the second half
    assert np.any(best != np.argmin(losses, axis=0)) and best[0] != best[1]
    expected = np.stack([path[step][0][image] for image, step in enumerate(best)])
    np.testing.assert_allclose(result.phi, expected, atol=2e-3)
    np.testing.assert_allclose(result.loss, losses[3:].min(axis=0), rtol=1e-3)
    # A single step has evaluated nothing but the start, and moves on from it.
    single = run(problem, num_inner_steps=1, **options)
    np.testing.assert_allclose(single.phi, path[1][0], atol=2e-3)


def test_a_failed_step_is_told_although_a_better_one_was_kept(problem):
    result = run(problem, num_inner_steps=4, learning_rate=3e38, keep_best=True)
    assert np.all(np.isfinite(result.losses[0])) and not np.all(np.isfinite(result.losses))
    assert np.all(np.isnan(result.loss)) and np.all(np.isfinite(result.phi))


def test_no_inner_steps_leave_the_logits(problem):
    result = run(problem, num_inner_steps=0)
    np.testing.assert_array_equal(result.phi, f32(problem["logits"]))
    assert np.all(np.isnan(result.loss)) and result.losses.shape == (0, 2)


def test_any_optimizer_and_any_objective(rng):
    """Gradient descent on a parabola per row, whose factor depends on the inner step."""
    start, targets = rng.normal(size=(2, 3, 2, 4))
    factors = np.array([1.0, 2.0, 0.5])

    def losses_of(phi, j):
        return f32(factors)[j] * jnp.sum((phi - f32(targets)) ** 2, axis=(1, 2))

    result = inner_loop.descend(losses_of, f32(start), optax.sgd(0.1), 3)
    phi, losses = start, []
    for factor in factors:
        losses.append(factor * np.sum((phi - targets) ** 2, axis=(1, 2)))
        phi = phi - 0.2 * factor * (phi - targets)
    np.testing.assert_allclose(result.phi, phi, atol=1e-5)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)

    # `move` says what an update does.
    def backwards(phi, updates, j):
        return phi - jnp.where(j == 0, updates, 0)

    once = inner_loop.descend(losses_of, f32(start), optax.sgd(0.1), 3, move=backwards)
    np.testing.assert_allclose(once.phi, start + 0.2 * (start - targets), atol=1e-5)
