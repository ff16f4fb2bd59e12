"""The parallel block of phi against a float64 forward pass, and what each of its parts changes."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params
from scipy.special import erf

from aps_jax.prior.transformer import Transformer, TransformerConfig, init_transformer_params

CONFIG = TransformerConfig(
    vocab_size=23,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=20,
    block="phi",
    rope_dim=4,
    rope_theta=100.0,
)


def norm(x, w):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]


def linear(x, w):
    return x @ w["kernel"] + w["bias"]


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def turn(x, size):
    """Rotates numbers i and i + size / 2 of the last axis, positions along the one before it."""
    half = size // 2
    angle = np.arange(x.shape[-2])[:, None] * 100.0 ** (-2 * np.arange(half) / size)
    a, b, rest = x[..., :half], x[..., half:size], x[..., size:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def reference(params, ids, mask, *, has_qk_norm=True, is_parallel=True, size=4, gelu=gelu_tanh):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embed"]["embedding"][ids]
    for layer in range(2):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        h = norm(x, w["attn_norm"])
        heads = []
        for head in range(4):
            q, k, v = (
                linear(h, w[name]).reshape(*ids.shape, -1, 8)[:, :, index]
                for name, index in (("q", head), ("k", head // 2), ("v", head // 2))
            )
            if has_qk_norm:
                q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
            scores = turn(q, size) @ turn(k, size).swapaxes(1, 2) / np.sqrt(8)
            weights = np.exp(np.where(mask, scores, -np.inf))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        attended = linear(np.concatenate(heads, -1), w["attn_out"])
        if not is_parallel:
            h = norm(x + attended, w["attn_norm"])
        x = x + attended + linear(gelu(linear(h, w["ff_in"])), w["ff_out"])
    return linear(norm(x, p["ln_f"]), p["head"])


@pytest.fixture(scope="module")
def case():
    params = random_params(init_transformer_params, CONFIG)
    ids = np.random.default_rng(2).integers(0, 23, (2, 7))
    mask = np.tril(np.ones((2, 7, 7), bool)) | (np.arange(7) > 4)[:, None]
    logits = jax.jit(lambda params: Transformer(CONFIG).apply({"params": params}, ids, None, mask))
    return params, ids, mask, np.asarray(logits(params))


def test_parity_with_float64_reference(case):
    params, ids, mask, logits = case
    expected = reference(params, ids, mask)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "mistake",
    [{"has_qk_norm": False}, {"is_parallel": False}, {"size": 8}, {"gelu": gelu_exact}],
    ids=lambda mistake: next(iter(mistake)),
)
def test_reference_tells_the_usual_mistakes_apart(case, mistake):
    params, ids, mask, logits = case
    wrong = reference(params, ids, mask, **mistake)
    assert np.abs(wrong - logits).max() > 5e-5 * np.abs(logits).max()


def test_columns_of_the_head_have_their_biases(case):
    params, ids, mask, logits = case
    model = Transformer(CONFIG)

    @jax.jit
    def columns(params):
        hidden = model.apply({"params": params}, ids, None, mask, method="hidden")
        return model.apply({"params": params}, hidden, (5, 9), method="logits")

    some = columns(params)
    np.testing.assert_allclose(some, logits[..., 5:9], atol=1e-5)


def test_parameters_of_the_published_size():
    config = dataclasses.replace(
        CONFIG, vocab_size=58498, width=2048, num_layers=24, num_heads=32, num_kv_heads=None,
        head_dim=64, mlp_width=8192, rope_dim=32,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_448_176_770
