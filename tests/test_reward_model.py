"""Reward models: conversion, the conversation they read, soft answers, shared vocabularies."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hub import random_state, save_single, save_tokenizer

from aps_jax import cli, pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.config import TransformerConfig
from aps_jax.text.reward_model import RewardFrame, frame_ids, make_reward, reward_energy
from aps_jax.text.tokenizer import REWARD_TOKENIZER, TextError, load_tokenizer
from aps_jax.text.vocabulary import only_mapped, token_map
from aps_jax.types import Prior, bind
from convert import reward

#: ChatML with the empty thoughts that Qwen3's template writes before a last answer.
QWEN_TEMPLATE = """{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
#: As in Llama 3: what is said is stripped, and the beginning of text comes first.
LLAMA_TEMPLATE = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}"
)
SPECIALS = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|pad|>")
ROWS, PAD = 270, 261
QWEN = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "attention_bias": False,
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 20,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}
STRETCH = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
LLAMA = QWEN | {
    "architectures": ["LlamaForSequenceClassification"],
    "head_dim": 4,
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_scaling": STRETCH,
    "rope_theta": 500.0,
}


def tensor_shapes(config):
    width, hidden, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query = config["num_attention_heads"] * size
    shared = config["num_key_value_heads"] * size
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "score.weight": (1, width),
    }
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (query, width),
            "self_attn.k_proj.weight": (shared, width),
            "self_attn.v_proj.weight": (shared, width),
            "self_attn.o_proj.weight": (width, query),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if config["model_type"] == "qwen3":
            block |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def run(source, target, *options):
    return reward.main(reward.FAMILY, "", [str(source), str(target), *options])


def save_source(folder, config, state=None, template=QWEN_TEMPLATE):
    state = random_state(tensor_shapes(config), seed=3) if state is None else state
    save_single(folder, state, config)
    save_tokenizer(folder, SPECIALS)
    settings = {"bos_token": {"content": "<|begin|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_qwen_against_numpy_and_soft_answers(tmp_path, rng, capsys):
    """One compilation: ids, prompts of two lengths, mixtures, gradients."""
    state = random_state(tensor_shapes(QWEN), seed=3)
    source = save_source(tmp_path / "hub", QWEN, state)
    assert run(source, tmp_path / "model", "--dtype", "float32", "--verify") == 0
    model = pretrained.load_reward(tmp_path / "model", ["Hi?", "Who<|im_end|>"])
    letters = load_tokenizer(tmp_path / "model", REWARD_TOKENIZER)

    def letters_of(text):
        return [letters.encode(letter)[0] for letter in text]

    def ids_of(text):  # Every byte and every special token is one id.
        pieces = re.split("(<.*?>)", text)
        return sum(
            ([256 + SPECIALS.index(p)] if p in SPECIALS else letters_of(p) for p in pieces), []
        )

    # What a user writes is letters, even if it is called as a special token.
    befores = [
        ids_of("<|im_start|>user\n")
        + letters_of(prompt)
        + ids_of("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        for prompt in ("Hi?", "Who<|im_end|>")
    ]
    after = ids_of("<|im_end|>\n")

    table = np.asarray(state["model.embed_tokens.weight"], np.float64)
    exact = {name: np.asarray(value, np.float64) for name, value in state.items()}
    answers = rng.integers(0, 256, size=(4, 5))
    shares = rng.dirichlet(np.ones(ROWS), size=(4, 5)) * 0.2
    shares[np.arange(4)[:, None], np.arange(5)[None], answers] += 0.8

    energy = reward_energy(model)
    assert energy.name == "reward"

    def both(e):  # As a codec of one line per text gives them.
        values, slopes = slope(e[:, None])
        return -values, -slopes[:, 0]

    slope = jax.jit(lambda e: (energy(e), jax.grad(lambda e: jnp.sum(energy(e)))(e)))
    for answer in (table[answers], shares @ table):
        got, gradient = both(jnp.asarray(answer, jnp.float32))
        expected = [
            reference.reward(exact, np.vstack([table[befores[i % 2]], row, table[after]]), QWEN)
            for i, row in enumerate(answer)
        ]
        np.testing.assert_allclose(got, expected, atol=2e-5)
        assert np.std(expected) > 0.05
    # The gradient is the slope of the NumPy network, and every place of the answer has one.
    direction = rng.normal(size=answer.shape[1:])
    rows = [answer[3] + sign * 1e-5 * direction for sign in (1, -1)]
    ends = [
        reference.reward(exact, np.vstack([table[befores[1]], row, table[after]]), QWEN)
        for row in rows
    ]
    np.testing.assert_allclose(
        np.sum(gradient[3] * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-5
    )
    assert np.abs(gradient).sum(-1).min() > 1e-5
    with pytest.raises(ValueError, match="R a multiple of the 2 prompts"):
        model.score(answers[:3])
    capsys.readouterr()
    assert cli.main(["models", str(tmp_path / "model")]) == 0
    assert "reward model of text; " in capsys.readouterr().out


def test_llama_against_numpy(tmp_path, rng):
    """Stretched rotations, slowed down and interpolated, and a template that strips."""
    rates = reference.turn_rates(4, LLAMA["rope_theta"], None)
    turns = rates * STRETCH["original_max_position_embeddings"] / (2 * np.pi)
    assert turns[0] < 4 and turns[1] < 1  # one is interpolated, one is slowed down
    state = random_state(tensor_shapes(LLAMA), seed=4)
    source = save_source(tmp_path / "hub", LLAMA, state, LLAMA_TEMPLATE)
    assert run(source, tmp_path / "model", "--dtype", "float32") == 0
    model = pretrained.load_reward(tmp_path / "model", "  Hi ")
    card = checkpoint.read_card(tmp_path / "model")
    assert card["reward_model"]["rope_stretch"] == [8.0, 1.0, 4.0, 16]
    assert card["reward_frame"] == {
        "before": "<|begin|><|im_start|>user\n\n",
        "between": "<|im_end|><|im_start|>assistant\n\n",
        "after": "<|im_end|>",
        "strips": True,
        "pad_token_id": PAD,
    }
    tokenizer = load_tokenizer(tmp_path / "model", REWARD_TOKENIZER)
    before = [256, 257, *tokenizer.encode("user\n\nHi"), 258, 257]
    before += tokenizer.encode("assistant\n\n")
    ids = rng.integers(0, 256, size=(2, 7))
    got = jax.jit(lambda model, ids: model.score(ids))(model, ids)
    exact = {name: np.asarray(value, np.float64) for name, value in state.items()}
    table = exact["model.embed_tokens.weight"]
    expected = [reference.reward(exact, table[[*before, *row, 258]], LLAMA) for row in ids]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    plain = LLAMA | {"rope_scaling": None}
    unstretched = [reference.reward(exact, table[[*before, *row, 258]], plain) for row in ids]
    assert np.abs(np.subtract(expected, unstretched)).max() > 1e-3


@pytest.mark.parametrize(
    ("after", "pad", "last"), [((5, 9, 9), 9, 3), ((5, 9, 9), None, 1), ((), 9, 1), ((9,), 9, 2)]
)
def test_the_score_is_at_the_last_id_that_is_no_pad(after, pad, last):
    config = TransformerConfig(
        vocab_size=10, num_outputs=1, width=4, num_layers=1, num_heads=1, mlp_width=4
    )
    model = make_reward(config, {}, before_ids=[1], after_ids=after, pad_token_id=pad)
    assert dict(model.apply.settings)["last"] == last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; reward models of llama, qwen2, qwen3"),
        ({"head_dim": 8}, "head_dim is 8, but only 6 fits"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide"),
        ({"use_sliding_window": True}, "use_sliding_window is True, but only False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of the kind 'yarn'"),
        ({"rope_theta": None}, "must give rope_theta"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', which is no id"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, capsys, change, message):
    source = save_source(tmp_path / "hub", QWEN | change, random_state(tensor_shapes(QWEN)))
    assert run(source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", "does not write prompt and answer once each"),
        ("{{ messages[1].content }}{{ messages[0].content }}", "the answer before the prompt"),
        ("{{ messages[0].content | upper }}{{ messages[1].content }}", "once each, as they are"),
        ("{{ raise_exception('only systems') }}", "cannot be run (only systems)"),
        ("{{ messages.__class__.__mro__ }}", "cannot be run"),
        ("{% for", "cannot be run"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, capsys, template, message):
    source = save_source(tmp_path / "hub", QWEN, template=template)
    assert run(source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_parts_are_missing(tmp_path, capsys):
    source = save_source(tmp_path / "hub", QWEN)
    (source / "chat_template.jinja").write_text(LLAMA_TEMPLATE)  # The newer form wins.
    assert run(source, tmp_path / "first") == 0
    assert checkpoint.read_card(tmp_path / "first")["reward_frame"]["strips"]
    (source / "tokenizer.json").unlink()
    assert run(source, tmp_path / "model") == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    shapes = tensor_shapes(QWEN) | {"score.weight": (2, 16)}
    save_source(source, QWEN, random_state(shapes))
    assert run(source, tmp_path / "model") == 2
    assert "scores 2 classes; a reward is one number" in capsys.readouterr().err


def test_frames_split_only_their_own_names(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, SPECIALS))
    frame = RewardFrame(before="", between="<|im_end|><|im_end|>", after="")
    before, after = frame_ids(frame, tokenizer, " hi ")
    assert before == [*tokenizer.encode(" hi "), 258, 258] and after == []


def words(*tokens, specials=(), decoder=None):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    from aps_jax.text.tokenizer import TextTokenizer

    tokenizer = Tokenizer(models.WordLevel(vocab={t: i for i, t in enumerate(tokens)}))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if decoder is not None:
        tokenizer.decoder = getattr(decoders, decoder)()
    return TextTokenizer(tokenizer)


def test_vocabularies_that_agree():
    ours = words("a", "b", "c", specials=("<end>", "<mask>"))
    theirs = words("x", "c", "a", "b", specials=("<think>", "<end>"))
    np.testing.assert_array_equal(token_map(ours, theirs), [2, 3, 1, 5, -1])
    ids = token_map(ours, theirs, num_codes=7)  # More rows than tokens, as in Dream.
    np.testing.assert_array_equal(ids, [2, 3, 1, 5, -1, -1, -1])
    np.testing.assert_array_equal(token_map(ours, ours), np.arange(5))


@pytest.mark.parametrize(
    ("theirs", "num_codes", "message"),
    [
        (words("a", "b"), None, "1 of the 4 tokens of the prior, such as 'c', are no tokens"),
        (words("a", "b", "c", decoder="ByteLevel"), None, r"otherwise \(ByteLevel\) than the"),
        (words("a", "b", "c"), 3, "has ids up to 3, but the prior only 3 codes"),
    ],
)
def test_vocabularies_that_do_not(theirs, num_codes, message):
    with pytest.raises(TextError, match=message) as caught:
        token_map(words("a", "b", "c", specials=("<end>",)), theirs, num_codes)
    assert "\n" not in str(caught.value)


def test_a_prior_of_mapped_codes_alone(rng):
    def flat(params, tokens):
        return np.broadcast_to(params, (*tokens.shape, 5))

    prior = Prior(
        params=np.float32(rng.normal(size=5)),
        apply=bind(flat),
        num_codes=5,
        apply_unconditional=bind(flat),
    )
    ids = np.array([3, -1, 0, 2, -1])
    tokens = rng.integers(0, 6, size=(2, 1, 3))
    mapped = only_mapped(prior, ids)
    for old, new in (
        (prior.apply, mapped.apply),
        (prior.apply_unconditional, mapped.apply_unconditional),
    ):
        before, after = old(prior.params, tokens), new(mapped.params, tokens)
        np.testing.assert_array_equal(after[..., [0, 2, 3]], before[..., [0, 2, 3]])
        assert np.all(np.isneginf(after[..., [1, 4]]))
    with pytest.raises(ValueError, match="of 4 codes, the prior has 5"):
        only_mapped(prior, ids[:4])
    config = TransformerConfig(
        vocab_size=10, num_outputs=1, width=2, num_layers=1, num_heads=1, mlp_width=4
    )
    table = jnp.arange(20.0).reshape(10, 2)
    weights = {"embed": {"embedding": table}}
    model = make_reward(config, weights, before_ids=[1], after_ids=[2])
    np.testing.assert_array_equal(model.rows(ids), table[np.array([3, 3, 0, 2, 3])])
