import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.prior.attention import attend, grid_positions, rotary_angles, rotate
from aps_jax.prior.bundle import make_prior, make_prompted_prior
from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import (
    Transformer,
    TransformerConfig,
    init_transformer_params,
    num_params,
)

SEQUENCE = TransformerConfig(
    vocab_size=23,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=20,
    qkv_bias=True,
    rope_theta=100.0,
)
GRID = TransformerConfig(
    vocab_size=17,
    num_outputs=16,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_width=24,
    rope_axes=2,
    rope_theta=100.0,
)
LLADA_8B = TransformerConfig(
    vocab_size=126464,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=12288,
    rope_theta=500000.0,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
MMADA_8B = dataclasses.replace(LLADA_8B, vocab_size=134656)
DREAM_7B = TransformerConfig(
    vocab_size=152064,
    width=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    mlp_width=18944,
    qkv_bias=True,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_in_float32=False,
    shift_logits=True,
)


init = jax.jit(init_transformer_params, static_argnums=1)


def random_params(config, seed=0):
    """Initial weights, perturbed so that no norm, bias or embedding is trivial."""
    rng = np.random.default_rng(seed)
    params = jax.device_get(init(jax.random.key(seed), config))
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)


def random_ids(config, shape):
    return np.random.default_rng(2).integers(0, config.vocab_size, shape).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def apply(config, params, ids, positions=None, mask=None):
    return Transformer(config).apply({"params": params}, ids, positions, mask)


@jax.jit
def run(prior, tokens):
    return prior.apply(prior.params, tokens)


@jax.jit
def run_unconditional(prior, tokens):
    return prior.apply_unconditional(prior.params, tokens)


def reference(config, params, ids, mask=None, *, is_interleaved=False, is_causal=False):
    """The LLaMA-family forward pass in float64, one head and one layer at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    ids = np.asarray(ids)
    length, size = ids.shape[1], config.head_size

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(x):
        half = size // 2
        angle = np.arange(length)[:, None] * config.rope_theta ** (-2 * np.arange(half) / size)
        cos, sin = np.cos(angle), np.sin(angle)
        if is_interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = p["embed"]["embedding"][ids]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        h = norm(x, w["attn_norm"]["scale"])
        q, k, v = (h @ w[name]["kernel"] + w[name].get("bias", 0.0) for name in ("q", "k", "v"))
        heads = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.kv_heads)
            one, other = (
                slice(head * size, (head + 1) * size),
                slice(shared * size, (shared + 1) * size),
            )
            scores = turn(q[..., one]) @ turn(k[..., other]).swapaxes(1, 2) / np.sqrt(size)
            if is_causal:
                scores = np.where(np.tril(np.ones((length, length), bool)), scores, -1e30)
            if mask is not None:
                scores = np.where(mask, scores, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., other])
        x = x + np.concatenate(heads, -1) @ w["attn_out"]["kernel"]
        h = norm(x, w["ff_norm"]["scale"])
        gate = h @ w["ff_proj"]["kernel"]
        gated = gate / (1 + np.exp(-gate)) * (h @ w["up_proj"]["kernel"])
        x = x + gated @ w["ff_out"]["kernel"]
    return norm(x, p["ln_f"]["scale"]) @ p["head"]["kernel"]


@pytest.fixture(scope="module")
def sequence():
    params, ids = random_params(SEQUENCE), random_ids(SEQUENCE, (2, 11))
    return params, ids, np.asarray(apply(SEQUENCE, params, ids))


def test_parity_with_float64_reference(sequence):
    params, ids, logits = sequence
    expected = reference(SEQUENCE, params, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


def test_reference_tells_the_usual_mistakes_apart(sequence):
    params, ids, logits = sequence
    for mistake in ("is_interleaved", "is_causal"):
        wrong = reference(SEQUENCE, params, ids, **{mistake: True})
        assert np.abs(wrong - logits).max() > 0.05, mistake


def test_parity_with_mask_and_rows_that_see_nothing(sequence):
    params, ids, _ = sequence
    valid = np.ones((2, 11), bool)
    valid[0, :3] = False
    mask = valid[:, :, None] & valid[:, None, :]
    logits = np.asarray(apply(SEQUENCE, params, ids, mask=jnp.asarray(mask)))
    assert np.isfinite(logits).all()
    expected = reference(SEQUENCE, params, ids, mask)  # its empty rows are uniform as well
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


def test_masked_left_pads_may_be_dropped(sequence):
    params, ids, _ = sequence
    valid = jnp.arange(11) >= 4
    mask = jnp.broadcast_to(valid[:, None] & valid[None, :], (2, 11, 11))
    padded = apply(SEQUENCE, params, ids, mask=mask)[:, 4:]
    np.testing.assert_allclose(padded, apply(SEQUENCE, params, ids[:, 4:]), atol=5e-5)


def test_gradient_is_finite_under_an_empty_mask(sequence):
    params, ids, _ = sequence
    empty = jnp.zeros((2, 11, 11), bool)
    grads = jax.jit(jax.grad(lambda p: apply(SEQUENCE, p, ids, mask=empty).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_equals_jax_attention(kv_heads):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 7, 4, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 7, kv_heads, 8)).astype(np.float32)
    mask = rng.random((2, 7, 7)) < 0.6
    mask[0, 2] = False
    for chosen in (None, mask):
        heads_mask = None if chosen is None else chosen[:, None]
        expected = jax.nn.dot_product_attention(query, key, value, mask=heads_mask)
        mixed = jax.jit(attend)(query, key, value, chosen)
        np.testing.assert_allclose(mixed, expected, atol=1e-6)


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": 2}, {"attention": "xla"}])
def test_execution_options_change_nothing(sequence, change):
    params, ids, _ = sequence

    def loss(params, config):
        return jnp.sum(jax.nn.log_softmax(apply(config, params, ids)) ** 2)

    config = dataclasses.replace(SEQUENCE, **change)
    shapes = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_grads = value_and_grad(params, SEQUENCE)
    other, other_grads = value_and_grad(params, config)
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max()),
        plain_grads,
        other_grads,
    )


def test_bfloat16_activations_give_float32_logits(sequence):
    params, ids, logits = sequence
    low = apply(dataclasses.replace(SEQUENCE, dtype="bfloat16"), params, ids)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(low - logits).max() < 0.1 * np.abs(logits).max()
    rough = dataclasses.replace(SEQUENCE, dtype="bfloat16", rope_in_float32=False)
    assert not np.array_equal(apply(rough, params, ids), low)
    assert apply(rough, params, ids).dtype == jnp.float32


def test_shift_logits_moves_predictions_one_to_the_right(sequence):
    params, ids, logits = sequence
    shifted = apply(dataclasses.replace(SEQUENCE, shift_logits=True), params, ids)
    np.testing.assert_array_equal(shifted[:, 1:], logits[:, :-1])
    np.testing.assert_array_equal(shifted[:, 0], logits[:, 0])


def test_tied_embeddings_reuse_the_embedding():
    config = dataclasses.replace(SEQUENCE, tie_embeddings=True)
    params, ids = random_params(config), random_ids(config, (1, 5))
    assert "head" not in params
    untied = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    np.testing.assert_allclose(
        apply(config, params, ids), apply(SEQUENCE, untied, ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "count"),
    [(LLADA_8B, 8_015_581_184), (MMADA_8B, 8_082_690_048), (DREAM_7B, 7_615_616_512)],
)
def test_parameter_counts_of_public_models(config, count):
    shapes = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    assert num_params(shapes) == count
    assert shapes["blocks"]["ff_proj"]["kernel"].shape == (
        config.num_layers,
        config.width,
        config.mlp_width,
    )


def test_grid_attention_depends_on_relative_positions_only():
    angles = rotary_angles(grid_positions(4, 5), GRID)
    moved = rotary_angles(grid_positions(4, 5) + jnp.array([[3, 7]]), GRID)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 20, 2, 8)).astype(np.float32)

    @jax.jit
    def scores(angles):
        return jnp.einsum("bqhd,bkhd->bhqk", rotate(query, angles), rotate(key, angles))

    np.testing.assert_allclose(scores(moved), scores(angles), atol=1e-5)
    swapped = rotary_angles(grid_positions(4, 5)[:, ::-1], GRID)
    assert np.abs(scores(swapped) - scores(angles)).max() > 0.1


def test_grid_prior_sees_rows_and_columns():
    params = random_params(GRID)
    prior = make_prior(GRID, params, window=6)
    tokens = jax.random.randint(jax.random.key(3), (2, 3, 4), 0, 16)
    logits = run(prior, tokens)
    assert logits.shape == (2, 3, 4, 16) and logits.dtype == jnp.float32
    assert (prior.num_codes, prior.window) == (16, 6)
    # Row-major order: the same sequence laid out as 4 x 3 means something else.
    other = run(prior, tokens.reshape(2, 4, 3)).reshape(logits.shape)
    assert np.abs(other - logits).max() > 1e-2
    masked = run(prior, tokens.at[:, 1, 2].set(16))
    assert np.abs(masked - logits).max() > 1e-3


@pytest.mark.parametrize("rank", [0, 3])
def test_code_embedding_is_linear_in_bits_and_keeps_the_mask_apart(rank):
    config = dataclasses.replace(GRID, code_bits=4, code_rank=rank)
    params = random_params(config)
    embed = params["embed"]
    assert embed["project"]["kernel"].shape == (4 + rank, 16)
    assert embed["special"].shape == (1, 16)
    prior = make_prior(config, params)
    tokens = jnp.arange(17)[None, :, None]
    assert run(prior, tokens).shape == (1, 17, 1, 16)

    def hidden(ids):
        def method(module, ids):
            return module.embed(ids)

        return Transformer(config).apply({"params": params}, ids, method=method)[0]

    rows = hidden(jnp.array([[0b0000, 0b0110, 0b1001, 0b1111, 16]]))
    np.testing.assert_allclose(rows[4], embed["special"][0], rtol=1e-6)
    if rank == 0:  # opposite bits, opposite embeddings
        np.testing.assert_allclose(rows[0], -rows[3], atol=1e-6)
        np.testing.assert_allclose(rows[1], -rows[2], atol=1e-6)
    else:
        assert np.abs(rows[0] + rows[3]).max() > 0.1


PROMPTED = PromptConfig(num_codes=8, image_offset=10, mask_token_id=20, begin_id=18, end_id=19)
PADDED = dataclasses.replace(PROMPTED, pad_token_id=22)


def test_prompted_prior_equals_slicing_the_whole_sequence(sequence):
    params, _, _ = sequence
    prompt = jnp.array([22, 22, 1, 2, 3])
    uncond = jnp.array([1, 2])
    prior = make_prompted_prior(
        SEQUENCE, params, prompt=PADDED, prompt_ids=prompt, uncond_prompt_ids=uncond
    )
    tokens = jnp.array([[[0, 8, 2], [7, 8, 8]], [[8, 8, 8], [1, 1, 5]]])
    flat = np.asarray(tokens.reshape(2, 6))
    image = np.where(flat == 8, 20, flat + 10)
    for call, ids in ((run, prompt), (run_unconditional, uncond)):
        ids, start = np.asarray(ids), len(ids) + 1
        rows = np.stack([np.concatenate([ids, [18], row, [19]]) for row in image])
        valid = rows != 22
        mask = valid[:, :, None] & valid[:, None, :]
        full = reference(SEQUENCE, params, rows, mask)
        expected = full[:, start : start + 6, 10:18].reshape(2, 2, 3, 8)
        logits = call(prior, tokens)
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(full).max())


def test_prompted_prior_takes_one_prompt_per_image_and_visible_pads(sequence):
    params, _, _ = sequence
    prompts = jnp.array([[22, 4, 5], [6, 7, 8]])
    tokens = jnp.full((2, 2, 2), 8)
    build = dict(config=SEQUENCE, params=params, prompt=PADDED)
    both = make_prompted_prior(prompt_ids=prompts, **build)
    logits = run(both, tokens)
    for index in range(2):
        one = make_prompted_prior(prompt_ids=prompts[index], **build)
        alone = run(one, tokens[index : index + 1])[0]
        np.testing.assert_allclose(alone, logits[index], atol=1e-5)
    visible = make_prompted_prior(prompt_ids=prompts, mask_padding=False, **build)
    changed = np.abs(run(visible, tokens) - logits).max(axis=(1, 2, 3))
    assert changed[0] > 1e-3 and changed[1] < 1e-5
    assert visible.apply_unconditional is None


ALIGNED = TransformerConfig(
    vocab_size=12, num_outputs=8, width=16, num_layers=2, num_heads=2, mlp_width=16, rope_axes=2,
    rope_theta=100.0, absolute_side=3, code_bits=3, code_rank=2,
)  # fmt: skip
WORDS = PromptConfig(num_codes=8, mask_token_id=8, pad_token_id=9, begin_id=10, length=4)


def test_absolute_positions_tell_cells_apart_where_all_is_masked():
    params = random_params(ALIGNED)
    relative = dataclasses.replace(ALIGNED, absolute_side=None, vocab_size=9)
    cells = {"cells": params["cells"]}
    others = {name: params[name] for name in params.keys() - cells.keys()}
    others["embed"] = others["embed"] | {"special": others["embed"]["special"][:1]}
    masked = jnp.full((1, 3, 3), 8)
    # A softmax over equal values is blind to where they are.
    blind = run(make_prior(relative, others), masked)[0].reshape(9, 8)
    np.testing.assert_allclose(blind, np.broadcast_to(blind[:1], (9, 8)), atol=1e-5)
    logits = run(make_prior(dataclasses.replace(ALIGNED, vocab_size=9), others | cells), masked)
    spread = np.ptp(logits[0].reshape(9, 8), axis=0)
    assert spread.max() > 1e-2
    with pytest.raises(ValueError, match="whole pictures of 3x3 tokens.*got 3x4 tokens: resize"):
        make_prior(dataclasses.replace(ALIGNED, vocab_size=9), others | cells).apply(
            others | cells, jnp.full((1, 3, 4), 8)
        )


def test_prompts_of_a_grid_model_lie_above_it_and_pads_change_nothing():
    """Any number of hidden pads and an empty prompt; rows and columns of the image stay."""
    params = random_params(ALIGNED)
    tokens = jnp.array([[[0, 8, 2], [7, 8, 8], [1, 1, 5]]])
    build = dict(config=ALIGNED, params=params, prompt=WORDS)
    logits = [
        run(make_prompted_prior(prompt_ids=jnp.array(ids, jnp.int32), **build), tokens)
        for ids in ([11], [9, 9, 11], [9], [])
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    np.testing.assert_allclose(logits[2], logits[3], atol=1e-5)
    assert np.abs(logits[0] - logits[3]).max() > 1e-3


def test_new_prompts_and_weights_do_not_recompile(sequence):
    params, _, _ = sequence
    tokens = jnp.full((1, 2, 2), 8)
    traces = []

    @jax.jit
    def traced(prior):
        traces.append(None)
        return prior.apply(prior.params, tokens)

    for scale, prompt in ((1.0, [1, 2]), (1.1, [3, 4])):
        weights = jax.tree.map(lambda x, scale=scale: x * scale, params)
        ids = jnp.array(prompt)
        prior = make_prompted_prior(SEQUENCE, weights, prompt=PROMPTED, prompt_ids=ids)
        traced(prior)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5, "head_dim": None}, "does not divide width"),
        ({"num_kv_heads": 3}, "does not divide 4 heads"),
        ({"rope_axes": 3}, "rope_axes"),
        ({"head_dim": 6, "rope_axes": 2}, "multiple of 4"),
        ({"absolute_side": 4}, "needs rope_axes=2"),
        ({"attention": "flash"}, "attention must be"),
        ({"code_bits": 5}, "exceed vocab_size"),
        ({"tie_embeddings": True, "num_outputs": 4}, "tie_embeddings"),
        ({"block": "gpt"}, "block must be llama or phi"),
        ({"rope_dim": 3}, "rope_dim=3 is not a multiple of 2"),
        ({"rope_dim": 10}, "up to the head dimension 8"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SEQUENCE, **change)


def test_bad_priors_are_refused(sequence):
    params, ids, _ = sequence
    with pytest.raises(ValueError, match="head has 9 columns"):
        make_prior(dataclasses.replace(GRID, num_outputs=9), params)
    with pytest.raises(ValueError, match="image ids end at 24"):
        beyond = dataclasses.replace(PROMPTED, image_offset=16)
        make_prompted_prior(SEQUENCE, params, prompt=beyond, prompt_ids=ids[0])
    with pytest.raises(ValueError, match="positions need shape"):
        apply(GRID, params, ids)
