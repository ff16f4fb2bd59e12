"""Energies against float64 NumPy, and samplers on an energy of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_CODES, channel_matrix, mixing_prior, patch_codec
from linear import f32

from aps_jax import APSConfig, energies, operators
from aps_jax.samplers import sampler_of
from aps_jax.samplers.maskgit import MaskGITConfig
from aps_jax.samplers.smc import SMCConfig
from aps_jax.sampling.run import run
from aps_jax.sampling.target import make_target
from aps_jax.types import Energy, Perceptual

BATCH, SHAPE = 2, (2, 6, 4, 3)


@pytest.fixture
def x(rng):
    return rng.normal(size=SHAPE)


@pytest.fixture
def y(rng):
    return rng.normal(size=SHAPE)


@pytest.fixture
def mask(rng):
    return (rng.uniform(size=(6, 4)) > 0.4).astype(float)


def sums(values):
    return np.sum(values, axis=(1, 2, 3))


def gradient_of(energy, x):
    return jax.grad(lambda x: jnp.sum(energy(x)))(f32(x))


# Of a measurement.


def test_gaussian(x, y):
    energy = energies.gaussian(operators.denoising(), f32(y), 0.3)
    np.testing.assert_allclose(energy(f32(x)), sums((x - y) ** 2) / (2 * 0.3**2), rtol=1e-5)
    np.testing.assert_allclose(gradient_of(energy, x), (x - y) / 0.3**2, rtol=1e-4, atol=1e-4)


def test_gaussian_of_a_linear_operator(rng):
    operator = operators.super_resolution(scale=2)
    matrix = channel_matrix(operator, 8)
    x, y = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(2, 4, 4, 3))
    residual = matrix @ x.reshape(2, 64, 3) - y.reshape(2, 16, 3)
    energy = energies.gaussian(operator, f32(y), 0.3)
    np.testing.assert_allclose(energy(f32(x)), np.sum(residual**2, axis=(1, 2)) / 0.18, rtol=1e-5)
    slope = (matrix.T @ residual / 0.09).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(gradient_of(energy, x), slope, rtol=1e-4, atol=1e-4)


def test_norm_and_its_gradient_even_where_the_fit_is_perfect(x, y):
    energy = energies.norm(operators.denoising(), f32(y))
    norm = np.sqrt(sums((x - y) ** 2))
    np.testing.assert_allclose(energy(f32(x)), norm, rtol=1e-5)
    expected = (x - y) / norm[:, None, None, None]
    np.testing.assert_allclose(gradient_of(energy, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(energy(f32(y)), 0, atol=1e-6)
    np.testing.assert_array_equal(gradient_of(energy, y), 0)


@pytest.mark.parametrize("name", ["gaussian", "norm", "l1"])
def test_missing_pixels_do_not_count(name, x, y, mask):
    operator, seen = operators.inpainting_mask(mask), mask[..., None]
    make, expected = {
        "gaussian": (
            lambda y: energies.gaussian(operator, y, 0.5),
            sums(((x - y) * seen) ** 2) / (2 * 0.5**2),
        ),
        "norm": (lambda y: energies.norm(operator, y), np.sqrt(sums(((x - y) * seen) ** 2))),
        "l1": (
            lambda y: energies.l1_lpips(operator, y),
            sums(np.abs(x - y) * seen) / (3 * seen.sum()),
        ),
    }[name]
    for stands_there in (0, 9):
        found = make(f32(y * seen + stands_there * (1 - seen)))(f32(x))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_stacked_measurements_add_up(x, y, mask):
    operator = operators.stack([operators.denoising(), operators.inpainting_mask(mask)])
    stacked, seen = (f32(y), f32(y * mask[..., None])), mask[..., None]
    error, square = np.abs(x - y), (x - y) ** 2
    means = sums(error) / 72 + sums(error * seen) / (3 * mask.sum())
    np.testing.assert_allclose(energies.l1_lpips(operator, stacked)(f32(x)), means, rtol=1e-5)
    both = (sums(square) + sums(square * seen)) / (2 * 0.3**2)
    np.testing.assert_allclose(energies.gaussian(operator, stacked, 0.3)(f32(x)), both, rtol=1e-5)


# LPIPS.


def mean_square(params, a, b):
    return params * jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def test_perceptual_term(x, y):
    perceptual = Perceptual(params=f32(3.0), apply=mean_square)
    energy = energies.l1_lpips(operators.denoising(), f32(y), perceptual, 0.5)
    expected = np.mean(np.abs(x - y) + 1.5 * (x - y) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(energy(f32(x)), expected, rtol=1e-5)


def test_perceptual_features_of_y_are_computed_once(x, y):
    """A distance in two halves gives the same energy, and its half of y is made with the energy."""
    seen = []

    def describe(params, b):
        seen.append("y")
        return 2 * b

    def compare(params, a, features):
        seen.append("x")
        return mean_square(params, 2 * a, features)

    def whole(params, a, b):
        return mean_square(params, 2 * a, 2 * b)

    identity = operators.denoising()
    plain = Perceptual(params=f32(1.0), apply=whole)
    halves = plain.replace(describe=describe, compare=compare)
    energy = energies.l1_lpips(identity, f32(y), halves, 0.5)
    assert seen == ["y"]
    expected = energies.l1_lpips(identity, f32(y), plain, 0.5)(f32(x))
    np.testing.assert_allclose(energy(f32(x)), expected, rtol=1e-6)
    assert seen == ["y", "x"]


def test_perceptual_term_is_for_images_only(x, y):
    perceptual = Perceptual(params=f32(1.0), apply=mean_square)
    grey = operators.colorization()
    y = y[..., :1]
    predicted = np.float64(grey(f32(x)))
    plain = energies.l1_lpips(grey, f32(y))(f32(x))
    np.testing.assert_allclose(plain, np.abs(predicted - y).mean(axis=(1, 2, 3)), rtol=1e-5)
    energy = energies.l1_lpips(grey, f32(y), perceptual, 0.5)
    expected = 0.5 * ((predicted - y) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(energy(f32(x)) - plain, expected, rtol=1e-4)
    blind = energies.l1_lpips(grey.replace(is_image=False), f32(y), perceptual, 0.5)
    np.testing.assert_array_equal(blind(f32(x)), plain)


# Of others, and of one's own.


def distance(params, data, x):
    """A user's energy: squared distance to colours [B, 1, 1, 3], weighed."""
    return params * jnp.sum((x - data) ** 2, axis=(1, 2, 3))


def colours_of(count):
    return np.random.default_rng(4).uniform(-1, 1, size=(count, 1, 1, 3))


def colour_energy(count=BATCH, weight=50.0):
    return Energy(apply=distance, params=f32(weight), data=f32(colours_of(count)), name="colour")


def test_sums_and_weights(x, y):
    gaussian = energies.gaussian(operators.denoising(), f32(y), 0.3)
    expected = [sums((x - y) ** 2) / 0.18, 50 * sums((x - colours_of(BATCH)) ** 2)]
    both = energies.total(gaussian, energies.scaled(colour_energy(), 0.25))
    np.testing.assert_allclose(both(f32(x)), expected[0] + 0.25 * expected[1], rtol=1e-5)
    assert both.name == "gaussian + colour"
    slope = (x - y) / 0.09 + 25 * (x - colours_of(BATCH))
    np.testing.assert_allclose(gradient_of(both, x), slope, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(energies.total(gaussian)(f32(x)), expected[0], rtol=1e-5)


def test_of_a_region(x, y):
    inner = energies.gaussian(operators.denoising(), f32(y[:, 1:4, 2:]), 0.3)
    energy = energies.on_region(inner, rows=(1, 4), columns=(2, 4))
    difference = (x - y)[:, 1:4, 2:]
    np.testing.assert_allclose(energy(f32(x)), sums(difference**2) / 0.18, rtol=1e-5)
    slope = np.zeros(SHAPE)
    slope[:, 1:4, 2:] = difference / 0.09
    np.testing.assert_allclose(gradient_of(energy, x), slope, rtol=1e-4, atol=1e-4)


def test_other_numbers_need_no_other_compilation(x, y):
    energy_of = jax.jit(lambda energy, x: energy(x))

    def build(weight, sigma, shift):
        part = energies.on_region(colour_energy(weight=weight), rows=(0, 3), columns=(1, 4))
        gaussian = energies.gaussian(operators.denoising(), f32(y + shift), sigma)
        return energies.total(energies.scaled(part, weight), gaussian)

    values = [energy_of(build(*numbers), f32(x)) for numbers in [(1, 0.3, 0), (2, 0.5, 1)]]
    assert energy_of._cache_size() == 1
    expected = 4 * sums((x - colours_of(BATCH))[:, :3, 1:] ** 2) + sums((x - y - 1) ** 2) / 0.5
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)


def reward_target(num_samples=1):
    """Images of 16 x 16 pixels near wanted ones of the codec, weighed by nothing else."""
    codec = patch_codec()
    tokens = np.random.default_rng(2).integers(0, NUM_CODES, size=(BATCH, 4, 4))
    wanted = codec.decode(codec.params, codec.quantizer.lookup(jnp.asarray(tokens)))
    target = make_target(
        mixing_prior(window=4), codec, Energy(apply=distance, params=f32(5.0), data=wanted),
        grid=(4, 4), batch=BATCH, num_samples=num_samples, image_shape=(16, 16),
    )  # fmt: skip
    return target, np.float64(wanted)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (
            APSConfig(
                num_steps=4, num_inner_steps=30, warm_start=True, draw="categorical", num_samples=2
            ),
            0.6,
        ),
        (SMCConfig(num_steps=4, num_particles=64, num_samples=2), 0.92),
    ],
    ids=["aps", "smc"],
)
def test_a_reward_in_place_of_a_measurement(config, share):
    """Samples are nearer to what is wanted than those of the prior; 64 particles get less far."""
    target, wanted = reward_target(num_samples=2)

    def errors(config):
        result = jax.jit(lambda key: run(sampler_of(config), target, key))(jax.random.key(0))
        assert result.samples.shape == (BATCH, 2, 16, 16, 3)
        assert np.all(result.info.is_finite) and np.all(result.info.num_masked[-1] == 0)
        assert np.all(result.tokens < NUM_CODES)
        return np.sum((np.float64(result.samples) - wanted[:, None]) ** 2, axis=(2, 3, 4))

    plain = errors(MaskGITConfig(num_steps=4, reveal="random", num_samples=2))
    found = errors(config)
    assert found.mean() < share * plain.mean()
    # Every sample follows the reward of its own measurement.
    assert np.all(found.mean(axis=1) < plain.mean(axis=1))


def test_energies_of_tokens_and_codes_are_those_of_their_pictures(rng):
    """Sample-major rows meet the data of their own; candidates are weighed by the energy alone."""
    target, wanted = reward_target(num_samples=2)
    target = target.replace(objective=energies.scaled(target.energy, 3.0))
    tokens = jnp.asarray(rng.integers(0, NUM_CODES, size=(2 * BATCH, 16)), jnp.int32)
    codes = target.codec.codebook[tokens]
    pictures = target.codec.decode(target.codec.params, codes.reshape(-1, 4, 4, codes.shape[-1]))
    expected = 5 * sums((np.float64(pictures) - np.tile(wanted, (2, 1, 1, 1))) ** 2)
    np.testing.assert_allclose(target.energy_of(tokens), expected, rtol=1e-5)
    np.testing.assert_allclose(target.objective_of(codes), 3 * expected, rtol=1e-5)
