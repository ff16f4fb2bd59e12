"""The laws of `aps_jax.types.Quantizer`, for every codebook, against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from aps_jax.codec import expectation
from aps_jax.codec.fsq import FSQ
from aps_jax.codec.lfq import LFQ
from aps_jax.codec.residual import Residual
from aps_jax.codec.vq import VQ, nearest_row
from aps_jax.types import Codec

_RNG = np.random.default_rng(3)
#: float32 values, so that float64 sees the same codes.
TABLE = np.float64(np.float32(_RNG.normal(size=(5, 3)) * _RNG.uniform(0.3, 2, size=(5, 1))))
TABLES = np.float64(np.float32(_RNG.normal(size=(2, 4, 3)) * [[[2.0]], [[0.5]]]))

#: Codebook, and its codes by level and token, written down by hand: [levels, K, d].
CASES = {
    "lfq": (LFQ(3), np.array([list(itertools.product([-1, 1], repeat=3))])),
    "vq": (VQ(jnp.asarray(TABLE, jnp.float32)), TABLE[None]),
    "fsq": (FSQ((3, 2, 5)), np.array([list(itertools.product(
        [-1, 0, 1], [-1, 1], [-1, -0.5, 0, 0.5, 1]))])),
    "residual": (Residual(jnp.asarray(TABLES, jnp.float32)), TABLES),
}  # fmt: skip
EVERY_CODEBOOK = pytest.mark.parametrize(
    ("quantizer", "books"), [pytest.param(*case, id=name) for name, case in CASES.items()]
)


def on_grid(values, quantizer):
    """[cells, levels, ...] as [2, cells / 2, levels, ...], without levels if there is only one."""
    values = np.stack(np.split(np.asarray(values), 2))
    return values if quantizer.axes else values[:, :, 0]


def random_tokens(quantizer, books, rng):
    """Tokens on a grid [2, 6, *axes], and what the books say of each: [2, 6, *axes, K, d]."""
    tokens = rng.integers(0, books.shape[1], size=(12, len(books)))
    every = np.broadcast_to(books, (12, *books.shape))
    own = every[np.arange(12)[:, None], np.arange(len(books)), tokens]
    return [on_grid(values, quantizer) for values in (tokens, own, every)]


@EVERY_CODEBOOK
def test_sizes(quantizer, books):
    assert quantizer.num_codes == books.shape[1]
    assert quantizer.num_features == books.shape[2]
    assert quantizer.axes == ((len(books),) if len(books) > 1 else ())
    codec = Codec(params=None, quantizer=quantizer, decode=None, stride=4)
    assert codec.num_codes == books.shape[1]
    assert codec.grid((9, 8)) == (3, 2, *quantizer.axes)


@EVERY_CODEBOOK
def test_all_tokens_have_their_codes_and_come_back(quantizer, books):
    levels, num_codes, _ = books.shape
    tokens = np.stack([np.roll(np.arange(num_codes), level) for level in range(levels)], axis=-1)
    expected = books[np.arange(levels), tokens]
    if levels == 1:
        tokens, expected = tokens[:, 0], expected[:, 0]
    codes = quantizer.lookup(jnp.asarray(tokens))
    assert codes.dtype == jnp.float32
    np.testing.assert_allclose(codes, expected, atol=1e-7)
    back = quantizer.nearest(codes)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, tokens)
    # A little off is still nearest.
    np.testing.assert_array_equal(quantizer.nearest(codes + 0.02), tokens)


@EVERY_CODEBOOK
def test_tokens_may_lie_on_any_grid(quantizer, books, rng):
    tokens, own, _ = random_tokens(quantizer, books, rng)
    np.testing.assert_allclose(quantizer.lookup(jnp.asarray(tokens)), own, atol=1e-7)
    cube = tokens.reshape(2, 2, 3, *quantizer.axes)
    codes = quantizer.lookup(jnp.asarray(cube))
    np.testing.assert_allclose(codes, own.reshape(*cube.shape, -1), atol=1e-7)
    np.testing.assert_array_equal(quantizer.nearest(codes), cube)


@EVERY_CODEBOOK
def test_nearest_is_nearest(quantizer, books, rng):
    features = rng.normal(size=(200, *books[:, 0].shape)) * 1.3
    distances = np.sum((features[:, :, None] - books) ** 2, axis=-1)
    expected = np.argmin(distances, axis=-1)
    assert len(np.unique(expected)) == books.shape[1]
    found = quantizer.nearest(jnp.asarray(on_grid(features, quantizer), jnp.float32))
    np.testing.assert_array_equal(found, on_grid(expected, quantizer))


@EVERY_CODEBOOK
def test_mean_codes_and_their_gradient(quantizer, books, rng):
    """softmax(logits) C; logits far from zero, as after many optimiser steps."""
    _, _, every = random_tokens(quantizer, books, rng)
    logits = rng.normal(scale=3, size=every.shape[:-1]) + 100
    cotangent = rng.normal(size=(*every.shape[:-2], every.shape[-1]))
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    slope = np.einsum("...d,...kd->...k", cotangent, every)
    expected = probs * (slope - np.sum(probs * slope, axis=-1, keepdims=True))
    mean, vjp = jax.vjp(jax.jit(quantizer.expect), jnp.asarray(logits, jnp.float32))
    # The logits themselves are rounded to 100 * 2**-24.
    np.testing.assert_allclose(mean, np.einsum("...k,...kd->...d", probs, every), atol=5e-5)
    (gradient,) = vjp(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(gradient, expected, atol=5e-5)


@EVERY_CODEBOOK
def test_certain_logits_have_the_code(quantizer, books, rng):
    tokens, own, _ = random_tokens(quantizer, books, rng)
    logits = 1e4 * jax.nn.one_hot(tokens, books.shape[1])
    np.testing.assert_allclose(quantizer.expect(logits), own, atol=1e-6)


@EVERY_CODEBOOK
def test_similarity_is_minus_half_the_squared_distance(quantizer, books, rng):
    tokens, own, every = random_tokens(quantizer, books, rng)
    expected = -np.sum((every - own[..., None, :]) ** 2, axis=-1) / 2
    found = quantizer.similarity(jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(np.argmax(found, axis=-1), tokens)


@EVERY_CODEBOOK
def test_quantized_expectation_is_a_code_with_the_gradient_of_the_mean(quantizer, books, rng):
    """Flat, as the samplers have it: [R, L, K] over a grid of six places."""
    codec = Codec(params=None, quantizer=quantizer, decode=None)
    grid = (3, 2, *quantizer.axes)
    length, num_codes = int(np.prod(grid)), books.shape[1]
    logits = jnp.asarray(rng.normal(size=(2, length, num_codes)), jnp.float32)
    codes, tokens = expectation.quantized_expectation(codec, logits, grid)
    every = np.tile(books, (6, 1, 1))  # [L, K, d]
    probs = np.exp(np.float64(logits))
    mean = np.einsum("rlk,lkd->rld", probs / probs.sum(axis=-1, keepdims=True), every)
    distances = np.sum((mean[:, :, None] - every) ** 2, axis=-1)
    np.testing.assert_array_equal(tokens, np.argmin(distances, axis=-1))
    own = every[np.arange(length), np.asarray(tokens)]
    np.testing.assert_allclose(codes, own, atol=1e-6)
    slope = jnp.asarray(rng.normal(size=codes.shape), jnp.float32)
    gradients = [
        jax.grad(lambda logits, fn=fn: jnp.sum(slope * fn(logits)))(logits)
        for fn in (
            lambda logits: expectation.quantized_expectation(codec, logits, grid)[0],
            lambda logits: expectation.expected_code(codec, logits, grid),
        )
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_the_first_number_of_an_fsq_code_varies_slowest():
    np.testing.assert_allclose(
        FSQ((2, 3)).lookup(jnp.array([0, 1, 3])), [[-1, -1], [-1, 0], [1, -1]]
    )
    bits = [quantizer.lookup(jnp.arange(8)) for quantizer in (FSQ((2, 2, 2)), LFQ(3))]
    np.testing.assert_array_equal(*bits)


def test_fsq_clips_what_lies_outside():
    found = FSQ((3, 3)).nearest(jnp.array([[-9.0, 9.0], [0.4, -0.4]]))
    np.testing.assert_array_equal(found, [2, 4])


def test_residual_codes_need_the_axis_of_their_levels():
    quantizer = CASES["residual"][0]
    with pytest.raises(
        ValueError, match=r"shape \(1, 3, 4\); their last axis must be the 2 levels"
    ):
        quantizer.lookup(jnp.zeros((1, 3, 4), jnp.int32))


def test_residual_levels_explain_what_the_others_left(rng):
    quantizer, books = CASES["residual"]
    features = rng.normal(size=(50, 3)) * 2
    left, expected = features.copy(), []
    for book in books:
        token = np.argmin(np.sum((left[:, None] - book) ** 2, axis=-1), axis=1)
        expected.append(token)
        left = left - book[token]
    tokens = quantizer.nearest(quantizer.residuals(jnp.asarray(features, jnp.float32)))
    np.testing.assert_array_equal(tokens, np.stack(expected, axis=-1))
    total = np.asarray(quantizer.lookup(tokens)).sum(axis=-2)
    np.testing.assert_allclose(features - total, left, atol=1e-5)


def test_shapes_in_signatures_are_enforced():
    """By `typecheck`, in tests alone."""
    codec = Codec(params=None, quantizer=LFQ(2), decode=None)
    for tokens in (jnp.zeros(3, jnp.int32), jnp.zeros((1, 3))):
        with pytest.raises(TypeCheckError, match="lookup"):
            expectation.lookup(codec, tokens, (3,))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_rows_of_any_number_are_found_and_ties_go_to_the_first(size, rng):
    table = rng.normal(size=(size, 3)).astype(np.float32)
    table[size // 2 :] = table[: size - size // 2]  # every row twice, and the last once more
    features = np.concatenate([table, rng.normal(size=(50, 3)).astype(np.float32)])
    distances = np.sum((features[:, None].astype(np.float64) - table) ** 2, axis=-1)
    np.testing.assert_array_equal(nearest_row(table, features), distances.argmin(axis=-1))
