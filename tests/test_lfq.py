import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.codec import expectation, lfq, vq


def test_codes_of_two_bits_by_hand():
    # Row k is the code of token k; the first channel is the most significant bit.
    np.testing.assert_array_equal(lfq.codebook(2), [[-1, -1], [-1, 1], [1, -1], [1, 1]])
    chex.assert_type(lfq.codebook(2), jnp.float32)


@pytest.mark.parametrize("num_bits", [1, 2, 5, 13])
def test_round_trip_over_all_tokens(num_bits):
    tokens = np.arange(2**num_bits)
    codes = lfq.codebook(num_bits)
    assert codes.shape == (2**num_bits, num_bits)
    assert set(np.unique(codes)) == {-1, 1}
    assert len(np.unique(codes, axis=0)) == 2**num_bits
    np.testing.assert_array_equal(lfq.codes_to_tokens(codes), tokens)
    chex.assert_type(lfq.codes_to_tokens(codes), jnp.int32)


def test_first_channel_is_the_most_significant_bit():
    code = np.asarray(lfq.tokens_to_codes(jnp.array([1, 4096]), 13))
    np.testing.assert_array_equal(np.flatnonzero(code[0] > 0), [12])
    np.testing.assert_array_equal(np.flatnonzero(code[1] > 0), [0])


def test_token_6402_agrees_with_its_binary_digits():
    digits = [int(digit) for digit in format(6402, "013b")]
    assert digits == [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    code = np.array(digits) * 2.0 - 1
    np.testing.assert_array_equal(lfq.tokens_to_codes(jnp.array(6402), 13), code)
    assert int(lfq.codes_to_tokens(jnp.asarray(code))) == 6402
    assert int(lfq.codes_to_tokens(jnp.asarray(code[::-1].copy()))) != 6402


def test_zero_counts_as_minus_one():
    codes, tokens = lfq.quantize(jnp.array([[0.0, -0.0, 1e-30], [0.5, 0.0, -2.0]]))
    np.testing.assert_array_equal(codes, [[-1, -1, 1], [1, -1, -1]])
    np.testing.assert_array_equal(tokens, [1, 4])


def test_nearest_row_of_the_lfq_codebook_is_the_sign(rng):
    codebook = lfq.codebook(5)
    features = jnp.asarray(rng.normal(size=(4, 50, 5)), jnp.float32)
    codes, tokens = lfq.quantize(features)
    np.testing.assert_array_equal(vq.nearest_row(codebook, features), tokens)
    np.testing.assert_array_equal(codebook[tokens], codes)
    np.testing.assert_array_equal(codes, np.sign(features))
    chex.assert_type(tokens, jnp.int32)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other(rng):
    features = jnp.asarray(rng.uniform(-1, 1, size=20), jnp.float32)
    weights = jnp.asarray(rng.normal(size=20), jnp.float32)

    def value(features):
        codes = lfq.quantize(features)[0]
        return jnp.sum(weights * expectation.straight_through(features, codes)), codes

    (total, codes), grad = jax.value_and_grad(value, has_aux=True)(features)
    np.testing.assert_allclose(total, np.sum(np.float64(weights) * np.sign(features)), rtol=1e-5)
    np.testing.assert_array_equal(grad, weights)
    np.testing.assert_array_equal(expectation.straight_through(features, codes), codes)


@pytest.mark.parametrize("num_bits", [0, 21])
def test_absurd_number_of_bits(num_bits):
    with pytest.raises(ValueError, match="between 1 and 20"):
        lfq.codebook(num_bits)


@pytest.mark.parametrize("num_bits", [1, 2, 5, 8])
def test_mean_code_and_its_gradient_are_those_of_the_product(num_bits, rng):
    """Against float64; logits far from zero, as after many optimiser steps."""
    logits = rng.normal(scale=4, size=(2, 3, 2**num_bits)) + 300
    cotangent = rng.normal(size=(2, 3, num_bits))
    codes = np.float64(lfq.codebook(num_bits))
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    slope = cotangent @ codes.T
    expected = probs * (slope - np.sum(probs * slope, axis=-1, keepdims=True))
    mean, vjp = jax.vjp(jax.jit(lfq.mean_code), jnp.asarray(logits, jnp.float32))
    # The logits themselves are rounded to 300 * 2**-24.
    np.testing.assert_allclose(mean, probs @ codes, atol=1e-4)
    (gradient,) = vjp(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


def test_mean_code_of_certain_logits_is_the_code():
    logits = 1e4 * jax.nn.one_hot(jnp.arange(32), 32)
    np.testing.assert_array_equal(lfq.mean_code(logits), lfq.codebook(5))
