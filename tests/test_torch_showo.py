"""A converted Show-o model against Phi in PyTorch, which is run on whole padded sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub import random_state, save_single
from test_convert_showo import CONFIG, run, tensor_shapes

from aps_jax import pretrained

pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
pytest.importorskip("transformers", reason="needs pip install transformers")
from torch_showo import logits_of, make_oracle  # noqa: E402 (needs torch)

TOLERANCE = 2e-5
PAD, T2I, BOS, EOS, SOI, EOI, MASK = 50295, 50300, 50256, 50256, 50296, 50297, 58497
LENGTH = 12
TEXTS = ([17, 4, 99], [5])


@pytest.fixture(scope="module")
def state():
    return random_state(tensor_shapes(), seed=5)


@pytest.fixture(scope="module")
def tokens():
    tokens = np.random.default_rng(2).integers(0, 8192, (2, 3, 4))
    tokens[:, 1:] = 8192
    return tokens


@pytest.fixture(scope="module")
def prior(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("showo")
    save_single(folder / "hub", state, CONFIG, stem="pytorch_model")
    assert run(folder / "hub", folder / "model", "--verify") == 0
    return pretrained.load_prior(folder / "model", prompt_ids=TEXTS)


def sequences(tokens, texts, offset=50305):
    """`pads, t2i, bos, text, eos | soi, image, eoi`, the prompt always of `LENGTH` ids."""
    image = np.where(tokens == 8192, MASK, tokens + offset).reshape(len(tokens), -1)
    rows = []
    for text, row in zip(texts, image, strict=True):
        prompt = [T2I, BOS, *text, EOS]
        rows.append([PAD] * (LENGTH - len(prompt)) + prompt + [SOI, *row, EOI])
    return np.array(rows)


def mixed_mask(ids):
    """Query by query, from the description of the model."""
    mask = np.zeros((*ids.shape, ids.shape[1]), bool)
    for row, line in enumerate(ids):
        start = int((line == PAD).sum())
        for query in range(len(line)):
            if query < start:
                mask[row, query, : query + 1] = True
            elif query < LENGTH:
                mask[row, query, start : query + 1] = True
            else:
                mask[row, query, start:] = True
    return mask


def image_logits(oracle, ids, mask, offset=50305):
    full = logits_of(oracle, ids, mask)
    return full[:, LENGTH + 1 : -1, offset : offset + 8192].reshape(2, 3, 4, 8192)


def error(got, expected):
    """Largest difference relative to the largest value."""
    assert got.shape == expected.shape and expected.std() > 0.05 * np.abs(expected).max()
    return np.abs(got - expected).max() / np.abs(expected).max()


def test_image_prior_with_and_without_the_prompt(state, prior, tokens):
    oracle = make_oracle(state)
    for apply, texts in ((prior.apply, TEXTS), (prior.apply_unconditional, ([], []))):
        ids = sequences(tokens, texts)
        expected = image_logits(oracle, ids, mixed_mask(ids))
        assert error(jax.jit(apply)(prior.params, jnp.asarray(tokens)), expected) < TOLERANCE


def interleaved(state, size=8, head=16):
    """Weights whose numbers 2i and 2i + 1 of each head turn together, instead of i and i + R/2."""
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2), np.arange(size, head)])
    moved = {}
    for name, value in state.items():
        if any(part in name for part in ("q_layernorm", "k_layernorm")):
            value = value[order]
        elif any(part in name for part in ("q_proj", "k_proj")):
            value = value.reshape(-1, head, *value.shape[1:])[:, order].reshape(value.shape)
        moved[name] = value
    return moved


def test_the_usual_mistakes_would_show(state, prior, tokens):
    oracle = make_oracle(state)
    ids = sequences(tokens, TEXTS)
    mask = mixed_mask(ids)
    got = np.asarray(jax.jit(prior.apply)(prior.params, jnp.asarray(tokens)))
    assert error(got, image_logits(oracle, ids, mask)) < TOLERANCE
    causal = mask & np.tril(np.ones(mask.shape[1:], bool))
    seen = np.ones_like(mask)
    wrong = {
        "causal image rows": image_logits(oracle, ids, causal),
        "text that sees the image": image_logits(oracle, ids, seen & (ids != PAD)[:, None]),
        "visible pads": image_logits(oracle, ids, np.tril(seen) | mask),
        "a mask of zeros and ones": image_logits(oracle, ids, mask.astype(np.float32)),
        "no norm of queries and keys": image_logits(
            make_oracle(state, qk_layernorm=False), ids, mask
        ),
        "interleaved rotation": image_logits(make_oracle(interleaved(state)), ids, mask),
        "another offset": image_logits(oracle, sequences(tokens, TEXTS, 50295), mask, 50295),
    }
    for mistake, logits in wrong.items():
        assert error(got, logits) > 1e-3, mistake
