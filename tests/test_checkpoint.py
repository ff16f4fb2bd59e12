import dataclasses
import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CODEC_CONFIG, PRIOR_CONFIG
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from aps_jax import pretrained
from aps_jax.io import checkpoint
from aps_jax.io.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return {
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
        "blocks": {"norm": {"scale": jnp.ones(5)}, "table": jnp.arange(6).reshape(2, 3)},
    }


@pytest.fixture(scope="module")
def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.fixture
def weights(tmp_path, tree):
    path = tmp_path / "weights.safetensors"
    checkpoint.save_params(path, tree)
    return path


def edit(path, change):
    tensors = load_tensors(path.read_bytes())
    change(tensors)
    path.write_bytes(save_tensors(tensors))


def test_round_trip_in_float32_is_exact(weights, tree, abstract):
    chex.assert_trees_all_equal(checkpoint.load_params(weights, abstract), tree)
    chex.assert_trees_all_equal_dtypes(checkpoint.load_params(weights, abstract), tree)


def test_float16_halves_the_file_and_keeps_integers(tmp_path, tree, abstract, weights):
    path = tmp_path / "half.safetensors"
    checkpoint.save_params(path, tree, dtype="float16")
    stored = load_tensors(path.read_bytes())
    assert stored["head/kernel"].dtype == np.float16
    assert stored["blocks/table"].dtype == np.int32
    loaded = checkpoint.load_params(path, abstract)
    chex.assert_trees_all_equal_dtypes(loaded, tree)
    kernel = np.asarray(tree["head"]["kernel"])
    np.testing.assert_array_equal(loaded["head"]["kernel"], kernel.astype(np.float16))
    np.testing.assert_allclose(loaded["head"]["kernel"], kernel, rtol=1e-3)
    np.testing.assert_array_equal(loaded["blocks"]["table"], tree["blocks"]["table"])


def test_bfloat16_is_kept_or_widened(tmp_path, abstract, tree):
    path = tmp_path / "brain.safetensors"
    brain = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    checkpoint.save_params(path, brain)
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), brain)
    chex.assert_trees_all_equal(checkpoint.load_params(path, specs), brain)
    wide = checkpoint.load_params(path, abstract)
    chex.assert_trees_all_equal_dtypes(wide, tree)
    np.testing.assert_array_equal(wide["head"]["kernel"], brain["head"]["kernel"])


def test_loaded_arrays_do_not_depend_on_the_file(weights, abstract, tree):
    loaded = checkpoint.load_params(weights, abstract)
    with open(weights, "r+b") as file:
        file.write(bytes(weights.stat().st_size))
    chex.assert_trees_all_equal(loaded, tree)


def test_names_in_the_file_are_paths(weights):
    assert set(load_tensors(weights.read_bytes())) == {
        "head/kernel",
        "blocks/norm/scale",
        "blocks/table",
    }


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_truncated_file(weights, abstract, size):
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged or truncated"):
        checkpoint.load_params(weights, abstract)


def test_file_of_another_kind(weights, abstract):
    weights.write_bytes(b"PK\x03\x04 not tensors at all, whatever the name says" * 20)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        checkpoint.load_params(weights, abstract)


def test_missing_file(tmp_path, abstract):
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        checkpoint.load_params(tmp_path / "none.safetensors", abstract)


def test_missing_tensor(weights, abstract):
    edit(weights, lambda tensors: tensors.pop("blocks/norm/scale"))
    with pytest.raises(CheckpointError, match="lacks tensor 'blocks/norm/scale'"):
        checkpoint.load_params(weights, abstract)


def test_extra_tensor(weights, abstract):
    edit(weights, lambda tensors: tensors.update(extra=np.zeros(2, np.float32)))
    with pytest.raises(CheckpointError, match="has tensor 'extra', unknown"):
        checkpoint.load_params(weights, abstract)


def test_wrong_shape(weights, abstract):
    edit(weights, lambda tensors: tensors.update({"head/kernel": np.zeros((4, 3), np.float32)}))
    with pytest.raises(CheckpointError, match=r"'head/kernel'.* shape \(4, 3\).* needs \(3, 4\)"):
        checkpoint.load_params(weights, abstract)


# Writing.


def test_a_failed_write_leaves_nothing_behind(tmp_path, tree, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_params(tmp_path / "model" / "weights.safetensors", tree)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_failed_write_keeps_the_old_file(weights, tree, monkeypatch):
    before = weights.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_params(weights, jax.tree.map(jnp.zeros_like, tree))
    assert weights.read_bytes() == before
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_written_files_are_readable_by_others(weights):
    assert weights.stat().st_mode & 0o777 == 0o644


# The card.


def test_update_card_replaces_sections(tmp_path):
    checkpoint.update_card(tmp_path, codec={"num_bits": 4}, scores={"psnr": 20.0})
    checkpoint.update_card(tmp_path, scores={"psnr": 21.0}, prior={"width": 8})
    assert checkpoint.read_card(tmp_path) == {
        "codec": {"num_bits": 4},
        "scores": {"psnr": 21.0},
        "prior": {"width": 8},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"codec": ', "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[1, 2]", "must be a JSON object"),
    ],
)
def test_broken_card(tmp_path, content, message):
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"card\.json {message}"):
        checkpoint.read_card(tmp_path)


def test_folder_without_a_card(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no card\.json"):
        checkpoint.read_card(tmp_path)


# Whole models.


@pytest.fixture
def folder(tmp_path, tiny_codec, tiny_prior):
    folder = tmp_path / "model"
    checkpoint.save_params(folder / "codec.safetensors", tiny_codec.params)
    checkpoint.save_params(folder / "prior.safetensors", tiny_prior.params)
    sections = {
        "codec": dataclasses.asdict(CODEC_CONFIG),
        "prior": dataclasses.asdict(PRIOR_CONFIG),
        "prior_window": 4,
    }
    checkpoint.update_card(folder, **sections)
    return folder


HALVES = ("codec", "prior")


def change_card(folder, change):
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def test_a_model_folder_gives_back_the_model(folder, tiny_codec, tiny_prior):
    model = pretrained.load_pretrained(folder)
    assert pretrained.load_pretrained(str(folder)).card == model.card
    chex.assert_trees_all_equal(model.codec.params, tiny_codec.params)
    chex.assert_trees_all_equal(model.prior.params, tiny_prior.params)
    # The functions compare by value, so a loaded model reuses compiled code.
    assert jax.tree.structure(model.codec) == jax.tree.structure(tiny_codec)
    assert jax.tree.structure(model.prior) == jax.tree.structure(tiny_prior)
    assert model.prior.window == 4 and model.codec.stride == 4


@jax.jit
def decoded(codec, tokens):
    return codec.decode(codec.params, codec.codebook[tokens])


@jax.jit
def predicted(prior, tokens):
    return prior.apply(prior.params, tokens)


@pytest.mark.parametrize("card_dtype", ["float32", "bfloat16"])
def test_activations_have_the_dtype_that_is_asked_for(folder, card_dtype):
    """Weights and results stay float32, results differ by roundings of bfloat16 and by those."""
    change_card(folder, lambda card: [card[half].update(dtype=card_dtype) for half in HALVES])
    exact, rough = (pretrained.load_pretrained(folder, dtype=d) for d in ("float32", "bfloat16"))
    given = pretrained.load_pretrained(folder)
    chex.assert_trees_all_equal(rough.codec.params, exact.codec.params)
    chex.assert_trees_all_equal(rough.prior.params, exact.prior.params)
    tokens = jnp.arange(16).reshape(1, 4, 4) % exact.codec.num_codes
    for half, compute in (("codec", decoded), ("prior", predicted)):
        found, expected, own = (
            compute(getattr(model, half), tokens) for model in (rough, exact, given)
        )
        assert found.dtype == expected.dtype == jnp.float32
        difference = jnp.abs(found - expected).max() / jnp.abs(expected).max()
        assert 1e-5 < difference < 0.05
        chex.assert_trees_all_equal(own, found if card_dtype == "bfloat16" else expected)


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got 'float16'"):
        pretrained.load_pretrained(folder, dtype="float16")


def test_unknown_config_field(folder):
    change_card(folder, lambda card: card["codec"].update(num_bitz=4))
    with pytest.raises(CheckpointError, match=r"unknown CodecConfig fields \['num_bitz'\]"):
        pretrained.load_pretrained(folder)


def test_missing_config_field(folder):
    change_card(folder, lambda card: card["prior"].pop("width"))
    with pytest.raises(CheckpointError, match="wrong TransformerConfig: .*'width'"):
        pretrained.load_pretrained(folder)


def test_impossible_config(folder):
    change_card(folder, lambda card: card["codec"].update(num_groups=3))
    with pytest.raises(CheckpointError, match="wrong CodecConfig: num_groups=3 does not divide"):
        pretrained.load_pretrained(folder)


@pytest.mark.parametrize("section", ["codec", "prior"])
def test_missing_config(folder, section):
    change_card(folder, lambda card: card.pop(section))
    with pytest.raises(CheckpointError, match="lacks the configuration of"):
        pretrained.load_pretrained(folder)


def test_weights_of_another_config(folder):
    change_card(folder, lambda card: card["codec"].update(decoder_channels=[8, 8, 8]))
    with pytest.raises(CheckpointError, match=r"codec\.safetensors"):
        pretrained.load_pretrained(folder)


def test_not_a_folder(folder):
    with pytest.raises(ValueError, match=r"no model 'photo46'.*did you mean 'photo64'\?"):
        pretrained.load_pretrained("photo46")
    with pytest.raises(ValueError, match="neither a folder nor one of"):
        pretrained.load_pretrained(folder / "card.json")


def test_prior_folder_needs_a_whole_prompt_section(folder):
    change_card(folder, lambda card: card.update(prompt={"num_codes": 4}))
    with pytest.raises(CheckpointError, match="wrong PromptConfig: .*'mask_token_id'"):
        pretrained.load_pretrained(folder)
