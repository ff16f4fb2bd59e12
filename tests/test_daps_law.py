"""DAPS on a Gaussian prior and a linear operator: its law in closed form, and what that tends to.

Every part of it is then affine with Gaussian noise, so mean and covariance of the images can be
carried from level to level by matrices, in float64 NumPy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import Denoiser, PixelParams, samplers
from aps_jax.codec.lfq import LFQ
from aps_jax.samplers import DAPSConfig, LatentDAPSConfig
from aps_jax.samplers.daps import edm_level
from aps_jax.types import Codec, Operator, bind

#: Two pixels whose prior is normal; one number is measured.
MEAN, PRIOR = np.array([0.1, -0.1]), np.array([[0.09, 0.03], [0.03, 0.06]])
A, Y, SIGMA = np.array([[1.0, 0.5]]), np.array([0.5]), 0.3
CURVE, PULL = A.T @ A / SIGMA**2, A.T @ Y / SIGMA**2


def power_posterior(power):
    """Mean and covariance of likelihood x prior^power, normalised."""
    sharpness = power * np.linalg.inv(PRIOR)
    covariance = np.linalg.inv(CURVE + sharpness)
    return covariance @ (PULL + sharpness @ MEAN), covariance


def law_of(config):
    """Mean and covariance of what DAPS returns, before it is clipped."""
    one, mean, covariance = np.eye(2), np.zeros(2), config.first_sigma**2 * np.eye(2)
    for i in range(config.num_steps):
        sigma = edm_level(config.first_sigma, config.last_sigma, i / config.num_steps)
        flow = one
        for j in range(config.num_ode_steps):
            now, after = (
                edm_level(sigma, config.ode_sigma, step / config.num_ode_steps)
                for step in (j, j + 1)
            )
            shrunk = PRIOR @ np.linalg.inv(PRIOR + now**2 * one)
            flow = (one + (after - now) / now * (one - shrunk)) @ flow
        mean, covariance = MEAN + flow @ (mean - MEAN), flow @ covariance @ flow.T
        # M Langevin steps of x and of its move v are linear around the fixed point x* =
        # (CURVE + 1 / sigma^2)^-1 (PULL + start / sigma^2): (x - x*, v) <- B (x - x*, v) + noise.
        rate = config.learning_rate * (1 + i / config.num_steps * (config.last_learning_rate - 1))
        root, m = np.sqrt(rate), config.momentum
        sharp = CURVE + one / sigma**2
        b = np.block([[one - rate * sharp, m * root * one], [-root * sharp, m * one]])
        noise = 2 * (1 - m) * np.block([[rate * one, root * one], [root * one, one]])
        both, spread = np.eye(4), np.diag([0.0, 0, 1, 1])
        for _ in range(config.num_inner_steps):
            both, spread = b @ both, b @ spread @ b.T + noise
        kept, rest = both[:2, :2], np.linalg.inv(sharp)
        gain = kept + (one - kept) @ rest / sigma**2
        mean = gain @ mean + (one - kept) @ rest @ PULL
        covariance = gain @ covariance @ gain.T + spread[:2, :2]
        found = mean, covariance
        after = edm_level(config.first_sigma, config.last_sigma, (i + 1) / config.num_steps)
        covariance = covariance + after**2 * one
    return found


#: Many levels, down to little noise, and Langevin steps that are short and many enough.
SLOW = DAPSConfig(
    num_steps=300, num_ode_steps=20, num_inner_steps=500, learning_rate=1e-4,
    last_learning_rate=1.0, first_sigma=3.0, last_sigma=0.02, ode_sigma=1e-4, sigma=SIGMA,
)  # fmt: skip


def test_the_limit_is_the_likelihood_times_the_root_of_the_prior():
    """With the flow as published; the denoiser's mean, one step to no noise, gives the posterior.

    Near no noise the flow moves by half of sigma^2 grad log p, the Langevin steps by sigma^2 times
    the gradient of the log-likelihood, and both noises together have the variance 2 sigma^2. That
    is a step of Langevin's dynamics for likelihood x prior^(1/2).
    """
    for num_ode_steps, power, other in ((20, 0.5, 1.0), (1, 1.0, 0.5)):
        found = law_of(dataclasses.replace(SLOW, num_ode_steps=num_ode_steps))
        near, far = (
            max(np.abs(one - two).max() for one, two in zip(found, power_posterior(p), strict=True))
            for p in (power, other)
        )
        assert near < 0.01 < 0.03 < far


def shrink(params, x, sigma):
    """The denoiser of the normal prior, its conditional mean, in the prior's own axes."""
    mean, variances, axes = params
    share = variances / (variances + sigma[:, None] ** 2)
    return (mean + (share * ((x.reshape(-1, 2) - mean) @ axes)) @ axes.T).reshape(x.shape)


def project(a, x):
    return jnp.sum(x * a, axis=(1, 2, 3), keepdims=True)


#: Images of latents z are z TURN, so that A TURN measures them as A does the latents.
TURN = np.array([[0.6, 0.8], [-0.8, 0.6]])


def turning_codec():
    return Codec(
        params=jnp.asarray(TURN, jnp.float32), quantizer=LFQ(1),
        decode=lambda turn, z: (z.reshape(-1, 2) @ turn).reshape(z.shape),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("num_ode_steps", "momentum"), [(1, 0.0), (4, 0.0), (2, 0.8)])
@pytest.mark.parametrize("is_latent", [False, True])
def test_samples_have_the_law(num_ode_steps, momentum, is_latent):
    """So what they are off the posterior by is the algorithm's own, and no mistake of this code.

    The latents of LatentDAPS, of a codec that turns them, have the law for what measures them.
    """
    count = 8000
    config = (LatentDAPSConfig if is_latent else DAPSConfig)(
        num_steps=40, num_ode_steps=num_ode_steps, num_inner_steps=30, learning_rate=5e-3,
        last_learning_rate=0.5, momentum=momentum, first_sigma=10.0, last_sigma=0.1,
        ode_sigma=0.01, sigma=SIGMA, image_shape=(1, 2), num_samples=count,
    )  # fmt: skip
    f32 = lambda values: jnp.asarray(values, jnp.float32)  # noqa: E731 - one conversion
    params = PixelParams(
        denoiser=Denoiser(
            params=tuple(map(f32, (MEAN, *np.linalg.eigh(PRIOR)))), apply=bind(shrink),
            num_channels=1, codec=turning_codec() if is_latent else None,
        ),
        operator=Operator(
            apply=bind(project), name="project", is_linear=True,
            params=f32(A @ TURN if is_latent else A).reshape(1, 1, 2, 1),
        ),
    )  # fmt: skip
    y = f32(Y).reshape(1, 1, 1, 1)
    # Pictures are clipped to [-1, 1], so the last state is looked at.
    target = samplers.target_of(params, y, config=config)
    keys = target.keys(jax.random.key(0))

    def run():
        start = config.init(target, keys)
        return jax.lax.scan(lambda s, _: config.step(target, s, keys), start, length=40)[0].x

    drawn = np.float64(jax.jit(run)()).reshape(count, 2)
    mean, covariance = law_of(config)
    spread = drawn - mean
    products = np.einsum("ni,nj->nij", spread, spread)
    for draws, law in ((drawn, mean), (products, covariance)):
        error = np.abs(draws.mean(axis=0) - law) / (draws.std(axis=0) / np.sqrt(count))
        assert np.all(error < 4)
    if momentum:
        return
    far = np.abs(drawn.mean(axis=0) - power_posterior(1.0)[0])
    assert np.max(far / np.sqrt(np.diag(covariance) / count)) > 8
