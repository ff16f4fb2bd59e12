import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hub import file_size, random_state, save_sharded, save_single

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from convert import llada
from convert.rules import place_tensors

LLADA_ROWS, MMADA_ROWS = 126464, 134656
#: The published config.json of LLaDA-8B, its sizes made tiny.
CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "d_model": 16,
    "embedding_size": LLADA_ROWS,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 24,
    "model_type": "llada",
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": LLADA_ROWS,
    "weight_tying": False,
}
#: MMaDA adds its own fields and keeps old ones: vocab_size and num_vq_tokens are not the model's.
MMADA_CONFIG = CONFIG | {
    "architectures": ["MMadaModelLM"],
    "codebook_size": 8192,
    "llm_vocab_size": LLADA_ROWS,
    "model_type": "mmada",
    "new_vocab_size": MMADA_ROWS,
    "num_vq_tokens": 256,
}


def tensor_shapes(rows, width=16, hidden=24, layers=2):
    shapes = {"wte.weight": (rows, width)}
    for layer in range(layers):
        block = {name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        block |= {name: (hidden, width) for name in ("ff_proj", "up_proj")}
        block |= {"ff_out": (width, hidden), "attn_norm": (width,), "ff_norm": (width,)}
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (width,), "ff_out.weight": (rows, width)}
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}


def make_state(rows, seed=0):
    state = random_state(tensor_shapes(rows), seed)
    for name in state:
        if name.endswith("ln_f.weight"):
            state[name] += 1  # a norm whose name does not say so
    return state


def run(source, target, *options):
    return llada.main(llada.FAMILY, "", [str(source), str(target), *options])


@pytest.fixture(scope="module")
def state():
    return make_state(MMADA_ROWS)


@pytest.fixture
def refuse(tmp_path, capsys):
    def refuse(shapes, config, tokenizer=None):
        """The line that refuses zeros of these shapes."""
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        source = save_single(tmp_path / "hub", tensors, config)
        if tokenizer is not None:
            (source / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert run(source, tmp_path / "model") == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["hub"]
        return captured.err

    return refuse


# The published models, from their headers alone.


def published(rows):
    return tensor_shapes(rows, width=4096, hidden=12288, layers=32)


@pytest.mark.parametrize(
    ("rows", "num_params"), [(LLADA_ROWS, 8_015_581_184), (MMADA_ROWS, 8_082_690_048)]
)
def test_published_names_fill_the_whole_model(rows, num_params):
    config = TransformerConfig(
        vocab_size=rows, width=4096, num_layers=32, num_heads=32, mlp_width=12288
    )
    abstract = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    targets = traverse_util.flatten_dict(abstract, sep="/")
    source = type("Headers", (), {"shapes": published(rows)})()
    places = place_tensors(source, llada.RULES, targets)
    assert len(places) == 291
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in source.shapes.values()) == num_params


def test_published_index_has_its_size():
    """The hub shows 24.9 kB in 298 lines for the index of LLaDA-8B: the names are right."""
    shapes = published(LLADA_ROWS)
    index = {
        "metadata": {"total_size": 2 * sum(int(np.prod(shape)) for shape in shapes.values())},
        "weight_map": dict.fromkeys(shapes, "model-00001-of-00006.safetensors"),
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert len(text) == 24_942
    assert text.count("\n") == 298
    data = file_size(shapes, lambda name: "BF16")
    assert 16_031_162_368 < data < 16_031_162_368 + 40_000


# Conversion.


def test_mmada_becomes_an_image_prior(tmp_path, state, capsys):
    source = save_sharded(tmp_path / "hub", state, MMADA_CONFIG)
    assert run(source, tmp_path / "model", "--dtype", "float32", "--verify") == 0
    assert "verified, largest relative rounding 0.0e+00" in capsys.readouterr().out
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[5, 6, 7])
    assert (prior.num_codes, prior.window) == (8192, 32)
    np.testing.assert_array_equal(prior.params["prompt"], [126088, 126080, 5, 6, 7, 126081])
    np.testing.assert_array_equal(prior.params["uncond_prompt"], [126088, 126080, 126081])
    card = checkpoint.read_card(tmp_path / "model")
    assert card["prompt"]["image_offset"] == 126349
    assert card["prompt"]["mask_token_id"] == 126336
    assert (card["prompt"]["begin_id"], card["prompt"]["end_id"]) == (126084, 126085)
    assert card["prompt"]["pad_token_id"] == 126093
    text = pretrained.load_prior(tmp_path / "model", prompt_ids=[5], is_text=True)
    assert (text.num_codes, text.window) == (126349, None)
    np.testing.assert_array_equal(text.params["prompt"], [5])
    params = traverse_util.flatten_dict(prior.params["model"], sep="/")
    for name, path in (("q_proj", "q"), ("ff_proj", "ff_proj"), ("ff_out", "ff_out")):
        original = [state[f"model.transformer.blocks.{i}.{name}.weight"].T for i in (0, 1)]
        np.testing.assert_array_equal(params[f"blocks/{path}/kernel"], original)
    head = state["model.transformer.ff_out.weight"]
    np.testing.assert_array_equal(params["head/kernel"], head.T)
    logits = jax.jit(prior.apply)(prior.params, jnp.full((1, 2, 3), 8192))
    assert logits.shape == (1, 2, 3, 8192) and jnp.isfinite(logits).all()


def test_default_is_bfloat16(tmp_path, state):
    source = save_single(tmp_path / "hub", state, MMADA_CONFIG)
    assert run(source, tmp_path / "model") == 0
    prior = pretrained.load_prior(tmp_path / "model")
    assert {leaf.dtype for leaf in jax.tree.leaves(prior.params["model"])} == {
        jnp.dtype(jnp.bfloat16)
    }
    scale = prior.params["model"]["blocks"]["ff_norm"]["scale"][1]
    expected = state["model.transformer.blocks.1.ff_norm.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(scale, expected)


def test_llada_becomes_a_text_prior(tmp_path):
    source = save_single(tmp_path / "hub", make_state(LLADA_ROWS), CONFIG)
    assert run(source, tmp_path / "model", "--dtype", "float32") == 0
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[11, 12])
    assert (prior.num_codes, prior.window) == (126349, None)
    np.testing.assert_array_equal(prior.params["prompt"], [11, 12])
    np.testing.assert_array_equal(prior.params["uncond_prompt"], [126336, 126336])


def test_prompts_of_a_batch(tmp_path, state):
    source = save_single(tmp_path / "hub", state, MMADA_CONFIG)
    assert run(source, tmp_path / "model") == 0
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[[5, 6], [7, 8]])
    expected = [[126088, 126080, 5, 6, 126081], [126088, 126080, 7, 8, 126081]]
    np.testing.assert_array_equal(prior.params["prompt"], expected)
    assert prior.params["uncond_prompt"].shape == (2, 3)


def test_a_model_without_prompts_takes_none():
    with pytest.raises(ValueError, match="takes no prompt"):
        pretrained.load_pretrained("photo64", prompt_ids=[1])


# What config.json and the tokenizer must say.

TINY_ROWS = tensor_shapes(MMADA_ROWS, width=2, hidden=4)
TINY_CONFIG = MMADA_CONFIG | {"d_model": 2, "mlp_hidden_size": 4, "n_heads": 1, "n_kv_heads": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 4}, "says d_model is 4, but only 2 fits the tensors"),
        ({"n_layers": 3}, "says n_layers is 3, but only 2 fits"),
        ({"mlp_hidden_size": 8}, "says mlp_hidden_size is 8, but only 4 fits"),
        ({"n_kv_heads": 2}, "says n_kv_heads is 2, but only 1 fits"),
        ({"n_heads": 3}, "n_heads is 3, which does not divide the width 2"),
        ({"n_heads": None}, "must give n_heads"),
        ({"rms_norm_eps": None}, "must give rms_norm_eps"),
        ({"rope_theta": None}, "must give rope_theta"),
        ({"weight_tying": True}, "weight_tying is True, but only False can be converted"),
        ({"block_type": "sequential"}, "block_type is 'sequential', but only 'llama'"),
        ({"codebook_size": 4096}, "codebook_size is 4096; only 8192"),
    ],
)
def test_configurations_that_do_not_fit(refuse, change, message):
    assert message in refuse(TINY_ROWS, TINY_CONFIG | change)


def test_vocabulary_is_too_small_for_images(refuse):
    message = refuse(tensor_shapes(LLADA_ROWS, width=2, hidden=4), TINY_CONFIG)
    assert "has 126464 rows; the ids of this model need 134541" in message


def test_weights_without_a_configuration(refuse):
    assert "config.json must give n_heads" in refuse(TINY_ROWS, None)


def test_heads_that_were_tied(refuse):
    shapes = {k: v for k, v in TINY_ROWS.items() if k != "model.transformer.ff_out.weight"}
    message = refuse(shapes, TINY_CONFIG)
    assert "'model.transformer.ff_out.weight', for 'head/kernel'" in message


def make_tokenizer(num_ids, num_added=100):
    """Added tokens repeat ids of the vocabulary, as some tokenizers do."""
    first = num_ids - num_added
    vocab = {f"t{index}": index for index in range(first + 10)}
    added = [{"id": index, "content": f"a{index}"} for index in range(first, num_ids)]
    return {"model": {"vocab": vocab}, "added_tokens": added}


def test_tokenizer_gives_the_image_offset(refuse):
    """126464, the rows of LLaDA, would be the plausible and wrong offset."""
    wrong = make_tokenizer(126464)
    assert "has 126464 ids; the models that can be" in refuse(TINY_ROWS, TINY_CONFIG, wrong)
    assert "no tokenizer with a vocabulary" in refuse(TINY_ROWS, TINY_CONFIG, {"model": {}})


def test_right_tokenizer_is_accepted(tmp_path):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in TINY_ROWS.items()}
    source = save_single(tmp_path / "hub", tensors, TINY_CONFIG)
    text = json.dumps(make_tokenizer(126349))
    (source / "tokenizer.json").write_text(text)
    assert run(source, tmp_path / "model") == 0
    assert (tmp_path / "model" / "tokenizer.json").read_text() == text


def test_the_tokenizer_joins_a_codec(tmp_path):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in TINY_ROWS.items()}
    source = save_single(tmp_path / "hub", tensors, TINY_CONFIG)
    (source / "tokenizer.json").write_text(json.dumps(make_tokenizer(126349)))
    checkpoint.update_card(tmp_path / "model", codec={})
    assert run(source, tmp_path / "model") == 0
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["card.json", "prior.safetensors", "tokenizer.json"]


def test_a_codec_is_no_language_model(refuse):
    message = refuse({"encoder.conv_in.weight": (2, 3, 3, 3)}, CONFIG)
    assert "no tensor 'model.transformer.wte.weight': it is another kind of model" in message


def test_grouped_layers_are_named(refuse):
    """With block_group_size 2 the original's class names layer 3 `block_groups.1.1`."""
    grouped = {}
    for name, shape in tensor_shapes(MMADA_ROWS, width=2, hidden=4, layers=4).items():
        before, found, rest = name.partition(".blocks.")
        if found:
            layer, leaf = rest.split(".", 1)
            name = f"{before}.block_groups.{int(layer) // 2}.{int(layer) % 2}.{leaf}"
        grouped[name] = shape
    message = refuse(grouped, TINY_CONFIG | {"block_group_size": 2, "n_layers": 4})
    assert (
        "saved in groups (model.transformer.block_groups.G.I, block_group_size above 1)" in message
    )
    assert "model.transformer.blocks.N with N = G * block_group_size + I" in message
