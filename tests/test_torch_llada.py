"""Converted LLaDA and MMaDA models against PyTorch: same logits, for text and for images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert_llada import CONFIG, LLADA_ROWS, MMADA_CONFIG, MMADA_ROWS, make_state, run

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import Transformer, TransformerConfig

torch = pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
import torch_llada  # noqa: E402 (needs torch)
from hub import save_config  # noqa: E402

TOLERANCE = 2e-5
MASK, PAD = 126336, 126093


def make_oracle(rows, config):
    oracle = torch_llada.Llada(config, rows)
    state = make_state(rows, seed=5)
    oracle.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return oracle.eval()


def convert(folder, oracle, config):
    torch.save(oracle.state_dict(), folder / "pytorch_model.bin")
    save_config(folder, config)
    assert run(folder, folder / "model", "--dtype", "float32", "--verify") == 0
    return folder / "model"


@pytest.fixture(scope="module")
def mmada():
    return make_oracle(MMADA_ROWS, MMADA_CONFIG)


@pytest.fixture(scope="module")
def mmada_folder(mmada, tmp_path_factory):
    return convert(tmp_path_factory.mktemp("mmada"), mmada, MMADA_CONFIG)


@torch.no_grad()
def logits_of(oracle, ids, mask=None):
    mask = None if mask is None else torch.tensor(np.asarray(mask))
    return oracle(torch.tensor(np.asarray(ids)), mask).numpy()


def error(got, expected):
    """Largest difference relative to the largest value."""
    assert got.shape == expected.shape and expected.std() > 0.05 * np.abs(expected).max()
    return np.abs(got - expected).max() / np.abs(expected).max()


def transformer(folder):
    """`(ids, mask) -> logits` of all positions and ids."""
    card = checkpoint.read_card(folder)
    config = TransformerConfig(**card["prior"])
    weights = {"params": pretrained.load_prior(folder).params["model"]}
    return jax.jit(lambda ids, mask: Transformer(config).apply(weights, ids, None, mask))


def test_all_logits_of_a_padded_batch(mmada, mmada_folder):
    """Rows of pads see nothing at all: they must average, as with a finite minimum, not be NaN."""
    ids = np.random.default_rng(0).integers(0, MMADA_ROWS, (2, 12))
    ids[1, :5] = PAD
    valid = ids != PAD
    mask = valid[:, :, None] & valid[:, None, :]
    assert not mask[1, 2].any()
    apply = transformer(mmada_folder)
    expected = logits_of(mmada, ids, mask)
    assert error(apply(ids, mask), expected) < TOLERANCE
    assert error(apply(ids, None), logits_of(mmada, ids)) < TOLERANCE
    causal = np.tril(np.ones((2, 12, 12), bool))
    assert error(logits_of(mmada, ids, causal), logits_of(mmada, ids)) > 0.01
    # Zeros and ones that are added to the scores are no mask.
    assert error(logits_of(mmada, ids, mask.astype(np.float32)), expected) > 0.01


def test_interleaved_rotation_would_show(mmada):
    ids = np.random.default_rng(1).integers(0, MMADA_ROWS, (1, 12))
    right = logits_of(mmada, ids)
    mmada.rotary.is_interleaved = True
    try:
        assert error(logits_of(mmada, ids), right) > 0.01
    finally:
        mmada.rotary.is_interleaved = False


def image_sequence(tokens, prompt, offset=126349):
    """`prompt | soi, image, eoi` as the published code lays it out."""
    flat = tokens.reshape(tokens.shape[0], -1)
    ids = np.where(flat == 8192, MASK, flat + offset)
    rows = [np.concatenate([prompt, [126084], row, [126085]]) for row in ids]
    return np.stack(rows)


@pytest.fixture(scope="module")
def tokens():
    tokens = np.random.default_rng(2).integers(0, 8192, (2, 3, 4))
    tokens[:, 1:] = 8192
    return tokens


def test_image_prior_of_mmada(mmada, mmada_folder, tokens):
    prior = pretrained.load_prior(mmada_folder, prompt_ids=[17, 4, 99])
    prompts = [126088, 126080, 17, 4, 99, 126081], [126088, 126080, 126081]
    for apply, prompt in zip((prior.apply, prior.apply_unconditional), prompts, strict=True):
        full = logits_of(mmada, image_sequence(tokens, prompt))
        expected = full[:, -13:-1, 126349:134541].reshape(2, 3, 4, 8192)
        assert error(jax.jit(apply)(prior.params, jnp.asarray(tokens)), expected) < TOLERANCE


def test_left_pads_may_be_dropped(mmada, mmada_folder, tokens):
    """The published code pads to a fixed length; masked pads change nothing but the cost."""
    prior = pretrained.load_prior(mmada_folder, prompt_ids=[17, 4, 99])
    padded = [PAD] * 5 + [126088, 126080, 17, 4, 99, 126081]
    ids = image_sequence(tokens, padded)
    valid = ids != PAD
    full = logits_of(mmada, ids, valid[:, :, None] & valid[:, None, :])
    expected = full[:, -13:-1, 126349:134541].reshape(2, 3, 4, 8192)
    got = jax.jit(prior.apply)(prior.params, jnp.asarray(tokens))
    assert error(got, expected) < TOLERANCE
    visible = logits_of(mmada, ids)[:, -13:-1, 126349:134541].reshape(2, 3, 4, 8192)
    assert error(visible, expected) > 0.001


def test_the_offset_of_the_padded_vocabulary_would_show(mmada, mmada_folder, tokens):
    prior = pretrained.load_prior(mmada_folder, prompt_ids=[17, 4, 99])
    prompt = [126088, 126080, 17, 4, 99, 126081]
    wrong = logits_of(mmada, image_sequence(tokens, prompt, offset=126464))
    wrong = wrong[:, -13:-1, 126464:134656].reshape(2, 3, 4, 8192)
    got = jax.jit(prior.apply)(prior.params, jnp.asarray(tokens))
    assert error(np.asarray(got), wrong) > 0.1


def test_text_prior_of_llada(tmp_path):
    oracle = make_oracle(LLADA_ROWS, CONFIG)
    prior = pretrained.load_prior(convert(tmp_path, oracle, CONFIG), prompt_ids=[17, 4, 99])
    text = np.array([[[126349, 8, 126349, 126081, 126349]]])
    ids = np.where(text[0] == 126349, MASK, text[0])
    for apply, prompt in (
        (prior.apply, [17, 4, 99]),
        (prior.apply_unconditional, [MASK, MASK, MASK]),
    ):
        full = logits_of(oracle, np.concatenate([[prompt], ids], axis=1))
        got = np.array(jax.jit(apply)(prior.params, jnp.asarray(text)))
        expected = full[:, None, 3:, :126349].copy()
        assert np.isneginf(got[..., MASK]).all()  # the mask is no text
        got[..., MASK] = expected[..., MASK] = 0
        assert error(got, expected) < TOLERANCE
