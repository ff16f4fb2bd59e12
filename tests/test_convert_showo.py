import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from hub import file_size, random_state, save_single

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from convert import showo
from convert.rules import place_tensors

ROWS = 58498
#: The published config.json; it says nothing about the sizes of the transformer.
CONFIG = {
    "_class_name": "Showo",
    "codebook_size": 8192,
    "llm_model_path": "microsoft/phi-1_5",
    "llm_vocab_size": 50295,
    "load_from_showo": True,
    "mask_token_id": 58497,
    "num_vq_tokens": 256,
    "vocab_size": ROWS,
    "w_clip_vit": False,
}


def tensor_shapes(rows=ROWS, width=32, hidden=24, layers=2, head=16):
    shapes = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(layers):
        block = {"input_layernorm": (width,)}
        block |= {f"self_attn.{name}_proj": (width, width) for name in "qkv"}
        block |= {"self_attn.dense": (width, width)}
        block |= {"self_attn.q_layernorm": (head,), "self_attn.k_layernorm": (head,)}
        block |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    for name, shape in (("model.final_layernorm", (width,)), ("lm_head", (rows, width))):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"showo.{name}": shape for name, shape in shapes.items()}


def run(source, target, *options):
    return showo.main(showo.FAMILY, "", [str(source), str(target), *options])


@pytest.fixture(scope="module")
def state():
    return random_state(tensor_shapes())


def published():
    return tensor_shapes(width=2048, hidden=8192, layers=24, head=64)


def test_published_names_fill_the_whole_model():
    config = TransformerConfig(
        vocab_size=ROWS,
        width=2048,
        num_layers=24,
        num_heads=32,
        mlp_width=8192,
        block="phi",
        rope_dim=32,
    )
    abstract = jax.eval_shape(lambda key: init_transformer_params(key, config), jax.random.key(0))
    targets = traverse_util.flatten_dict(abstract, sep="/")
    source = type("Headers", (), {"shapes": published()})()
    places = place_tensors(source, showo.RULES, targets)
    assert len(places) == 437
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in source.shapes.values()) == 1_448_176_770


def test_published_file_has_its_size():
    """To the byte, which proves that the norms of queries and keys are in the file."""
    assert file_size(published(), lambda name: "F32") == 5_792_758_016
    without = {name: shape for name, shape in published().items() if "k_layernorm" not in name}
    assert file_size(without, lambda name: "F32") != 5_792_758_016


@pytest.mark.parametrize(("num_tokens", "window"), [(256, 16), (1024, 32)])
def test_showo_becomes_an_image_prior(tmp_path, state, num_tokens, window):
    config = CONFIG | {"num_vq_tokens": num_tokens}
    source = save_single(tmp_path / "hub", state, config, stem="pytorch_model")
    assert run(source, tmp_path / "model", "--verify") == 0
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[5, 6, 7])
    assert (prior.num_codes, prior.window) == (8192, window)
    np.testing.assert_array_equal(prior.params["prompt"], [50300, 50256, 5, 6, 7, 50256])
    np.testing.assert_array_equal(prior.params["uncond_prompt"], [50300, 50256, 50256])
    card = checkpoint.read_card(tmp_path / "model")
    assert (card["prior"]["num_heads"], card["prior"]["rope_dim"]) == (2, 8)
    assert card["prior"]["dtype"] == "float32"  # as published
    params = traverse_util.flatten_dict(prior.params["model"], sep="/")
    for name, path in (("mlp.fc1", "ff_in"), ("self_attn.dense", "attn_out")):
        original = [state[f"showo.model.layers.{i}.{name}.weight"].T for i in (0, 1)]
        np.testing.assert_array_equal(params[f"blocks/{path}/kernel"], original)
    np.testing.assert_array_equal(params["head/bias"], state["showo.lm_head.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 50305}, "vocab_size is 50305, but only 58498 can be converted"),
        ({"mask_token_id": 58496}, "mask_token_id is 58496, but only 58497"),
        ({"w_clip_vit": True}, "w_clip_vit is True, but only False"),
        ({"num_vq_tokens": 250}, "num_vq_tokens is 250, no square number"),
        ({"num_vq_tokens": None}, "must give num_vq_tokens"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, state, capsys, change, message):
    source = save_single(tmp_path / "hub", state, CONFIG | change)
    assert run(source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"showo.model.layers.1.self_attn.k_layernorm.bias": None}, "for 'blocks/k_norm/bias'"),
        ({"showo.model.layers.0.self_attn.q_layernorm.weight": None}, "has no tensor"),
        ({"showo.mm_projector.weight": (4, 4)}, "has no place in this model"),
        ({"showo.lm_head.bias": (ROWS - 1,)}, "needs (58498,)"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, capsys, change, message):
    shapes = tensor_shapes(width=4, hidden=4, head=4) | change
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}
    source = save_single(tmp_path / "hub", tensors, CONFIG)
    assert run(source, tmp_path / "model") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_another_vocabulary_or_tokenizer(tmp_path, capsys):
    shapes = tensor_shapes(rows=51200, width=4, hidden=4, head=4)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    assert run(save_single(tmp_path / "phi", zeros, CONFIG), tmp_path / "model") == 2
    assert "has 51200 rows; the ids of this model need 58498" in capsys.readouterr().err
    shapes = tensor_shapes(width=4, hidden=4, head=4)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    source = save_single(tmp_path / "hub", zeros, CONFIG)
    vocab = {"model": {"vocab": {f"t{i}": i for i in range(50257)}}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(vocab))
    assert run(source, tmp_path / "model") == 2
    assert "tokenizer.json has 50257 ids" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def save_tiny(folder, vocab, added):
    shapes = tensor_shapes(width=4, hidden=4, head=4)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    source = save_single(folder, zeros, CONFIG)
    content = {
        "model": {"vocab": vocab},
        "added_tokens": [{"id": index, "content": token} for token, index in added.items()],
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    return source


#: phi-1.5's: runs of spaces are added tokens.
VOCAB = {f"t{i}": i for i in range(50257)}
SPACES = {f"s{i}": i for i in range(50257, 50295)}
#: In the order in which Show-o's code adds them.
NAMES = "[PAD] <|soi|> <|eoi|> <|sov|> <|eov|> <|t2i|> <|mmu|> <|t2v|> <|v2v|> <|lvg|>".split()
SPECIAL = {token: 50295 + index for index, token in enumerate(NAMES)}


@pytest.mark.parametrize("special", [{}, SPECIAL])
def test_both_tokenizers_are_accepted(tmp_path, special):
    source = save_tiny(tmp_path / "hub", VOCAB, SPACES | special)
    assert run(source, tmp_path / "model") == 0
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("special", "message"),
    [
        # Ids of image codes or another order would be silently wrong.
        (
            SPECIAL | {"<|soi|>": 50297, "<|eoi|>": 50296},
            "gives '<|soi|>' the id 50297; this model needs 50296",
        ),
        (
            {token.replace("t2i", "T2I"): index for token, index in SPECIAL.items()},
            "gives '<|t2i|>' the id None; this model needs 50300",
        ),
        (
            SPECIAL | {"<|new|>": 50305},
            "has 50306 ids; the models that can be",
        ),
        (
            {token: SPECIAL[token] for token in NAMES[:4]},
            "has 50299 ids; the models that can be converted have 50295 or, with the special "
            "tokens, 50305",
        ),
    ],
)
def test_other_added_tokens_are_refused(tmp_path, capsys, special, message):
    source = save_tiny(tmp_path / "hub", VOCAB, SPACES | special)
    assert run(source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
