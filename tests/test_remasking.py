import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aps_jax.sampling import remasking

# One shape, so that hypothesis compiles the functions once.
BATCH, LENGTH = 3, 8
MANY = settings(max_examples=60, deadline=None, derandomize=True)
by_count = jax.jit(remasking.select_by_count)
by_threshold = jax.jit(remasking.select_by_threshold)


@st.composite
def boards(draw):
    """Scores with many ties (and impossible tokens), and which positions are open."""
    score = st.sampled_from([-np.inf, -3.0, -1.0, -0.5, 0.0])
    row = st.lists(score, min_size=LENGTH, max_size=LENGTH)
    is_open = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    scores = draw(st.lists(row, min_size=BATCH, max_size=BATCH))
    masks = draw(st.lists(is_open, min_size=BATCH, max_size=BATCH))
    return np.array(scores, np.float32), np.array(masks)


def best_first(scores, is_open, num_kept):
    """Reference: plain Python sort of the open positions."""
    order = sorted(np.flatnonzero(is_open), key=lambda index: (-scores[index], index))
    kept = np.zeros(LENGTH, bool)
    kept[order[:num_kept]] = True
    return kept


@MANY
@given(boards(), st.integers(0, LENGTH + 2))
def test_count_rule(board, num_masked_after):
    scores, is_open = board
    kept = np.asarray(by_count(scores, is_open, num_masked_after))
    for row in range(BATCH):
        num_open = is_open[row].sum()
        # The scheduled number stays masked, but one token is revealed wherever any is open.
        num_left = min(num_masked_after, max(num_open - 1, 0))
        expected = best_first(scores[row], is_open[row], num_open - num_left)
        np.testing.assert_array_equal(kept[row], expected)
        assert (is_open[row] & ~kept[row]).sum() == num_left
    assert not np.any(kept & ~is_open)


def test_count_rule_takes_one_number_per_image():
    scores = jnp.zeros((BATCH, LENGTH))
    kept = by_count(scores, jnp.ones((BATCH, LENGTH), bool), jnp.array([0, 3, 7]))
    np.testing.assert_array_equal(kept.sum(axis=1), [8, 5, 1])
    np.testing.assert_array_equal(kept[2], np.arange(LENGTH) == 0)  # ties: earlier first


@MANY
@given(boards(), st.sampled_from([0.0, 0.2, 0.4, 0.7, 1.0]))
def test_threshold_rule(board, threshold):
    scores, is_open = board
    kept = np.asarray(by_threshold(scores, is_open, jnp.float32(threshold)))
    for row in range(BATCH):
        is_confident = is_open[row] & (np.exp(scores[row]) >= threshold)
        best = best_first(scores[row], is_open[row], 1)
        np.testing.assert_array_equal(kept[row], is_confident | best)
        if threshold == 0:
            np.testing.assert_array_equal(kept[row], is_open[row])


def test_a_failed_run_still_ends_without_masks():
    scores = np.full((BATCH, LENGTH), np.nan, np.float32)
    is_open = np.arange(LENGTH) % 2 == np.zeros((BATCH, 1))
    np.testing.assert_array_equal(by_count(scores, is_open, 0), is_open)
    np.testing.assert_array_equal(by_threshold(scores, is_open, jnp.float32(0)), is_open)


def test_confidence_is_the_log_probability_of_the_proposal(rng):
    log_probs = rng.normal(size=(2, 5, 4))
    proposal = rng.integers(0, 4, size=(2, 5))
    expected = [[log_probs[b, i, proposal[b, i]] for i in range(5)] for b in range(2)]
    got = remasking.confidence(jnp.asarray(log_probs, jnp.float32), jnp.asarray(proposal))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_gumbel_scores():
    keys = jax.random.split(jax.random.key(0), 2000)
    scores = jnp.zeros((2000, LENGTH)).at[:, 0].set(1.0)
    np.testing.assert_array_equal(remasking.gumbel_scores(keys, scores, 0.0), scores)
    # The Gumbel-max trick: the best position is distributed like softmax(scores / temperature).
    winners = np.argmax(remasking.gumbel_scores(keys, scores, 0.5), axis=1)
    expected = np.exp(2) / (np.exp(2) + LENGTH - 1)
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert abs(np.mean(winners == 0) - expected) < 4 * error
    # Noise belongs to the image's key, not to its place in the batch.
    alone = remasking.gumbel_scores(keys[5:6], scores[5:6], 0.5)
    np.testing.assert_array_equal(alone, remasking.gumbel_scores(keys, scores, 0.5)[5:6])


def test_remdm_loses_no_more_than_may_be_masked():
    gammas = np.array([1.0, 0.9, 0.5, 0.2, 0.0])
    for gamma_t, gamma_s in zip(gammas, gammas[1:], strict=False):
        most = min(1.0, gamma_s / (1 - gamma_t)) if gamma_t < 1 else 1.0
        chance = {
            (rule, strength): remasking.remdm_chance(rule, strength, gamma_t, gamma_s)
            for rule in ("cap", "rescale")
            for strength in (None, 0.0, 0.4, 1.0)
        }
        for strength in (0.0, 0.4, 1.0):
            np.testing.assert_allclose(chance["cap", strength], min(strength, most), rtol=1e-6)
            np.testing.assert_allclose(chance["rescale", strength], strength * most, rtol=1e-6)
        np.testing.assert_allclose(chance["cap", None], min(0.008, most), rtol=1e-6)
        np.testing.assert_allclose(chance["rescale", None], 0.015 * most, rtol=1e-6)


def test_open_tokens_are_picked_with_the_chance_and_by_their_own_key():
    keys = jax.random.split(jax.random.key(0), 2000)
    is_open = jnp.tile(jnp.arange(LENGTH) != 2, (2000, 1))
    picked = np.asarray(remasking.pick(keys, jnp.float32(0.3), is_open))
    assert not picked[:, 2].any()
    error = 4 * np.sqrt(0.3 * 0.7 / 2000)
    np.testing.assert_allclose(np.delete(picked, 2, axis=1).mean(axis=0), 0.3, atol=error)
    alone = remasking.pick(keys[5:6], jnp.float32(0.3), is_open[5:6])
    np.testing.assert_array_equal(alone, picked[5:6])
