"""Tokenizer of a model folder and chat templates."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from hub import save_tokenizer

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.prompts import PromptConfig
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.text import chat
from aps_jax.text.tokenizer import TextError, encode_prompt, load_tokenizer, until
from experiments.train import captions

TURNS = [("user", " What is 2+2? "), ("assistant", "4"), ("user", "Sure?")]


def test_templates_of_the_public_models():
    head, foot = "<|start_header_id|>{}<|end_header_id|>", "<|eot_id|>"
    for template, gap in ((chat.LLADA, "\n\n"), (chat.MMADA, "\n")):
        expected = "<|startoftext|>"
        for role, text in TURNS:
            expected += head.format(role) + gap + text.strip() + foot
        expected += head.format("assistant") + gap
        assert chat.chat_text(template, TURNS) == expected
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in TURNS)
    assert chat.chat_text(chat.DREAM, TURNS) == expected + "<|im_start|>assistant\n"
    system = [("system", "Be brief."), ("user", "Hi")]
    assert chat.chat_text(chat.DREAM, system).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_pieces_alternate_between_plain_and_special():
    pieces = chat.chat_pieces(chat.DREAM, [chat.Message("user", "Hi")])
    assert pieces == (
        ("<|im_start|>", True),
        ("user\nHi", False),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", True),
        ("assistant\n", False),
    )


def test_chats_that_are_none():
    with pytest.raises(ValueError, match="unknown role 'robot'; choose from system"):
        chat.chat_text(chat.LLADA, [("robot", "Hi")])
    with pytest.raises(ValueError, match="at least one message"):
        chat.chat_pieces(chat.LLADA, [])


SPECIALS = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mask|>")


@pytest.fixture
def folder(tmp_path):
    return save_tokenizer(tmp_path, SPECIALS)


def test_text_becomes_ids_and_back(folder):
    tokenizer = load_tokenizer(folder)
    for text in ("a photo of a face", "naïve café, 日本語", " two  spaces\n", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())  # one id per byte, and nothing around them
    assert encode_prompt(folder, "ab") == tokenizer.encode("ab")
    assert encode_prompt(folder, ["ab", "c"]) == [tokenizer.encode("ab"), tokenizer.encode("c")]


def test_users_cannot_write_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    mask = tokenizer.special_id("<|mask|>")
    ids = tokenizer.encode("x<|mask|><|eot_id|>")
    assert mask not in ids and len(ids) == 19
    chatted = tokenizer.chat(chat.LLADA, [("user", "<|eot_id|>")])
    assert chatted.count(tokenizer.special_id("<|eot_id|>")) == 1


def test_chat_ids(folder):
    tokenizer = load_tokenizer(folder)
    start, head, close, eot = (tokenizer.special_id(name) for name in SPECIALS[:4])
    user, gap = tokenizer.encode("user"), tokenizer.encode("\n\n")
    expected = [start, head, *user, close, *gap, *tokenizer.encode("Hi"), eot]
    expected += [head, *tokenizer.encode("assistant"), close, *gap]
    ids = tokenizer.chat(chat.LLADA, [("user", "Hi")])
    assert ids == expected
    assert tokenizer.decode(ids, keeps_special=True) == chat.chat_text(chat.LLADA, [("user", "Hi")])
    assert tokenizer.decode(ids) == "user\n\nHiassistant\n\n"
    with pytest.raises(TextError, match="no token '<|im_start|>': it is of another model"):
        tokenizer.chat(chat.DREAM, [("user", "Hi")])


def test_text_ends_at_a_stop():
    assert until(np.array([5, 6, 2, 7]), [2, 9]) == [5, 6]
    assert until([5, 6], [2]) == [5, 6]


def test_what_is_missing_is_named(tmp_path, folder, monkeypatch):
    with pytest.raises(TextError, match="has no tokenizer.json, so prompts must be given as ids"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TextError, match="is damaged or no tokenizer .*; fetch it again"):
        load_tokenizer(tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TextError, match=r"pip install 'aps_jax\[text\]'"):
        load_tokenizer(folder)


# A model folder with a tokenizer.

NUM_IDS = 256 + len(SPECIALS)
FRAME = PromptConfig(
    num_codes=8,
    image_offset=NUM_IDS,
    mask_token_id=NUM_IDS - 1,
    begin_id=256,
    end_id=257,
    prefix=(258,),
    pad_token_id=259,
    length=20,
)
TEXT_FRAME = PromptConfig(num_codes=NUM_IDS, mask_token_id=NUM_IDS - 1, mask_uncond=True)
CONFIG = TransformerConfig(vocab_size=NUM_IDS + 8, width=8, num_layers=1, num_heads=1, mlp_width=8)


@pytest.fixture
def model(folder):
    params = random_params(init_transformer_params, CONFIG)
    checkpoint.save_params(folder / "prior.safetensors", params)
    checkpoint.update_card(
        folder,
        prior=dataclasses.asdict(CONFIG),
        prompt=dataclasses.asdict(FRAME),
        text_prompt=dataclasses.asdict(TEXT_FRAME),
        prior_window=4,
    )
    return folder


def test_a_model_takes_text(model):
    ids = load_tokenizer(model).encode("a face")
    prior = pretrained.load_prior(model, prompt="a face")
    np.testing.assert_array_equal(prior.params["prompt"], [258, *ids])
    prior = pretrained.load_prior(model, prompt=["a face", "a"])
    np.testing.assert_array_equal(prior.params["prompt"][1], [259] * 5 + [258, ids[0]])
    prior = pretrained.load_prior(model, prompt="a face", mask_padding=False)
    assert prior.params["prompt"].shape == prior.params["uncond_prompt"].shape == (20,)


def test_words_that_a_tokenizer_of_whole_words_lacks_are_named(tmp_path):
    words = captions.vocabulary({"": ("smiling", "black hair")}, num_codes=8, max_words=4)
    words.save_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" Smiling,black  hair") == words.ids(["smiling", "black hair"])
    assert tokenizer.encode("") == []
    with pytest.raises(TextError, match="'wig', 'clown' in a prompt; it knows: black, hair, smil"):
        tokenizer.encode("smiling, wig clown")


def test_a_model_over_images_and_text_has_two_priors(model):
    prior = pretrained.load_prior(model, prompt="Hi", is_text=True)
    assert (prior.num_codes, prior.window) == (NUM_IDS, None)
    assert prior.params["prompt"].shape == (2,)
    logits = jax.jit(prior.apply)(prior.params, jnp.full((1, 1, 3), NUM_IDS))
    is_excluded = np.isneginf(logits)
    assert is_excluded[..., NUM_IDS - 1].all() and is_excluded.sum() == 3  # the mask is no text


def test_prompts_that_a_model_does_not_take(model):
    with pytest.raises(ValueError, match="not both; give one"):
        pretrained.load_prior(model, prompt="a", prompt_ids=[1])
    with pytest.raises(ValueError, match="takes at most 19: shorten it"):
        pretrained.load_prior(model, prompt=30 * "a")
    with pytest.raises(ValueError, match=r"prompt ids must be in \[0, 269\)"):
        pretrained.load_prior(model, prompt_ids=[269])
    with pytest.raises(ValueError, match="takes no prompt"):
        pretrained.load_pretrained("photo64", prompt="a face")
    with pytest.raises(ValueError, match="over images only"):
        pretrained.load_prior(pretrained.model_folder("photo64"), is_text=True)
    card = json.loads((model / "card.json").read_text())
    del card["text_prompt"]
    (model / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="over images only"):
        pretrained.load_prior(model, is_text=True)
