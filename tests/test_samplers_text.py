"""Text sampling: its law on an exact toy, and a tiny model with Dream's shifted logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conftest import random_params

from aps_jax.prior.bundle import make_prompted_prior
from aps_jax.prior.prompts import PromptConfig, frame_prompt
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.text.sampling import TextConfig, sample_text

sample = jax.jit(sample_text, static_argnames=("length", "batch", "config"))

#: Dream in small: shared keys, biases, shifted logits.
MODEL = TransformerConfig(
    vocab_size=23,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=16,
    qkv_bias=True,
    rope_in_float32=False,
    shift_logits=True,
)
MASK = 22
FRAME = PromptConfig(num_codes=23, mask_token_id=MASK, mask_uncond=True)
PROMPT = [3, 4, 9]


@pytest.fixture(scope="module")
def prior():
    params = random_params(init_transformer_params, MODEL, seed=4)
    framed, bare = frame_prompt(FRAME, PROMPT)
    return make_prompted_prior(
        MODEL, params, prompt=FRAME, prompt_ids=framed, uncond_prompt_ids=bare
    )


@pytest.mark.slow
def test_one_token_at_a_time_is_exact():
    joint = toy.skewed_joint()
    config = TextConfig(num_steps=3, reveal="random", num_samples=4000)
    tokens = sample(toy.make_params(joint).prior, jax.random.key(0), length=3, config=config)
    assert toy.chi_square_p(np.asarray(tokens), joint) > 1e-3


def test_left_to_right_blocks_are_exact_too():
    """Blocks of one token are the chain rule; all at once would be a product of marginals."""
    joint = toy.skewed_joint()
    prior = toy.make_params(joint).prior
    config = TextConfig(num_steps=1, block_length=1, num_samples=4000)
    tokens = sample(prior, jax.random.key(1), length=3, config=config)
    assert toy.chi_square_p(np.asarray(tokens), joint) > 1e-3
    at_once = dataclasses.replace(config, block_length=None)
    tokens = sample(prior, jax.random.key(1), length=3, config=at_once)
    assert toy.chi_square_p(np.asarray(tokens), joint) < 1e-3


def test_nothing_stays_masked_and_what_is_known_is_kept(prior):
    known = np.full((2, 8), 23)
    known[0, 2], known[1, :3] = 7, (1, 2, 3)
    config = TextConfig(num_steps=2, block_length=4, num_samples=2, guidance_scale=0.5)
    tokens = np.asarray(
        sample(prior, jax.random.key(0), length=8, batch=2, config=config, known_tokens=known)
    )
    assert tokens.shape == (4, 8) and tokens.dtype == np.int32
    assert ((tokens >= 0) & (tokens < 23) & (tokens != MASK)).all()
    is_known = np.tile(known < 23, (2, 1))
    np.testing.assert_array_equal(tokens[is_known], np.tile(known, (2, 1))[is_known])
    assert (tokens[0] != tokens[2]).any()  # samples differ


def greedy(prior, length):
    """The likeliest of all tokens, one at a time, by calls of the prior on the whole text."""
    apply = jax.jit(prior.apply)
    tokens = np.full((1, 1, length), 23)
    for _ in range(length):
        logits = np.asarray(apply(prior.params, jnp.asarray(tokens)))[0, 0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        log_probs[tokens[0, 0] < 23] = -np.inf
        place, code = np.unravel_index(log_probs.argmax(), log_probs.shape)
        tokens[0, 0, place] = code
    return tokens[0, 0]


def test_greedy_writes_the_most_confident_token_first(prior):
    config = TextConfig(num_steps=6, top_p=0.0)
    for seed in (0, 1):  # no randomness is left
        tokens = sample(prior, jax.random.key(seed), length=6, config=config)
        np.testing.assert_array_equal(tokens[0], greedy(prior, 6))


def test_arguments_that_do_not_fit(prior):
    config = TextConfig(num_steps=1, block_length=4)
    with pytest.raises(ValueError, match="positive multiple of block_length 4, got 6"):
        sample_text(prior, jax.random.key(0), length=6, config=config)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); this field needs \(1, 4\)"):
        sample_text(
            prior, jax.random.key(0), length=4, config=config, known_tokens=jnp.zeros((1, 3))
        )
    with pytest.raises(ValueError, match="block_length must be"):
        TextConfig(block_length=0)
    with pytest.raises(ValueError, match="top_p must be"):
        TextConfig(top_p=1.5)
