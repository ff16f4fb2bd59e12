import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from hub import random_state, save_sharded, save_single

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from convert import dream
from convert.rules import place_tensors

#: The published config.json with tiny sizes; three query heads share a key head.
CONFIG = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 20,
    "mask_token_id": 45,
    "model_type": "Dream",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 50,
}


def tensor_shapes(rows=50, width=24, shared=8, hidden=20, layers=3):
    shapes = {"model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width)}
    for layer in range(layers):
        block = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.q_proj.bias": (width,),
            "self_attn.k_proj.weight": (shared, width),
            "self_attn.k_proj.bias": (shared,),
            "self_attn.v_proj.weight": (shared, width),
            "self_attn.v_proj.bias": (shared,),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (width,)}


def run(source, target, *options):
    return dream.main(dream.FAMILY, "", [str(source), str(target), *options])


@pytest.fixture
def state():
    return random_state(tensor_shapes())


def published():
    return tensor_shapes(rows=152064, width=3584, shared=512, hidden=18944, layers=28)


def test_published_names_fill_the_whole_model():
    config = TransformerConfig(
        vocab_size=152064,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        mlp_width=18944,
        qkv_bias=True,
    )
    abstract = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    targets = traverse_util.flatten_dict(abstract, sep="/")
    source = type("Headers", (), {"shapes": published()})()
    places = place_tensors(source, dream.RULES, targets)
    assert len(places) == 339
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in source.shapes.values()) == 7_615_616_512


def test_published_index_has_its_size():
    """27.8 kB in 346 lines on the hub, for a copy in four shards: the names are right."""
    shapes = published()
    index = {
        "metadata": {"total_size": 2 * sum(int(np.prod(shape)) for shape in shapes.values())},
        "weight_map": dict.fromkeys(shapes, "model-00001-of-00004.safetensors"),
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert (len(text), text.count("\n")) == (27_752, 346)


def test_dream_becomes_a_text_prior(tmp_path, state):
    source = save_sharded(tmp_path / "hub", state, CONFIG)
    assert run(source, tmp_path / "model", "--dtype", "float32", "--verify") == 0
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[3, 4])
    assert prior.num_codes == 50
    np.testing.assert_array_equal(prior.params["prompt"], [3, 4])
    np.testing.assert_array_equal(prior.params["uncond_prompt"], [45, 45])
    card = checkpoint.read_card(tmp_path / "model")["prior"]
    assert card["shift_logits"] and card["qkv_bias"] and not card["rope_in_float32"]
    assert (card["num_heads"], card["num_kv_heads"], card["norm_eps"]) == (6, 2, 1e-6)
    params = traverse_util.flatten_dict(prior.params["model"], sep="/")
    assert params["blocks/k/kernel"].shape == (3, 24, 8)
    for part in "qkv":
        original = [state[f"model.layers.{i}.self_attn.{part}_proj.bias"] for i in range(3)]
        np.testing.assert_array_equal(params[f"blocks/{part}/bias"], original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 49}, "vocab_size is 49, but only 50 fits the tensors"),
        ({"num_key_value_heads": 6}, "num_key_value_heads is 6, but only 2 fits"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide"),
        ({"num_attention_heads": 2}, "num_key_value_heads is 2, but only 0 fits"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but only 3 fits"),
        ({"mask_token_id": None}, "must give mask_token_id"),
        ({"mask_token_id": 50}, "mask_token_id is 50 of 50 ids"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, but only False"),
        ({"rope_scaling": {"type": "yarn"}}, "asks for rope_scaling"),
        ({"rms_norm_eps": None}, "must give rms_norm_eps"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, state, capsys, change, message):
    source = save_single(tmp_path / "hub", state, CONFIG | change)
    assert run(source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_bias_is_missing(tmp_path, state, capsys):
    del state["model.layers.1.self_attn.v_proj.bias"]
    source = save_single(tmp_path / "hub", state, CONFIG)
    assert run(source, tmp_path / "model") == 2
    assert "'model.layers.1.self_attn.v_proj.bias', for 'blocks/v" in capsys.readouterr().err
