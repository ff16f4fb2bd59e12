"""What an operator sees of each pixel, against its matrix; the sensitivity of tokens by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channel_matrix

from aps_jax import operators
from aps_jax.operators import make_operator
from aps_jax.sampling.sensitivity import pixel_sensitivity, token_sensitivity
from aps_jax.tasks import TASKS

SIDE = 16


def needs_more(task):
    """Whether a task has an option that its user must give."""
    return any(option.is_required for option in task.options.values())


def sensitivity_of(operator, batch=2):
    y = operator(jnp.zeros((batch, SIDE, SIDE, 3)))
    return np.asarray(pixel_sensitivity(operator, y, image_shape=(SIDE, SIDE)), np.float64)


def test_it_is_exact_where_each_pixel_is_measured_once():
    mask = np.random.default_rng(0).uniform(size=(SIDE, SIDE)) < 0.4
    seen = sensitivity_of(operators.inpainting_mask(mask))
    np.testing.assert_allclose(seen, np.broadcast_to(3.0 * mask, seen.shape), atol=1e-5)


def of_tokens(seen):
    """Sums over 4 x 4 pixels."""
    return seen.reshape(*seen.shape[:-2], SIDE // 4, 4, SIDE // 4, 4).sum(axis=(-3, -1))


def blurred_and_masked():
    mask = np.random.default_rng(2).uniform(size=(SIDE, SIDE)) < np.linspace(0, 1, SIDE)[:, None]
    blur = operators.gaussian_blur(kernel_size=7, std=1.5)
    return operators.compose(operators.inpainting_mask(mask), blur)


@pytest.mark.parametrize(
    "operator",
    [blurred_and_masked(), operators.super_resolution(scale=4)],
    ids=["blurred and masked", "super-resolution"],
)
def test_it_estimates_the_squared_columns_of_a_linear_operator(operator):
    seen = sensitivity_of(operator)
    squares = 3 * np.sum(channel_matrix(operator, SIDE) ** 2, axis=0).reshape(SIDE, SIDE)
    np.testing.assert_allclose(seen.mean(axis=(1, 2)), squares.mean(), rtol=0.1)
    least = 0.05 * of_tokens(squares).max()
    np.testing.assert_allclose(of_tokens(seen[0]), of_tokens(squares), rtol=0.5, atol=least)
    # Images of a batch get the same probes.
    np.testing.assert_array_equal(seen[0], seen[1])


def test_a_pixel_that_saturates_at_some_images_counts_by_the_others():
    """A gain of 50 leaves 2 % of the pixels of a random image below saturation."""
    tokens = of_tokens(sensitivity_of(operators.hdr(gain=50))[0])
    assert tokens.min() > 0.1 * tokens.mean()


def test_masks_of_each_image_and_stacked_measurements_add_up():
    masks = np.random.default_rng(1).uniform(size=(2, SIDE, SIDE, 1)) < 0.5
    each = operators.inpainting_random(fraction=0.5).replace(params=jnp.asarray(masks, jnp.float32))
    seen = sensitivity_of(each)
    np.testing.assert_allclose(seen, 3.0 * masks[..., 0], atol=1e-5)
    whole = operators.inpainting_mask(np.ones((SIDE, SIDE)))
    both = operators.stack([operators.inpainting_mask(masks[0, ..., 0]), whole])
    # The signs of the two are independent: 0 or 4 per channel and probe where both see a pixel.
    seen = sensitivity_of(both)[0]
    np.testing.assert_allclose(seen[~masks[0, ..., 0]], 3.0, atol=1e-5)
    np.testing.assert_allclose(seen[masks[0, ..., 0]].mean(), 6.0, rtol=0.1)
    assert np.ptp(seen[masks[0, ..., 0]]) > 1


def test_entries_that_were_not_observed_do_not_count():
    """An operator may compute entries that its `observed` says are missing."""
    half = np.zeros((1, SIDE, SIDE, 1), np.float32)
    half[:, : SIDE // 2] = 1
    operator = operators.denoising().replace(observed=lambda params, y_shape: jnp.asarray(half))
    np.testing.assert_allclose(sensitivity_of(operator)[1], 3.0 * half[0, ..., 0], atol=1e-5)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not needs_more(task)])
def test_every_operator_has_a_finite_sensitivity_somewhere(task):
    side = 64
    operator = make_operator(task).init(jax.random.key(0), (side, side))
    y = operator(jnp.zeros((1, side, side, 3)))
    seen = np.asarray(pixel_sensitivity(operator, y, image_shape=(side, side)))
    assert seen.shape == (1, side, side)
    assert np.all(np.isfinite(seen)) and seen.min() >= 0 and seen.max() > 0


def test_sensitivity_of_tokens_is_half_at_the_floor_and_ignores_given_tokens():
    """2 x 3 tokens of 2 x 2 pixels over an image of 3 x 4: half a row and a column are past it."""
    pixels = np.zeros((1, 3, 4))
    pixels[0, :2, :2] = 25 / 4  # s = 5
    pixels[0, 2, :2] = 0.25 / 2  # s = 0.5, of two pixels inside the image
    pixels[0, :2, 2:] = 1e4
    is_unknown = np.array([[True, False, True, True, True, True]])
    found = token_sensitivity(
        jnp.asarray(pixels, jnp.float32), jnp.asarray(is_unknown),
        grid=(2, 3), stride=2, decode_scale=1, floor=0.2,
    )  # fmt: skip
    s = np.array([5.0, 200.0, 0.0, 0.5, 0.0, 0.0])
    reference = 0.2 * (5.0 + 0.5) / 5
    np.testing.assert_allclose(found[0], s**2 / (s**2 + reference**2), rtol=1e-5)
    # Decoded twice as large, a token covers one pixel.
    fine = token_sensitivity(
        jnp.asarray([[[4.0, 0.0], [0.0, 0.0]]]), jnp.ones((1, 4), bool),
        grid=(2, 2), stride=2, decode_scale=2, floor=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(fine[0], [16 / 17, 0, 0, 0], rtol=1e-5)


def test_nothing_measured_leaves_no_sensitivity():
    found = token_sensitivity(
        jnp.zeros((1, 4, 4)),
        jnp.ones((1, 4), bool),
        grid=(2, 2),
        stride=2,
        decode_scale=1,
        floor=0.3,
    )
    np.testing.assert_array_equal(found, 0)
