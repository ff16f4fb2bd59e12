"""The samplers on pixels: their published loops in float64 NumPy, and laws on a known mixture.

The image has two pixels, its prior is a mixture of normal laws, and the measurement is one number
a . x + noise, so that the denoiser, its derivative and the posterior can be written down.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import Denoiser, PixelParams, operators, samplers
from aps_jax.operators.svd import SVD
from aps_jax.samplers import DAPSConfig, DDRMConfig, DiffPIRConfig, DPSConfig
from aps_jax.samplers.diffpir import conjugate_gradients
from aps_jax.types import Operator, bind

SHAPE = (1, 2)
WEIGHTS, STDS = np.array([0.4, 0.6]), np.array([0.3, 0.2])
MEANS = np.array([[-0.5, -0.1], [0.4, 0.3]])
A, SIGMA = np.array([1.0, 0.5]), 0.3
Y = np.array([0.2, -0.6])  # Two measurements.
KEYS = jax.random.split(jax.random.key(5), 2)
#: alpha bar of all timesteps of DDPM.
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

sample = jax.jit(samplers.sample)


def mixture_mean(params, x, sigma):
    weights, means, stds = params
    flat = x.reshape(x.shape[0], 1, 2)
    noisy = (stds**2)[None] + sigma[:, None] ** 2
    square = jnp.sum((flat - means[None]) ** 2, axis=-1)
    share = jax.nn.softmax(jnp.log(weights)[None] - square / (2 * noisy) - jnp.log(noisy), axis=-1)
    inner = means[None] + ((stds**2)[None] / noisy)[..., None] * (flat - means[None])
    return jnp.sum(share[..., None] * inner, axis=1).reshape(x.shape)


def project(a, x):
    return jnp.sum(x * a, axis=(1, 2, 3), keepdims=True)


#: Orthonormal columns, the first along a; A has the singular values |a| and 0 for them.
BASIS = np.array([[1.0, -0.5], [0.5, 1.0]]) / np.hypot(1.0, 0.5)


def turned_svd(a, x_shape):
    basis, values = jnp.asarray(BASIS, jnp.float32), jnp.sqrt(jnp.sum(a**2)) * jnp.eye(2)[0]
    turn = lambda matrix: lambda x: (x.reshape(-1, 2) @ matrix).reshape(x.shape)  # noqa: E731
    return SVD(
        values=values.reshape(1, 1, 2, 1),
        forward=turn(basis),
        backward=turn(basis.T),
        measured=lambda y: y * jnp.eye(2)[0].reshape(1, 1, 2, 1),
    )


@functools.cache
def make_params():
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    denoiser = Denoiser(
        params=(f32(WEIGHTS), f32(MEANS), f32(STDS)), apply=bind(mixture_mean), num_channels=1
    )
    operator = Operator(
        apply=bind(project), name="project", params=f32(A).reshape(1, 1, 2, 1), is_linear=True,
        svd=bind(turned_svd),
    )  # fmt: skip
    return PixelParams(denoiser=denoiser, operator=operator)


def draw(config, key, y=Y):
    """Samples [S, B, 2]."""
    y = jnp.asarray(y, jnp.float32).reshape(-1, 1, 1, 1)
    result = sample(make_params(), y, key, config=config)
    return np.float64(np.moveaxis(result.samples, 1, 0)).reshape(-1, len(y), 2)


def conditional(x, sigma):
    """Mean [2] and covariance [2, 2] of the clean image given it with noise, in float64."""
    noisy = STDS**2 + sigma**2
    log = np.log(WEIGHTS) - np.sum((x - MEANS) ** 2, axis=1) / (2 * noisy) - np.log(noisy)
    share = np.exp(log - log.max())
    share /= share.sum()
    inner = MEANS + (STDS**2 / noisy)[:, None] * (x - MEANS)
    spread = inner - share @ inner
    variance = share @ (STDS**2 * sigma**2 / noisy)
    return share @ inner, (share * spread.T) @ spread + variance * np.eye(2)


def noise_of(key, *path):
    """The normal numbers [2] that a sampler draws at the end of a path of folds and splits."""
    for kind, value in path:
        key = jax.random.fold_in(key, value) if kind == "fold" else jax.random.split(key, 2)[value]
    return np.float64(jax.random.normal(key, (*SHAPE, 1), jnp.float32)).ravel()


def check_loop(config, loop):
    """Every sample is what the reference loop gives from the same noise."""
    found = draw(config, KEYS)
    # Sample s of measurement b has the key of b folded with s.
    expected = [[loop(jax.random.fold_in(KEYS[b], s), Y[b]) for b in range(2)] for s in range(2)]
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(found, np.clip(expected, -1, 1), atol=2e-3)


def test_dps_is_the_published_loop():
    config = DPSConfig(num_steps=12, num_samples=2, sigma=SIGMA, image_shape=SHAPE)
    times = [999, 908, 817, 727, 636, 545, 454, 363, 272, 182, 91, 0]

    def loop(key, y):
        x = noise_of(key, ("fold", 12))
        for i, t in enumerate(times):
            kept = KEPT[t]
            kept_next = KEPT[times[i + 1]] if i < 11 else 1.0
            sigma = np.sqrt((1 - kept) / kept)
            mean, covariance = conditional(x / np.sqrt(kept), sigma)
            # d mean / d x is the covariance over the noise's variance (Tweedie).
            jacobian = covariance / sigma**2 / np.sqrt(kept)
            clean, is_inside = np.clip(mean, -1, 1), np.abs(mean) < 1
            gradient = jacobian.T @ (is_inside * A * np.sign(A @ clean - y))
            beta = 1 - kept / kept_next
            x = (
                np.sqrt(kept_next) * beta / (1 - kept) * clean
                + np.sqrt(1 - beta) * (1 - kept_next) / (1 - kept) * x
                + np.sqrt(beta * (1 - kept_next) / (1 - kept)) * noise_of(key, ("fold", i))
                - 0.3 * gradient
            )
        return x

    check_loop(config, loop)


@pytest.mark.slow
def test_dps_without_measurement_draws_from_the_prior():
    config = DPSConfig(
        num_steps=250, step_size=0.0, clip_denoised=False, num_samples=1500, sigma=SIGMA,
        image_shape=SHAPE,
    )  # fmt: skip
    found = draw(config, jax.random.key(2))[:, 0]
    mean = WEIGHTS @ MEANS
    spread = MEANS - mean
    covariance = (WEIGHTS * spread.T) @ spread + WEIGHTS @ STDS**2 * np.eye(2)
    products = np.einsum("ni,nj->nij", found - mean, found - mean)
    for draws, exact in ((found, mean), (products, covariance)):
        error = np.abs(draws.mean(axis=0) - exact)
        assert np.all(error < 4 * draws.std(axis=0) / np.sqrt(len(draws)))


def test_daps_is_the_published_loop():
    config = DAPSConfig(
        num_steps=6, num_ode_steps=3, num_inner_steps=4, learning_rate=0.02, num_samples=2,
        sigma=SIGMA, image_shape=SHAPE, first_sigma=10.0,
    )  # fmt: skip

    def level(first, last, progress):
        return (first ** (1 / 7) + progress * (last ** (1 / 7) - first ** (1 / 7))) ** 7

    def loop(key, y):
        x = 10 * noise_of(key, ("fold", 6))
        for i in range(6):
            sigma = level(10, 0.1, i / 6)
            for j in range(3):
                now, after = level(sigma, 0.01, j / 3), level(sigma, 0.01, (j + 1) / 3)
                x = x + (after - now) * (x - conditional(x, now)[0]) / now
            mean, rate = x, 0.02 * (1 - 0.99 * i / 6)
            for j in range(4):
                noise = noise_of(key, ("fold", i), ("split", 0), ("fold", j))
                drift = A * (A @ x - y) / SIGMA**2 + (x - mean) / sigma**2
                x = x - rate * drift + np.sqrt(2 * rate) * noise
            if i < 5:
                noise = noise_of(key, ("fold", i), ("split", 1))
                x = x + level(10, 0.1, (i + 1) / 6) * noise
        return x

    check_loop(config, loop)


def test_ddrm_is_the_published_loop():
    """With levels that are above and below what the measurement is worth, 0.3 / |a|."""
    config = DDRMConfig(
        num_steps=9, num_samples=2, sigma=SIGMA, image_shape=SHAPE, eta=0.7, eta_b=0.9
    )
    times = [round(999 * (1 - k / 8)) for k in range(9)]
    levels = [*(np.sqrt((1 - KEPT[t]) / KEPT[t]) for t in times), 0.0]
    size = np.sqrt(A @ A)
    assert levels[6] > SIGMA / size > levels[8]

    def loop(key, y):
        noise = BASIS.T @ noise_of(key, ("fold", 9))
        x = levels[0] * noise
        x[0] = y / size + np.sqrt(levels[0] ** 2 - (0.9 * SIGMA / size) ** 2) * noise[0]
        for i in range(9):
            mean = BASIS.T @ conditional(BASIS @ x, levels[i])[0]
            after, noise = levels[i + 1], BASIS.T @ noise_of(key, ("fold", i))
            kept = np.sqrt(1 - 0.7**2) * after
            unseen = mean[1] + kept * (x[1] - mean[1]) / levels[i] + 0.7 * after * noise[1]
            if after < SIGMA / size:
                seen = mean[0] + kept * (y - size * mean[0]) / SIGMA + 0.7 * after * noise[0]
            else:
                left = np.sqrt(after**2 - (0.9 * SIGMA / size) ** 2)
                seen = 0.1 * mean[0] + 0.9 * y / size + left * noise[0]
            x = np.array([seen, unseen])
        return BASIS @ x

    check_loop(config, loop)


def test_diffpir_is_the_published_loop():
    config = DiffPIRConfig(
        num_steps=8, num_inner_steps=3, num_samples=2, sigma=SIGMA, image_shape=SHAPE,
        regularization=2.0, zeta=0.3,
    )  # fmt: skip
    times = [round(999 * (1 - np.sqrt(k / 7))) for k in range(8)]

    def loop(key, y):
        x = noise_of(key, ("fold", 8))
        for i, t in enumerate(times):
            kept = KEPT[t]
            kept_next = KEPT[times[i + 1]] if i < 7 else 1.0
            sigma = np.sqrt((1 - kept) / kept)
            clean = np.clip(conditional(x / np.sqrt(kept), sigma)[0], -1, 1)
            # min ||y - A x||^2 + rho ||x - clean||^2 with rho = lambda sigma_n^2 / sigma_t^2
            rho = 2.0 * SIGMA**2 / sigma**2
            clean = np.linalg.solve(np.outer(A, A) + rho * np.eye(2), A * y + rho * clean)
            left = (x - np.sqrt(kept) * clean) / np.sqrt(1 - kept)
            noise = np.sqrt(0.7) * left + np.sqrt(0.3) * noise_of(key, ("fold", i))
            x = np.sqrt(kept_next) * clean + np.sqrt(1 - kept_next) * noise
        return x

    check_loop(config, loop)


def test_diffpir_without_regularization_fits_the_measurement():
    """And with nothing but it, the measurement is of no account."""
    options = {"num_steps": 5, "num_samples": 2, "sigma": SIGMA, "image_shape": SHAPE}
    found = draw(DiffPIRConfig(regularization=1e-5, **options), KEYS)
    np.testing.assert_allclose(found @ A, np.broadcast_to(Y, (2, 2)), atol=1e-3)
    config = DiffPIRConfig(regularization=1e12, **options)
    np.testing.assert_allclose(draw(config, KEYS), draw(config, KEYS, [9, -9]), atol=1e-4)


def test_conjugate_gradients_solve_every_row_by_itself():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 6, 6))
    matrices = np.einsum("rij,rkj->rik", half, half) + np.eye(6)
    b = rng.normal(size=(3, 6))
    b[2] = 0  # Solved before the first step.

    def curve(x):
        return jnp.einsum("rij,rj->ri", matrices, x.reshape(3, 6)).reshape(x.shape)

    found = conjugate_gradients(curve, jnp.asarray(b, jnp.float32).reshape(3, 1, 2, 3), 12)
    expected = np.linalg.solve(matrices, b[..., None])[..., 0]
    np.testing.assert_allclose(np.asarray(found).reshape(3, 6), expected, atol=1e-3)


def test_conjugate_gradients_leave_what_is_not_measured():
    """Rounding errors of 1e-6 over a weight of 1e-6 would be as large as the image."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)

    def curve(x):
        return 100 * jnp.sum(x * a, axis=-1, keepdims=True) * a + 1e-6 * x

    found = conjugate_gradients(curve, 37.3 * a.reshape(1, 1, 1, 6), 20)
    np.testing.assert_allclose(found[0, 0, 0], 0.373 * a / jnp.sum(a**2), atol=1e-4)


def test_pictures_of_other_than_three_channels():
    """Built-in operators give as many channels as they get."""
    params = make_params().replace(operator=operators.denoising())
    y = jnp.full((1, *SHAPE, 1), 0.5)
    config = DPSConfig(num_steps=2, image_shape=SHAPE)
    found = samplers.sample(params, y, jax.random.key(0), config=config)
    assert found.images.shape == y.shape
    with pytest.raises(ValueError, match=r"gives \(1, 1, 2, 1\) for images"):
        samplers.sample(params, jnp.tile(y, 3), jax.random.key(0), config=config)


def test_refusals():
    params, y, key = make_params(), jnp.zeros((1, 1, 1, 1)), jax.random.key(0)
    options = {"image_shape": SHAPE}
    with pytest.raises(ValueError, match="'maskgit' needs.* prior over tokens.*choose one of dps"):
        samplers.sample(params, y, key, config=samplers.MaskGITConfig(**options))
    with pytest.raises(
        ValueError, match="known_tokens are of priors over tokens; 'dps' takes none"
    ):
        samplers.sample(params, y, key, config=DPSConfig(**options), known_tokens=y)
    curved = params.replace(operator=params.operator.replace(is_linear=False))
    with pytest.raises(ValueError, match="linear operator, and project is none; 'dps' and 'daps'"):
        samplers.sample(curved, y, key, config=DiffPIRConfig(**options))
    unknown = params.replace(operator=params.operator.replace(svd=None))
    with pytest.raises(ValueError, match="values are known.*and project has none; 'diffpir' takes"):
        samplers.sample(unknown, y, key, config=DDRMConfig(**options))
    with pytest.raises(ValueError, match="sampler 'dps' needs a model with a denoiser of pixels"):
        samplers.check_model(DPSConfig(), has="prior")
