"""Draws of tokens: their law, their support, and the cut of the tail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aps_jax.sampling.draws import draw_tokens, top_p


@pytest.mark.parametrize("num_codes", [8, 67, 96, 256])  # plain, prime, uneven blocks, square
def test_draws_have_the_given_law(num_codes):
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal(num_codes)
    logits[rng.permutation(num_codes)[: num_codes // 4]] = -np.inf
    probs = np.exp(logits) / np.exp(logits).sum()
    rows, length = 40, 1000
    keys = jax.random.split(jax.random.key(1), rows)
    tokens = draw_tokens(keys, jnp.broadcast_to(logits, (rows, length, num_codes)))
    assert tokens.dtype == jnp.int32 and tokens.shape == (rows, length)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=num_codes)
    assert counts[probs == 0].sum() == 0
    common = probs * rows * length > 5
    expected = np.append(probs[common], probs[~common].sum())
    found = np.append(counts[common], counts[~common].sum())
    kept = expected > 0
    p_value = stats.chisquare(found[kept], rows * length * expected[kept]).pvalue
    assert p_value > 1e-3


def test_positions_and_rows_draw_independently():
    keys = jax.random.split(jax.random.key(2), 3)
    logits = jnp.zeros((3, 400, 256))
    tokens = np.asarray(draw_tokens(keys, logits))
    np.testing.assert_array_equal(tokens[1:2], draw_tokens(keys[1:2], logits[1:2]))
    high, low = tokens // 16, tokens % 16
    for a, b in ((tokens[0], tokens[1]), (tokens[0, 1:], tokens[0, :-1]), (high[2], low[2])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


def test_a_block_without_possible_codes_is_never_drawn():
    logits = jnp.full((1, 500, 256), -jnp.inf).at[..., jnp.array([17, 250])].set(0.0)
    tokens = draw_tokens(jax.random.split(jax.random.key(3), 1), logits)
    assert set(np.asarray(tokens).ravel().tolist()) == {17, 250}


def test_the_tail_beyond_top_p_is_cut():
    log_probs = jnp.log(jnp.array([[[0.1, 0.6, 0.25, 0.05], [0.96, 0.02, 0.01, 0.01]]]))
    kept = np.isfinite(top_p(log_probs, 0.8))[0]
    np.testing.assert_array_equal(kept, [[0, 1, 1, 0], [1, 0, 0, 0]])
    assert np.all(np.isfinite(top_p(log_probs, 1.0)))


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
def test_top_p_keeps_the_fewest_codes_that_hold_the_mass(mass):
    logits = 3 * np.random.default_rng(4).standard_normal((5, 300)).astype(np.float32)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(axis=-1, keepdims=True)
    kept = np.isfinite(np.asarray(top_p(jnp.asarray(logits), mass)))
    for row, is_kept in zip(probs, kept, strict=True):
        order = np.sort(row)[::-1]
        assert is_kept.sum() == np.searchsorted(np.cumsum(order), mass) + 1
        assert row[is_kept].min() > row[~is_kept].max()


def test_top_p_keeps_ties_and_needs_no_finite_tail():
    kept = top_p(jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25])), 0.3)
    assert np.isfinite(kept).all()
    kept = top_p(jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0]), 0.9)
    np.testing.assert_array_equal(np.isfinite(kept), [False, True, False, True])
