"""What an operator sees of each pixel, against its matrix; the evidence of tokens by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channel_matrix

from aps_jax import operators
from aps_jax.evidence import pixel_sensitivity, token_evidence
from aps_jax.tasks import TASKS, make_operator

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


@pytest.mark.parametrize(
    "operator",
    [operators.gaussian_blur(kernel_size=7, std=1.5), operators.super_resolution(scale=4)],
    ids=lambda operator: operator.name,
)
def test_it_estimates_the_squared_columns_of_a_linear_operator(operator):
    seen = sensitivity_of(operator)
    squares = 3 * np.sum(channel_matrix(operator, SIDE) ** 2, axis=0).reshape(SIDE, SIDE)
    np.testing.assert_allclose(seen.mean(axis=(1, 2)), squares.mean(), rtol=0.15)
    # Images of a batch get the same probes.
    np.testing.assert_array_equal(seen[0], seen[1])


def test_a_pixel_that_saturates_at_one_image_counts_by_the_others():
    seen = sensitivity_of(operators.hdr())
    tokens = seen.reshape(2, SIDE // 4, 4, SIDE // 4, 4).sum(axis=(2, 4))
    assert tokens.min() > 0.2 * tokens.mean()
    # At grey alone the derivative is 2 everywhere, at a bright image 0.
    assert seen.mean() < 3 * 2**2


def test_masks_of_each_image_and_stacked_measurements_add_up():
    masks = np.random.default_rng(1).uniform(size=(2, SIDE, SIDE, 1)) < 0.5
    each = operators.inpainting_random(fraction=0.5).replace(params=jnp.asarray(masks, jnp.float32))
    seen = sensitivity_of(each)
    np.testing.assert_allclose(seen, 3.0 * masks[..., 0], atol=1e-5)
    whole = operators.inpainting_mask(np.ones((SIDE, SIDE)))
    both = operators.stack([operators.inpainting_mask(masks[0, ..., 0]), whole])
    # The signs of the two are independent: 0 or 4 per channel where both see a pixel.
    seen = sensitivity_of(both)[0]
    np.testing.assert_allclose(seen[~masks[0, ..., 0]], 3.0, atol=1e-5)
    assert 5.0 < seen[masks[0, ..., 0]].mean() < 7.0


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not needs_more(task)])
def test_every_operator_has_a_finite_sensitivity_somewhere(task):
    side = 64
    operator = make_operator(task, (side, side)).init(jax.random.key(0), (side, side))
    y = operator(jnp.zeros((1, side, side, 3)))
    seen = np.asarray(pixel_sensitivity(operator, y, image_shape=(side, side)))
    assert seen.shape == (1, side, side)
    assert np.all(np.isfinite(seen)) and seen.min() >= 0 and seen.max() > 0


def test_evidence_is_half_at_the_floor_and_ignores_given_tokens():
    """2 x 3 tokens of 2 x 2 pixels over an image of 3 x 4: half a row and a column are past it."""
    sensitivity = np.zeros((1, 3, 4))
    sensitivity[0, :2, :2] = 25 / 4  # s = 5
    sensitivity[0, 2, :2] = 0.25 / 2  # s = 0.5, of two pixels inside the image
    sensitivity[0, :2, 2:] = 1e4
    is_unknown = np.array([[True, False, True, True, True, True]])
    evidence = token_evidence(
        jnp.asarray(sensitivity, jnp.float32), jnp.asarray(is_unknown),
        grid=(2, 3), stride=2, decode_scale=1, floor=0.2,
    )  # fmt: skip
    s = np.array([5.0, 200.0, 0.0, 0.5, 0.0, 0.0])
    reference = 0.2 * (5.0 + 0.5) / 5
    np.testing.assert_allclose(evidence[0], s**2 / (s**2 + reference**2), rtol=1e-5)
    # Decoded twice as large, a token covers one pixel.
    fine = token_evidence(
        jnp.asarray([[[4.0, 0.0], [0.0, 0.0]]]), jnp.ones((1, 4), bool),
        grid=(2, 2), stride=2, decode_scale=2, floor=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(fine[0], [16 / 17, 0, 0, 0], rtol=1e-5)


def test_nothing_measured_is_no_evidence():
    evidence = token_evidence(
        jnp.zeros((1, 4, 4)),
        jnp.ones((1, 4), bool),
        grid=(2, 2),
        stride=2,
        decode_scale=1,
        floor=0.3,
    )
    np.testing.assert_array_equal(evidence, 0)
