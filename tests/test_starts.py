"""The smooth estimate against the solution of its normal equations; its codes and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_CODES, channel_matrix, mixing_prior, patch_codec

from aps_jax import APSConfig, Params, operators
from aps_jax.codec.expectation import spread
from aps_jax.codec.fsq import FSQ
from aps_jax.codec.lfq import LFQ, codebook
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.codec.residual import Residual
from aps_jax.codec.vq import VQ
from aps_jax.samplers import sampler_of
from aps_jax.sampling.smooth import SMOOTHNESS, smooth_estimate
from aps_jax.sampling.starts import (
    encoder_logits,
    encoder_tokens,
    smooth_tokens,
    token_sensitivity,
)
from aps_jax.sampling.target import make_target, measurement_target
from aps_jax.types import Energy

SIDE, SIGMA = 16, 0.05


def images(batch=2):
    """Waves, smooth and within 0.8."""
    rows, columns = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE), indexing="ij")
    waves = [np.sin(3 * rows + i) * np.cos(4 * columns - i) for i in range(3 * batch)]
    x = 0.8 * np.stack(waves, -1).reshape(SIDE, SIDE, batch, 3)
    return jnp.asarray(np.moveaxis(x, 2, 0), jnp.float32)


def differences():
    """All differences of neighbours as a float64 matrix."""
    step = np.eye(SIDE, k=1)[:-1] - np.eye(SIDE)[:-1]
    return np.concatenate([np.kron(step, np.eye(SIDE)), np.kron(np.eye(SIDE), step)])


def random_mask():
    return np.random.default_rng(0).uniform(size=(SIDE, SIDE)) < 0.4


def columns(x):
    """Images or measurements [B, h, w, 3] as float64 columns, one per channel of an image."""
    return np.asarray(x, np.float64).transpose(0, 3, 1, 2).reshape(3 * len(x), -1).T


for_linear_operators = pytest.mark.parametrize(
    "operator",
    [
        operators.super_resolution(scale=4),
        operators.inpainting_mask(random_mask()),
        operators.gaussian_blur(kernel_size=7, std=1.5),
    ],
    ids=lambda operator: operator.name,
)


@for_linear_operators
def test_it_nearly_minimises_its_energy(operator):
    x = images()
    y = operator(x) + SIGMA * jax.random.normal(jax.random.key(0), operator(x).shape)
    estimate = smooth_estimate(operator, y, image_shape=(SIDE, SIDE), sigma=SIGMA)
    a, d = channel_matrix(operator, SIDE), differences()
    target = columns(y)
    best = np.linalg.solve(a.T @ a / SIGMA**2 + d.T @ d / SMOOTHNESS**2, a.T @ target / SIGMA**2)

    def energy(v):
        misfit = np.sum((a @ v - target) ** 2, axis=0) / (2 * SIGMA**2)
        return misfit + np.sum((d @ v) ** 2, axis=0) / (2 * SMOOTHNESS**2)

    found = columns(estimate)
    assert np.all(energy(found) < 1.1 * energy(np.clip(best, -1, 1)))
    error = np.sqrt(np.mean((found - np.clip(best, -1, 1)) ** 2))
    assert error < 0.05
    truth = columns(x)
    assert error < 0.7 * np.sqrt(np.mean((best - truth) ** 2))


def test_it_fills_what_is_missing_and_stays_in_range():
    mask = np.ones((SIDE, SIDE))
    mask[4:9, 5:10] = 0
    operator = operators.inpainting_mask(mask)
    x = images() * 1.25
    estimate = smooth_estimate(operator, operator(x), image_shape=(SIDE, SIDE), sigma=0.01)
    assert np.abs(estimate).max() <= 1
    missing = mask == 0
    assert np.sqrt(np.mean((estimate - x)[:, missing] ** 2)) < 0.15
    assert np.sqrt(np.mean((estimate - x)[:, ~missing] ** 2)) < 0.02


@pytest.mark.parametrize(
    "operator",
    [
        operators.phase_retrieval(),
        operators.stack([operators.hdr(), operators.super_resolution(scale=2)]),
    ],
    ids=["phase_retrieval", "stack"],
)
def test_any_differentiable_operator_gives_a_finite_estimate_that_fits_better_than_grey(operator):
    x = images()
    y = operator(x)
    estimate = smooth_estimate(operator, y, image_shape=(SIDE, SIDE), sigma=SIGMA)

    def misfit(x):
        pairs = zip(jax.tree.leaves(operator(x)), jax.tree.leaves(y), strict=True)
        return float(sum(jnp.sum((a - b) ** 2) for a, b in pairs))

    assert np.all(np.isfinite(estimate))
    assert misfit(estimate) < 0.5 * misfit(jnp.zeros_like(x))


def test_images_do_not_influence_each_other():
    operator = operators.super_resolution(scale=4)
    y = operator(images(3))
    together = smooth_estimate(operator, y, image_shape=(SIDE, SIDE), sigma=SIGMA)
    alone = smooth_estimate(operator, y[1:2], image_shape=(SIDE, SIDE), sigma=SIGMA)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_tokens_are_those_of_the_encoder_and_cover_the_field():
    codec = patch_codec()
    x = images()
    tokens = encoder_tokens(codec, x, grid=(4, 4), decode_scale=1)
    np.testing.assert_array_equal(tokens, encode_tokens(codec, x).reshape(2, -1))
    # A field that reaches past the image continues its last rows and columns.
    field = encoder_tokens(codec, x[:, :14, :13], grid=(4, 5), decode_scale=1)
    padded = np.pad(x[:, :14, :13], ((0, 0), (0, 2), (0, 7), (0, 0)), mode="edge")
    np.testing.assert_array_equal(field, encode_tokens(codec, padded).reshape(2, -1))
    double = encoder_tokens(codec, x, grid=(8, 8), decode_scale=2)
    larger = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(double, encode_tokens(codec, larger).reshape(2, -1))


def test_logits_are_squared_distances_of_codes():
    tokens = jnp.arange(NUM_CODES)[None]

    def logits_of(codec):
        target = make_target(mixing_prior(), codec, Energy(apply=no_energy), grid=(4, 4))
        return encoder_logits(target, tokens, 0.7)[0]

    differing = np.bitwise_count(np.arange(NUM_CODES)[:, None] ^ np.arange(NUM_CODES))
    np.testing.assert_allclose(logits_of(patch_codec()), -2 * 0.7 * differing, atol=1e-5)
    # Any codebook, not that of LFQ alone.
    book = np.random.default_rng(0).normal(size=(NUM_CODES, 4))
    other = patch_codec().replace(quantizer=VQ(jnp.asarray(book, jnp.float32)))
    distance = np.sum((book[:, None] - book[None]) ** 2, axis=-1)
    unit = np.var(book, axis=0).sum() / np.log2(NUM_CODES)
    np.testing.assert_allclose(logits_of(other), -0.35 * distance / unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_logits_do_not_depend_on_the_scale_of_a_codebook(scale):
    """The signs themselves, as a table, in two groups or as levels: a differing bit is a bit."""
    table = VQ(scale * codebook(4))
    ones = LFQ(4), Residual(jnp.stack([codebook(2)] * 2)), FSQ((2, 2, 2, 2))
    for quantizer, expected in ((table, scale**2), *((one, 1) for one in ones)):
        found = spread(patch_codec().replace(quantizer=quantizer))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    tokens = jnp.arange(NUM_CODES)[None]
    found = [
        encoder_logits(
            make_target(
                mixing_prior(), patch_codec().replace(quantizer=quantizer),
                Energy(apply=no_energy), grid=(4, 4),
            ),
            tokens,
            0.7,
        )
        for quantizer in (table, patch_codec().quantizer)
    ]  # fmt: skip
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def no_energy(params, data, x):
    """A start needs none, but it must have the shape of one."""
    return jnp.zeros(x.shape[0])


def measured_target(operator, y, codec=None, **options):
    params = Params(mixing_prior(window=4), codec or patch_codec(), operator)
    return measurement_target(params, y, config=APSConfig(sigma=SIGMA, **options))


def test_starts_of_a_target_are_those_of_its_measurement_for_all_samples():
    """Masks of their own for two images; samples are sample-major."""
    masks = np.random.default_rng(0).uniform(size=(2, SIDE, SIDE, 1)) < [[[[0.2]]], [[[0.8]]]]
    masks[0, : SIDE // 2] = False
    operator = operators.inpainting_random(fraction=0.5)
    operator = operator.replace(params=jnp.asarray(masks, jnp.float32))
    y = operator(images())
    both = measured_target(operator, y, num_samples=2, draw="categorical")
    tokens, share = smooth_tokens(both), token_sensitivity(both, 0.3)
    x = smooth_estimate(operator, y, image_shape=(SIDE, SIDE), sigma=SIGMA)
    expected = encode_tokens(patch_codec(), x).reshape(2, -1)
    np.testing.assert_array_equal(tokens, np.tile(expected, (2, 1)))
    assert np.ptp(share[0]) > 0.5
    for i in range(2):
        one = operator.replace(params=operator.params[i : i + 1])
        alone = measured_target(one, y[i : i + 1], num_samples=2, draw="categorical")
        np.testing.assert_allclose(token_sensitivity(alone, 0.3), share[i::2], rtol=1e-5)
        np.testing.assert_array_equal(smooth_tokens(alone), tokens[i::2])
    finer = token_sensitivity(measured_target(operator, y, decode_scale=2), 0.3)
    halves = np.asarray(finer).reshape(2, 8, 8)
    np.testing.assert_array_equal(halves[0, :4], 0)
    assert halves[0, 4:].max() > 0.5


def test_given_tokens_do_not_count():
    """The mean sensitivity, which the floor is a share of, is over the unknown tokens."""
    mask = np.ones((SIDE, SIDE))
    mask[::2, : SIDE // 2] = 0
    operator = operators.inpainting_mask(mask)
    y = operator(images())
    params = Params(mixing_prior(window=4), patch_codec(), operator)
    known = np.full((2, 4, 4), NUM_CODES)
    known[1, :, 2:] = 3
    target = measurement_target(
        params, y, config=APSConfig(), known_tokens=jnp.asarray(known.reshape(2, 16))
    )
    found = np.asarray(token_sensitivity(target, 1.0)).reshape(2, 4, 4)
    # Squares 3 per pixel: half of 16 pixels are seen on the left, all of them on the right.
    half, whole = np.sqrt(24.0), np.sqrt(48.0)
    mean = (half + whole) / 2
    expected = 24 / (24 + np.array([mean, half]) ** 2)
    np.testing.assert_allclose(
        found[:, :, :2], np.broadcast_to(expected[:, None, None], (2, 4, 2)), rtol=1e-4
    )


@pytest.mark.parametrize("option", ["encoder_start", "sensitivity_floor"])
def test_an_energy_without_a_measurement_has_no_such_start(option):
    codec = patch_codec()
    target = make_target(mixing_prior(window=4), codec, Energy(apply=no_energy), grid=(4, 4))
    sampler = sampler_of(APSConfig(**{option: 0.5}))
    with pytest.raises(ValueError, match=f"^{option} needs a measurement; set it to 0 .*") as error:
        sampler.init(target, target.keys(jax.random.key(0)))
    assert "\n" not in str(error.value)
