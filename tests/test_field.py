import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import patch_codec

from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.prior.windows import blend_weights, prior_logits, window_starts
from aps_jax.types import Prior

K = 8
run = jax.jit(prior_logits, static_argnames="is_unconditional")
LENGTHS = [1, 3, 4, 5, 6, 7, 8, 11, 16, 17, 33]
WINDOWS = [1, 2, 3, 4, 5, 16]


def pointwise_apply(params, tokens):
    return params[tokens]


def constant_apply(params, tokens):
    return jnp.broadcast_to(params, (*tokens.shape, K))


def size_apply(params, tokens):
    """Logits that reveal the grid the prior was called with."""
    del params
    return jnp.full((*tokens.shape, K), float(tokens.shape[1] * 100 + tokens.shape[2]))


def mean_apply(params, tokens):
    """Every token's logits depend on the whole window, of this image alone."""
    return jnp.broadcast_to(params[tokens].mean((1, 2), keepdims=True), (*tokens.shape, K))


def pointwise_prior(window, apply=pointwise_apply):
    table = 3 * np.random.default_rng(0).normal(size=(K + 1, K)).astype(np.float32)
    return Prior(params=jnp.asarray(table), apply=apply, num_codes=K, window=window)


def random_tokens(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, K + 1, shape), jnp.int32)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.75])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_windows_cover_the_field_and_overlap(length, window, overlap):
    starts = window_starts(length, window, overlap)
    size = min(window, length)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - size
        covered[start : start + size] += 1
    assert covered.min() >= 1
    assert starts[0] == 0 and starts[-1] == length - size
    gaps = np.diff(starts)
    if window > 1:
        assert all(gaps <= max(1, size - np.ceil(overlap * size)))
    assert all(gaps >= 1) and (len(gaps) == 0 or np.ptp(gaps) <= 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_blend_weights_are_positive_and_sum_to_one(length, window):
    shares = blend_weights(length, window)
    total = np.zeros(length)
    for start, share in zip(window_starts(length, window), shares, strict=True):
        assert (share > 0).all()
        total[start : start + len(share)] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_blend_weights_favour_the_centre_of_a_window():
    first, second, *_ = blend_weights(40, 16)
    start = window_starts(40, 16)[1]
    assert (first[:start] == 1).all()  # only one window there
    overlap = first[start:]
    assert (np.diff(overlap) < 0).all()
    np.testing.assert_allclose(overlap + second[: len(overlap)], 1, atol=1e-6)


@pytest.mark.parametrize(("window", "shape"), [(None, (9, 13)), (6, (6, 6)), (6, (2, 5))])
def test_a_field_that_fits_is_one_plain_call(window, shape):
    prior, tokens = pointwise_prior(window), random_tokens((2, *shape))
    expected = prior.apply(prior.params, tokens)
    np.testing.assert_array_equal(run(prior, tokens), expected)


@pytest.mark.parametrize("shape", [(7, 4), (3, 9), (8, 8), (13, 11), (1, 5)])
def test_a_pointwise_prior_is_the_same_with_and_without_windows(shape):
    prior, tokens = pointwise_prior(4), random_tokens((2, *shape))
    whole = jax.nn.log_softmax(prior.apply(prior.params, tokens))
    np.testing.assert_allclose(run(prior, tokens), whole, atol=1e-5)


def test_a_prior_says_how_much_its_windows_overlap():
    tokens = random_tokens((1, 9, 8))
    calls = []

    def apply(params, tokens):
        calls.append(tokens.shape)
        return mean_apply(params, tokens)

    results = [
        prior_logits(pointwise_prior(4, apply).replace(overlap=overlap), tokens)
        for overlap in (0.0, 0.25, 0.75)
    ]
    assert not np.allclose(results[0], results[1]) and not np.allclose(results[1], results[2])
    for overlap in (-0.1, 1.0):
        with pytest.raises(ValueError, match="overlap of windows"):
            prior_logits(pointwise_prior(4).replace(overlap=overlap), tokens)


def test_a_constant_prior_stays_constant():
    prior = pointwise_prior(4, constant_apply).replace(params=jnp.arange(K, dtype=jnp.float32))
    logits = run(prior, random_tokens((1, 9, 6)))
    expected = jnp.broadcast_to(jax.nn.log_softmax(prior.params), logits.shape)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_windows_are_as_large_as_the_field_allows():
    seen = []

    def apply(params, tokens):
        seen.append(tokens.shape)
        return size_apply(params, tokens)

    prior_logits(pointwise_prior(4, apply), random_tokens((2, 3, 9)))
    assert seen == [(2, 3, 4)]  # traced once: one batched call


def test_images_do_not_influence_each_other():
    prior, tokens = pointwise_prior(4, mean_apply), random_tokens((3, 7, 6))
    together = run(prior, tokens)
    for index in range(3):
        alone = run(prior, tokens[index : index + 1])[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-6)


def test_a_token_follows_the_windows_that_cover_it():
    prior, tokens = pointwise_prior(4, mean_apply), random_tokens((1, 4, 7))
    logits = run(prior, tokens)
    left, right = (
        jax.nn.log_softmax(prior.params[tokens[0, :, c : c + 4]].mean((0, 1))) for c in (0, 3)
    )
    assert window_starts(7, 4) == (0, 3)
    np.testing.assert_allclose(logits[0, :, :3], np.broadcast_to(left, (4, 3, K)), atol=1e-5)
    np.testing.assert_allclose(logits[0, :, 4:], np.broadcast_to(right, (4, 3, K)), atol=1e-5)
    np.testing.assert_allclose(logits[0, 0, 3], (left + right) / 2, atol=1e-5)


def test_transformer_prior_over_a_large_field():
    config = TransformerConfig(
        vocab_size=K + 1,
        num_outputs=K,
        width=8,
        num_layers=1,
        num_heads=1,
        mlp_width=8,
        rope_axes=2,
    )
    init = jax.jit(lambda key: init_transformer_params(key, config))
    prior = make_prior(config, init(jax.random.key(0)), window=4)
    tokens = random_tokens((2, 6, 9))
    logits = run(prior, tokens)
    assert logits.shape == (2, 6, 9, K) and logits.dtype == jnp.float32
    # A corner token is seen by one window only, and its surroundings decide its logits.
    corner = jax.nn.log_softmax(run(prior, tokens[:, :4, :4]))
    np.testing.assert_allclose(logits[:, 0, 0], corner[:, 0, 0], atol=1e-5)


def test_unconditional_logits():
    prior, tokens = pointwise_prior(4), random_tokens((1, 5, 5))
    with pytest.raises(ValueError, match="no unconditional form"):
        prior_logits(prior, tokens, is_unconditional=True)
    both = prior.replace(apply_unconditional=constant_apply, params=jnp.zeros((K + 1, K)))
    both = both.replace(params=jnp.arange(K, dtype=jnp.float32))
    plain = run(both, tokens, is_unconditional=True)
    np.testing.assert_allclose(plain[0, 0, 0], jax.nn.log_softmax(both.params), atol=1e-5)


@pytest.mark.parametrize(
    ("image", "stride", "shape"),
    [
        ((64, 64), 4, (16, 16)),
        ((65, 63), 4, (17, 16)),
        ((1, 3), 4, (1, 1)),
        ((512, 768), 16, (32, 48)),
    ],
)
def test_field_shape_covers_the_image(image, stride, shape):
    assert patch_codec().replace(stride=stride).grid(image) == shape


def test_field_shape_refuses_nothing_sized_images():
    with pytest.raises(ValueError, match="positive sizes"):
        patch_codec().grid((0, 4))
