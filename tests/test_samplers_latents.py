"""The samplers on latents: those on pixels where the codec is the identity, and laws of their own.

The toy is that of `test_samplers_pixels`: two numbers with a mixture of normal laws as their prior,
and one measurement a . x + noise. The codec is the identity or turns the two numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers_pixels import (
    BASIS,
    KEPT,
    KEYS,
    SHAPE,
    SIGMA,
    A,
    Y,
    conditional,
    make_params,
    noise_of,
    sample,
)

from aps_jax import operators, samplers
from aps_jax.codec import latents
from aps_jax.codec.lfq import LFQ
from aps_jax.samplers import DAPSConfig, DPSConfig, LatentDAPSConfig, PSLDConfig, ReSampleConfig
from aps_jax.samplers.psld import towards
from aps_jax.samplers.resample import descend_and_rest
from aps_jax.sampling.pixels import make_pixel_target
from aps_jax.types import Codec, Energy, Operator

OPTIONS = {"num_samples": 2, "sigma": SIGMA, "image_shape": SHAPE}


def turn(matrix, x):
    """Two numbers [R, 1, 2, 1] times a matrix [2, 2]."""
    return (x.reshape(-1, 2) @ matrix).reshape(x.shape)


def turn_back(matrix, x):
    return turn(matrix.T, x)


def with_codec(matrix=None, *, encode=turn_back):
    """The toy as a prior of latents, whose images are the latents times a matrix."""
    params = make_params()
    matrix = jnp.asarray(np.eye(2) if matrix is None else matrix, jnp.float32)
    codec = Codec(params=matrix, quantizer=LFQ(1), decode=turn, encode=encode, stride=1)
    return params.replace(denoiser=params.denoiser.replace(codec=codec))


def draw(params, config, y=Y):
    """Samples [B, S, 2]."""
    y = jnp.asarray(y, jnp.float32).reshape(-1, 1, 1, 1)
    found = sample(params, y, KEYS, config=config).samples
    return np.float64(found).reshape(len(y), -1, 2)


def test_with_the_identity_psld_without_gluing_is_dps():
    dps = DPSConfig(num_steps=10, step_size=0.2, clip_denoised=False, **OPTIONS)
    psld = PSLDConfig(gluing=0.0, **dataclasses.asdict(dps))
    np.testing.assert_array_equal(draw(with_codec(), psld), draw(make_params(), dps))


@pytest.mark.slow
def test_with_the_identity_latent_daps_is_daps():
    daps = DAPSConfig(
        num_steps=5, num_ode_steps=2, num_inner_steps=4, learning_rate=0.02, momentum=0.5,
        first_sigma=10.0, **OPTIONS,
    )  # fmt: skip
    latent = LatentDAPSConfig(**dataclasses.asdict(daps))
    np.testing.assert_array_equal(draw(with_codec(), latent), draw(make_params(), daps))


@pytest.mark.slow
def test_a_turning_codec_turns_the_measurement():
    """Latents z of images z Q are measured by Q a: the images are those of that toy, turned."""
    config = PSLDConfig(num_steps=10, **OPTIONS)
    params, turned = with_codec(), with_codec(BASIS)
    there = jnp.asarray(BASIS @ A, jnp.float32).reshape(1, 1, 2, 1)
    moved = params.replace(operator=params.operator.replace(params=there))
    np.testing.assert_allclose(draw(turned, config), draw(moved, config) @ BASIS, atol=1e-5)


@pytest.mark.slow
def test_gluing_of_an_orthogonal_codec_is_a_longer_step():
    """||encode(x + A^T (y - A x) / |a|^2) - z|| is then ||y - A x|| / |a|."""
    params = with_codec(BASIS)
    glued = draw(params, PSLDConfig(num_steps=10, step_size=0.1, gluing=0.15, **OPTIONS))
    step = 0.1 + 0.15 / np.sqrt(A @ A)
    longer = draw(params, PSLDConfig(num_steps=10, step_size=step, gluing=0.0, **OPTIONS))
    assert np.ptp(glued) > 0.2
    np.testing.assert_allclose(glued, longer, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator",
    [operators.super_resolution(scale=4), operators.gaussian_blur(kernel_size=5, std=1.0)],
)
def test_towards_is_the_best_step_along_the_transpose(operator):
    """In float64, by the operator's matrix; rows whose measurement fits stay as they are."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    x, y = images[:2], operator(images[1:]).at[1].set(operator(images[1:2])[0])
    found = np.float64(towards(operator, y, x))
    np.testing.assert_allclose(found[1], x[1], atol=1e-6)
    basis = jnp.eye(192, dtype=jnp.float32).reshape(192, 8, 8, 3)
    matrix = np.float64(operator(basis)).reshape(192, -1).T
    left = np.float64(y[0]).ravel() - matrix @ np.float64(x[0]).ravel()
    way = matrix.T @ left
    length = (left @ matrix @ way) / np.sum((matrix @ way) ** 2)
    wanted = np.float64(x[0]).ravel() + length * way
    np.testing.assert_allclose(found[0].ravel(), wanted, atol=1e-5)


@jax.custom_vjp
def thrice(x):
    """A network with a rule of its own for the way back, and none for the way forward."""
    return 3 * x


thrice.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


def test_towards_needs_no_derivative_forward():
    operator = Operator(apply=lambda params, x: {"y": thrice(x)}, name="thrice", params=None)
    x, y = jnp.ones((2, 4, 4, 3)), {"y": 0.3 * jnp.ones((2, 4, 4, 3))}
    found = jax.jit(lambda x: towards(operator, y, x))(x)
    np.testing.assert_allclose(found, 0.1, atol=1e-6)


def adam(gradient, x, rate, num_steps):
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, num_steps + 1):
        g = gradient(x)
        if g is None:
            break
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        root = np.sqrt(second / (1 - 0.999**step))
        x = x - rate * first / (1 - 0.9**step) / (root + 1e-8)
    return x


def test_resample_is_the_published_loop():
    """With latents z and images z Q; a row rests at a residual of half the noise."""
    config = ReSampleConfig(
        num_steps=9, num_inner_steps=5, learning_rate=0.03, num_pixel_steps=4, interval=2,
        pixel_learning_rate=0.05, tolerance=0.5, **OPTIONS,
    )  # fmt: skip
    times = [round(999 * (1 - k / 8)) for k in range(9)]
    seen = BASIS @ A  # What measures latents.

    def solve(x, a, y, rate, num_steps):
        def gradient(x):
            left = a @ x - y
            return None if abs(left) <= 0.5 * SIGMA else left * a

        return adam(gradient, x, rate, num_steps)

    def loop(key, y):
        z = noise_of(key, ("fold", 9))
        for i in range(9):
            kept, kept_next = KEPT[times[i]], KEPT[times[i + 1]] if i < 8 else 1.0
            sigma = np.sqrt((1 - kept) / kept)
            clean, covariance = conditional(z / np.sqrt(kept), sigma)
            gradient = covariance.T / sigma**2 / np.sqrt(kept) @ (np.sign(seen @ clean - y) * seen)
            noise = (z - np.sqrt(kept) * clean) / np.sqrt(1 - kept)
            z = np.sqrt(kept_next) * clean + np.sqrt(1 - kept_next) * noise
            z = z - 0.5 * kept * gradient
            left = 8 - i
            if left % 2 or left > 6:
                continue
            if left >= 3:
                found = np.clip(BASIS @ solve(clean @ BASIS, A, y, 0.05, 4), -1, 1)
            else:
                found = solve(clean, seen, y, 0.03, 5)
            if i == 8:
                z = found
                continue
            variance = 40 * (1 - kept_next) / (1 - kept) * (1 - kept / kept_next)
            sharp = 1 / variance + 1 / (1 - kept_next)
            mean = (z / variance + np.sqrt(kept_next) * found / (1 - kept_next)) / sharp
            z = mean + noise_of(key, ("fold", i)) / np.sqrt(sharp)
        return z @ BASIS

    expected = [[loop(jax.random.fold_in(KEYS[b], s), Y[b]) for s in range(2)] for b in range(2)]
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(draw(with_codec(BASIS), config), np.clip(expected, -1, 1), atol=2e-3)


def test_descent_solves_the_least_squares_and_rests():
    rng = np.random.default_rng(0)
    matrix, y = np.eye(5, 3) + rng.normal(size=(5, 3)) / 4, rng.normal(size=(2, 5))
    f32 = lambda values: jnp.asarray(values, jnp.float32)  # noqa: E731 - one conversion

    def energy(x):
        return jnp.sum((x @ f32(matrix).T - f32(y)) ** 2, axis=1)

    found = descend_and_rest(energy, jnp.zeros((2, 3)), 0.02, 600, jnp.zeros(2))
    np.testing.assert_allclose(found, np.linalg.lstsq(matrix, y.T)[0].T, atol=1e-3)
    least = energy(found)
    some = descend_and_rest(
        energy, jnp.zeros((2, 3)), 0.02, 600, f32([float(least[0]) + 0.1, np.inf])
    )
    assert least[0] + 0.05 < energy(some)[0] <= least[0] + 0.1
    np.testing.assert_array_equal(some[1], 0)


def test_latents_are_clipped_features_of_any_size():
    codec = Codec(
        params=None, quantizer=LFQ(3), stride=2,
        encode=lambda _, x: 9 * x[:, ::2, ::2], decode=lambda _, z: z.repeat(2, 1).repeat(2, 2),
    )  # fmt: skip
    x = jnp.linspace(-0.2, 0.2, 45).reshape(1, 5, 3, 3)
    found = latents.encode(codec, x)
    np.testing.assert_allclose(found, np.clip(9 * x[:, ::2, ::2], -1, 1), atol=1e-6)
    assert latents.decode(codec, found, (5, 3)).shape == x.shape


def test_refusals():
    y, key = jnp.zeros((1, 1, 1, 1)), KEYS[:1]
    params = with_codec()
    with pytest.raises(
        ValueError, match="'psld' needs.*latents; this one has a denoiser of pixels"
    ):
        samplers.sample(make_params(), y, key, config=PSLDConfig(**OPTIONS))
    with pytest.raises(ValueError, match="'dps' needs.*pixels; .* latents: choose one of psld"):
        samplers.sample(params, y, key, config=DPSConfig(**OPTIONS))
    wide = params.replace(denoiser=params.denoiser.replace(num_channels=2))
    with pytest.raises(ValueError, match="latents of 2 numbers, and those of its codec have 1"):
        samplers.sample(wide, y, key, config=PSLDConfig(**OPTIONS))
    decoder = with_codec(encode=None)
    for config in (PSLDConfig(**OPTIONS), ReSampleConfig(**OPTIONS)):
        with pytest.raises(ValueError, match="needs a codec with an encoder"):
            samplers.sample(decoder, y, key, config=config)


@pytest.mark.slow
def test_rewards_have_nothing_to_glue_to_and_no_rest():
    params, key = with_codec(), KEYS[:1]
    energy = Energy(apply=lambda params, data, x: jnp.sum(x, (1, 2, 3)))
    target = make_pixel_target(params.denoiser, energy, image_shape=SHAPE)
    with pytest.raises(ValueError, match="needs a measurement for its gluing; set gluing to 0"):
        samplers.sample_target(target, key, config=PSLDConfig(**OPTIONS))
    few = {"num_steps": 3, "interval": 1, "num_inner_steps": 2, "num_pixel_steps": 2}
    result = samplers.sample_target(target, key, config=ReSampleConfig(**few))
    assert np.all(np.isfinite(result.images))
