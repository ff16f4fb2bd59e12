"""Frames, pads and layouts of prompts, and what the models see of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from aps_jax.prior.bundle import make_prompted_prior
from aps_jax.prior.prompts import (
    PromptConfig,
    attention_mask,
    frame_prompt,
    frame_understanding,
    sequence_ids,
)
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from convert import llada, showo

PAD = 22
FRAME = PromptConfig(
    num_codes=8,
    image_offset=10,
    mask_token_id=20,
    begin_id=18,
    end_id=19,
    prefix=(21, 1),
    suffix=(2,),
    pad_token_id=PAD,
    length=9,
)
CAUSAL = dataclasses.replace(FRAME, is_causal=True)
CONFIG = TransformerConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=2, mlp_width=16, rope_theta=100.0
)
PHI = dataclasses.replace(CONFIG, block="phi", rope_dim=4)


def test_frame_of_one_prompt():
    whole, bare = frame_prompt(FRAME, [5, 6])
    np.testing.assert_array_equal(whole, [21, 1, 5, 6, 2])
    np.testing.assert_array_equal(bare, [21, 1, 2])
    whole, bare = frame_prompt(FRAME, [5, 6], mask_padding=False)
    np.testing.assert_array_equal(whole, [PAD] * 4 + [21, 1, 5, 6, 2])
    np.testing.assert_array_equal(bare, [PAD] * 6 + [21, 1, 2])
    np.testing.assert_array_equal(frame_prompt(FRAME, ())[0], [21, 1, 2])


def test_prompts_of_different_lengths_are_filled_on_the_left():
    whole, bare = frame_prompt(FRAME, [[5], [6, 7, 8]])
    np.testing.assert_array_equal(whole, [[PAD, PAD, 21, 1, 5, 2], [21, 1, 6, 7, 8, 2]])
    np.testing.assert_array_equal(bare, [[21, 1, 2]] * 2)
    assert frame_prompt(FRAME, [[5], [6, 7, 8]], mask_padding=False)[0].shape == (2, 9)


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match="has 7 text ids; this model takes at most 6: shorten it"):
        frame_prompt(FRAME, range(7))
    assert frame_prompt(FRAME, range(6))[0].shape == (9,)
    with pytest.raises(ValueError, match="different lengths need a pad id"):
        frame_prompt(llada.TEXT_PROMPT, [[1], [2, 3]])
    with pytest.raises(ValueError, match="2 prompts, which do not fit 3 images"):
        sequence_ids(FRAME, jnp.ones((2, 4), jnp.int32), jnp.zeros((3, 2, 2), jnp.int32))


def test_text_models_hide_the_prompt_behind_masks():
    whole, bare = frame_prompt(llada.TEXT_PROMPT, [[5, 6], [7, 8]])
    np.testing.assert_array_equal(whole, [[5, 6], [7, 8]])
    np.testing.assert_array_equal(bare, np.full((2, 2), 126336))


@pytest.mark.parametrize(
    ("prompt", "side", "length"),
    [
        (llada.IMAGE_PROMPT, 16, 771),
        (llada.IMAGE_PROMPT, 32, 1539),
        (showo.PROMPT, 16, 387),
        (showo.PROMPT, 32, 1155),
    ],
)
def test_layouts_at_256_and_512_pixels(prompt, side, length):
    """Sequences of the published code, pads included, for stride 16."""
    tokens = np.arange(side * side, dtype=np.int32).reshape(1, side, side)
    tokens[0, 0, 3] = prompt.num_codes
    framed, bare = frame_prompt(prompt, [7, 8], mask_padding=False)
    for prompt_ids in (framed, bare):
        ids, first = sequence_ids(prompt, jnp.asarray(prompt_ids), jnp.asarray(tokens))
        ids = np.asarray(ids)
        assert ids.shape == (1, length)
        assert first == length - 1 - side * side == prompt.length + 1
        assert (ids[0, first - 1], ids[0, -1]) == (prompt.begin_id, prompt.end_id)
        assert ids[0, first + 3] == prompt.mask_token_id
        # The token of row 1, column 0 comes right after the first row.
        assert ids[0, first + side] == prompt.image_offset + side
        assert ids[0, 0] == prompt.pad_token_id
    trimmed, _ = frame_prompt(prompt, [7, 8])
    assert sequence_ids(prompt, jnp.asarray(trimmed), jnp.asarray(tokens))[0].shape == (
        1,
        len(prompt.prefix) + 2 + len(prompt.suffix) + side * side + 2,
    )


@pytest.mark.parametrize("side", [16, 32])
def test_priors_keep_the_grid(side):
    prior = make_prompted_prior(
        CONFIG,
        jax.eval_shape(lambda: random_params(init_transformer_params, CONFIG)),
        prompt=FRAME,
        prompt_ids=[1, 2],
        window=side,
    )
    tokens = jax.ShapeDtypeStruct((2, side, side), "int32")
    assert jax.eval_shape(prior.apply, prior.params, tokens).shape == (2, side, side, 8)


def test_ids_of_the_published_models():
    prompt = llada.IMAGE_PROMPT
    ids, _ = sequence_ids(prompt, jnp.asarray([1]), jnp.asarray([[[0, 8191]]]))
    np.testing.assert_array_equal(ids, [[1, 126084, 126349, 134540, 126085]])
    ids, _ = sequence_ids(showo.PROMPT, jnp.asarray([1]), jnp.asarray([[[0, 8191, 8192]]]))
    np.testing.assert_array_equal(ids, [[1, 50296, 50305, 58496, 58497, 50297]])


def test_who_sees_whom_in_showo():
    ids = jnp.asarray(
        [[PAD, PAD, 21, 1, 5, 2, 18, 20, 20, 19], [21, 1, 5, 6, 7, 2, 18, 20, 20, 19]]
    )
    mask = np.asarray(attention_mask(CAUSAL, ids, 6))
    for row, start in ((0, 2), (1, 0)):
        for query in range(10):
            if query < start:
                seen = range(query + 1)  # pads, causally
            elif query < 6:
                seen = range(start, query + 1)  # text, causally and no pads
            else:
                seen = range(start, 10)  # begin, image and end: everything but pads
            assert list(np.flatnonzero(mask[row, query])) == list(seen), (row, query)
    open_mask = np.asarray(attention_mask(CAUSAL, ids, 6, mask_padding=False))
    assert open_mask[0, 4, :5].all() and not open_mask[0, 4, 5:].any() and open_mask[0, 6].all()
    assert attention_mask(FRAME, ids, 6, mask_padding=False) is None


@jax.jit
def run(prior, tokens):
    return prior.apply(prior.params, tokens)


@pytest.mark.parametrize(
    ("config", "prompt"), [(CONFIG, FRAME), pytest.param(PHI, CAUSAL, marks=pytest.mark.slow)]
)
def test_hidden_pads_may_be_left_out_and_visible_ones_may_not(config, prompt):
    params = random_params(init_transformer_params, config)
    tokens = jnp.asarray([[[0, 8, 3], [8, 8, 7]]])
    framed, _ = frame_prompt(prompt, [5, 6])
    filled, _ = frame_prompt(prompt, [5, 6], mask_padding=False)
    build = dict(config=config, params=params, prompt=prompt)
    trimmed = run(make_prompted_prior(prompt_ids=framed, **build), tokens)
    padded = run(make_prompted_prior(prompt_ids=filled, **build), tokens)
    assert np.abs(trimmed).max() > 1
    np.testing.assert_allclose(padded, trimmed, atol=1e-5 * np.abs(trimmed).max())
    visible = make_prompted_prior(prompt_ids=filled, mask_padding=False, **build)
    assert np.abs(run(visible, tokens) - trimmed).max() > 1e-2 * np.abs(trimmed).max()


def test_prompts_repeat_for_every_sample():
    params = random_params(init_transformer_params, CONFIG)
    framed, _ = frame_prompt(FRAME, [[5], [6]])
    prior = make_prompted_prior(CONFIG, params, prompt=FRAME, prompt_ids=framed)
    tokens = jnp.full((4, 1, 2), 8)  # two samples of two images
    logits = run(prior, tokens)
    np.testing.assert_allclose(logits[:2], logits[2:], atol=1e-6)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_an_image_becomes_a_question():
    tokens = [[0, 1], [2, 8191]]
    ids = frame_understanding(llada.IMAGE_PROMPT, tokens, [126080, 5, 6])
    image = [126349, 126350, 126351, 134540]
    np.testing.assert_array_equal(ids, [126089, 126084, *image, 126085, 126080, 5, 6])
    both = frame_understanding(llada.IMAGE_PROMPT, [tokens, tokens], [5])
    assert both.shape == (2, 8)
    with pytest.raises(ValueError, match="does not take images"):
        frame_understanding(showo.PROMPT, tokens, [5])
    with pytest.raises(ValueError, match="none masked"):
        frame_understanding(llada.IMAGE_PROMPT, [[8192]], [5])
