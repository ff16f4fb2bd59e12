import numpy as np
import pytest

from aps_jax import schedules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [1, np.cos(np.pi / 8), np.sqrt(0.5), np.sin(np.pi / 8), 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("square", [1, 15 / 16, 0.75, 7 / 16, 0]),
        ("sqrt", [1, 0.5, 1 - np.sqrt(0.5), 1 - np.sqrt(0.75), 0]),
    ],
)
def test_closed_forms_over_four_steps(name, expected):
    np.testing.assert_allclose(schedules.masked_share(name, 4), expected, atol=1e-12)


def test_every_schedule_has_a_closed_form_test():
    assert sorted(schedules.SCHEDULES) == ["cosine", "linear", "sqrt", "square"]


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize("num_steps", [1, 2, 15, 100])
def test_shares_fall_from_one_to_exactly_zero(name, num_steps):
    shares = schedules.masked_share(name, num_steps)
    assert shares.shape == (num_steps + 1,)
    assert shares[0] == 1 and shares[-1] == 0
    assert np.all(np.diff(shares) < 0)


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize(("num_steps", "num_tokens"), [(1, 9), (15, 256), (7, 3), (40, 16)])
def test_counts_are_the_floor_of_the_share(name, num_steps, num_tokens):
    counts = schedules.masked_counts(name, num_steps, num_tokens)
    assert counts.dtype == np.int32 and counts.shape == (num_steps,)
    assert counts[-1] == 0
    assert np.all(np.diff(counts) <= 0) and counts[0] < num_tokens
    exact = num_tokens * schedules.masked_share(name, num_steps)[1:]
    assert np.all(counts <= exact + 1e-6) and np.all(counts > exact - 1)


def test_mmada_counts_of_fifteen_steps():
    # floor(256 cos(pi r / 2)) at r = 1/15 ... 15/15, from a table of cosines.
    degrees = np.arange(6, 91, 6)
    expected = np.floor(256 * np.cos(np.deg2rad(degrees)) + 1e-9)
    np.testing.assert_array_equal(schedules.masked_counts("cosine", 15, 256), expected)
    assert schedules.masked_counts("cosine", 15, 256)[:3].tolist() == [254, 250, 243]


@pytest.mark.parametrize("num_tokens", [3, 10, 16, 49])
def test_linear_schedule_of_as_many_steps_as_tokens_reveals_one_each(num_tokens):
    # 10 * (1 - 0.9) is below 1 in floating point; the floor must not notice.
    counts = schedules.masked_counts("linear", num_tokens, num_tokens)
    np.testing.assert_array_equal(counts, np.arange(num_tokens)[::-1])


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
def test_elbo_weights_follow_from_alpha(name):
    num_steps = 9
    times = 1 - np.arange(num_steps + 1) / num_steps  # t of the state before each step, then 0
    alpha = np.array([1 - schedules.SCHEDULES[name](1 - t) for t in times])
    t, s = alpha[:-1], alpha[1:]
    weights = schedules.elbo_weights(name, num_steps)
    np.testing.assert_allclose(weights, (s - t) / (1 - t), rtol=1e-6)
    assert weights.dtype == np.float32 and weights[-1] == 1
    assert np.all(weights > 0)


def test_thresholds():
    np.testing.assert_allclose(schedules.cosine_thresholds(3), [1, np.sqrt(0.5), 0], atol=1e-7)
    np.testing.assert_array_equal(schedules.cosine_thresholds(1), [1])


def test_learning_rates():
    rates = schedules.cosine_rates(2, 3)
    expected = [[1, (2 + np.sqrt(3)) / 4, 0.75], [0.5, 0.25, (2 - np.sqrt(3)) / 4]]
    np.testing.assert_allclose(rates, expected, atol=1e-7)
    assert schedules.cosine_rates(3, 0).shape == (3, 0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown schedule 'cosin'.*linear"):
        schedules.masked_share("cosin", 4)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        schedules.masked_share("cosine", 0)
