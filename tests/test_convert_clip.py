"""CLIP and DINO: names and shapes of the published files, and the converted networks in NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import traverse_util
from hub import random_state, save_single
from PIL import Image

from aps_jax import cli, pretrained
from aps_jax.scores import clip as clip_scores
from aps_jax.scores import dino as dino_scores
from aps_jax.scores import vit
from convert import clip, dino
from convert.rules import place_tensors

CLIP_CONFIG = {
    "model_type": "clip",
    "projection_dim": 10,
    "text_config": {
        "eos_token_id": 39,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 40,
    },
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 24,
        "image_size": 12,
        "intermediate_size": 20,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 4,
    },
}
DINO_CONFIG = {
    "model_type": "vit",
    "hidden_act": "gelu",
    "hidden_size": 24,
    "image_size": 12,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 3,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 4,
}


def block_shapes(prefix, names, width, hidden):
    shapes = {}
    for name, out, size in zip(
        names,
        (width, width, width, width, width, width, hidden, width),
        (None, width, width, width, width, None, width, hidden),
        strict=True,
    ):
        shapes[f"{prefix}.{name}.weight"] = (out,) if size is None else (out, size)
        shapes[f"{prefix}.{name}.bias"] = (out,)
    return shapes


def clip_shapes(
    dim=10, patch=4, side=3, image=(24, 20, 2), rows=40, context=9, text=(16, 24, 3), counters=False
):
    """Width, MLP width and layers of each tower."""
    vision, words = "vision_model", "text_model"
    shapes = {
        f"{vision}.embeddings.class_embedding": (image[0],),
        f"{vision}.embeddings.patch_embedding.weight": (image[0], 3, patch, patch),
        f"{vision}.embeddings.position_embedding.weight": (side**2 + 1, image[0]),
        f"{words}.embeddings.token_embedding.weight": (rows, text[0]),
        f"{words}.embeddings.position_embedding.weight": (context, text[0]),
        "visual_projection.weight": (dim, image[0]),
        "text_projection.weight": (dim, text[0]),
        "logit_scale": (),
    }
    norms = (("pre_layrnorm", vision, image), ("post_layernorm", vision, image))
    for name, tower, sizes in (*norms, ("final_layer_norm", words, text)):
        shapes |= {f"{tower}.{name}.{part}": sizes[:1] for part in ("weight", "bias")}
    for tower, (width, hidden, layers) in ((vision, image), (words, text)):
        for layer in range(layers):
            prefix = f"{tower}.encoder.layers.{layer}"
            shapes |= block_shapes(prefix, reference.CLIP_NAMES, width, hidden)
    if counters:
        shapes[f"{vision}.embeddings.position_ids"] = (1, side**2 + 1)
        shapes[f"{words}.embeddings.position_ids"] = (1, context)
    return shapes


def dino_shapes(patch=4, side=3, width=24, hidden=20, layers=2):
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, side**2 + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for layer in range(layers):
        shapes |= block_shapes(f"encoder.layer.{layer}", reference.VIT_NAMES, width, hidden)
    return shapes


def run(converter, source, target, *options):
    return converter.main(converter.FAMILY, "", [str(source), str(target), *options])


def in_float64(state):
    return {name: np.asarray(value, np.float64) for name, value in state.items()}


@pytest.mark.parametrize(
    ("shapes", "config", "count"),
    [
        # ViT-B/32 and ViT-L/14 of OpenAI; the sums are those that their papers' models have.
        (
            clip_shapes(512, 32, 7, (768, 3072, 12), 49408, 77, (512, 2048, 12)),
            (512, 32, 7, 768, 12, 12, 3072, 49408, 77, 49407, 512, 12, 8, 2048),
            151_277_313,
        ),
        (
            clip_shapes(768, 14, 16, (1024, 4096, 24), 49408, 77, (768, 3072, 12)),
            (768, 14, 16, 1024, 24, 16, 4096, 49408, 77, 49407, 768, 12, 12, 3072),
            427_616_513,
        ),
    ],
)
def test_published_clip_fills_both_towers(shapes, config, count):
    names = [field for field in clip_scores.ClipConfig.__dataclass_fields__][: len(config)]
    sizes = clip_scores.ClipConfig(**dict(zip(names, config, strict=True)))
    abstract = jax.eval_shape(
        lambda key: clip_scores.init_clip_params(key, sizes), jax.random.key(0)
    )
    targets = traverse_util.flatten_dict(abstract, sep="/")
    places = place_tensors(type("Headers", (), {"shapes": shapes})(), clip.RULES, targets)
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_published_dino_fills_the_network():
    sizes = vit.VitConfig(
        width=384, num_layers=12, num_heads=6, mlp_width=1536, activation="gelu", norm_eps=1e-12,
        patch_size=16, side=14, patch_bias=True,
    )  # fmt: skip
    shapes = dino_shapes(16, 14, 384, 1536, 12)
    abstract = jax.eval_shape(
        lambda key: dino_scores.init_dino_params(key, sizes), jax.random.key(0)
    )
    targets = traverse_util.flatten_dict(abstract, sep="/")
    places = place_tensors(type("Headers", (), {"shapes": shapes})(), dino.RULES, targets)
    assert {place.target for place in places.values()} == targets.keys()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 21_665_664


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    state = random_state(clip_shapes(), seed=1)
    counters = {
        "vision_model.embeddings.position_ids": np.arange(10)[None],
        "text_model.embeddings.position_ids": np.arange(9)[None],
    }
    source = save_single(folder / "hub", state | counters, CLIP_CONFIG)
    save_words(source)
    assert run(clip, source, folder / "model", "--verify") == 0
    return folder / "model", in_float64(state)


def save_words(folder):
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    words = {"a": 0, "cat": 1, "dog": 2, "photo": 3, "of": 4, "?": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(f"<|filler{i}|>", special=True) for i in range(6, 38)]
        + [AddedToken(name, special=True) for name in (clip_scores.BEGIN, clip_scores.END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_clip_against_numpy(clip_folder, rng):
    folder, state = clip_folder
    model = pretrained.load_clip(folder)
    x = rng.uniform(-1, 1, size=(2, 12, 12, 3)).astype(np.float32)
    ids = model.tokenize(["a photo of a cat", "Dog"])
    got, of_ids = jax.jit(lambda m, x, ids: (m.embed_image(x), m.embed_text(ids)))(model, x, ids)
    pixels = ((x.astype(np.float64) + 1) / 2 - clip_scores.MEAN) / clip_scores.STD
    expected = [reference.clip_image(state, one, CLIP_CONFIG) for one in pixels]
    np.testing.assert_allclose(got, expected, atol=2e-5)

    np.testing.assert_array_equal(ids, [[38, 0, 3, 4, 0, 1, 39], [38, 2, 39, 39, 39, 39, 39]])
    expected = [reference.clip_text(state, row, CLIP_CONFIG) for row in ids]
    np.testing.assert_allclose(of_ids, expected, atol=2e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    with pytest.raises(ValueError, match="has 8 tokens; CLIP reads at most 7"):
        model.tokenize("a cat of a dog of a cat")
    with pytest.raises(ValueError, match="does not know 'bird'"):
        model.embed_text("a bird")


def test_gradients_reach_pixels_of_any_size(clip_folder, rng):
    """The slope along a random direction is that of the score itself."""
    model = pretrained.load_clip(clip_folder[0])
    x = rng.uniform(-1, 1, size=(1, 30, 21, 3)).astype(np.float32)
    wanted = jnp.asarray(rng.normal(size=(1, 10)), jnp.float32)

    def score(x):
        return jnp.sum(model.embed_image(x) * wanted)

    both = jax.jit(jax.value_and_grad(score))
    _, gradient = both(x)
    direction = gradient / jnp.linalg.norm(gradient)
    step = 0.05
    slope = (both(x + step * direction)[0] - both(x - step * direction)[0]) / (2 * step)
    np.testing.assert_allclose(slope, jnp.linalg.norm(gradient), rtol=2e-2)
    # Of a tall picture the middle square counts, with what the filter sees around it.
    rows = np.abs(gradient).sum(axis=(0, 2, 3))
    assert rows[0] == rows[-1] == 0 < rows[4:26].min()


def test_dino_against_numpy(tmp_path, rng):
    state = random_state(dino_shapes(), seed=2)
    source = save_single(tmp_path / "hub", state | {"pooler.dense.bias": np.ones(3)}, DINO_CONFIG)
    assert run(dino, source, tmp_path / "model", "--verify") == 0
    model = pretrained.load_dino(tmp_path / "model")
    x = rng.uniform(-1, 1, size=(2, 12, 12, 3)).astype(np.float32)
    pixels = ((x.astype(np.float64) + 1) / 2 - dino_scores.MEAN) / dino_scores.STD
    expected = np.stack([reference.dino(in_float64(state), one, DINO_CONFIG) for one in pixels])
    got, cosine = jax.jit(lambda m, x: (m.embed_image(x), m(x, x[::-1])))(model, x)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    between = expected[0] @ expected[1] / np.prod(np.linalg.norm(expected, axis=1))
    np.testing.assert_allclose(cosine, [between, between], atol=2e-5)


@pytest.mark.parametrize("shape", [(40, 56), (12, 17), (7, 5)])
def test_the_middle_square_is_resized_as_by_pillow(shape, rng):
    x = rng.uniform(-1, 1, size=(1, *shape, 3)).astype(np.float32)
    got = vit.square_pixels(x, 12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    height, width = (12 * side // min(shape) for side in shape)
    resized = [
        Image.fromarray((x[0, ..., c] + 1) / 2).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    top, left = (height - 12) // 2, (width - 12) // 2
    expected = np.stack([np.asarray(r) for r in resized], -1)[top : top + 12, left : left + 12]
    np.testing.assert_allclose(got[0], expected, atol=2e-5)


def test_one_folder_for_prior_and_scores(clip_folder, tmp_path, capsys):
    """A second part keeps the first one's files, the tokenizer of the same name included."""
    source = save_single(tmp_path / "hub", random_state(dino_shapes()), DINO_CONFIG)
    assert run(dino, source, tmp_path / "model") == 0
    (tmp_path / "model" / "tokenizer.json").write_text("of the prior")
    again = save_single(tmp_path / "clip", random_state(clip_shapes()), CLIP_CONFIG)
    save_words(again)
    assert run(clip, again, tmp_path / "model") == 0
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "of the prior"
    assert pretrained.load_clip(tmp_path / "model").tokenize("a cat").shape == (1, 4)
    capsys.readouterr()
    assert cli.main(["models", str(tmp_path / "model")]) == 0
    facts = capsys.readouterr().out
    assert "CLIP; " in facts and "DINO; " in facts and "by convert.clip" in facts


def changed(config, path, value):
    config = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    at = config
    for name in parents:
        at = at[name]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config", None, "must give text_config"),
        ("vision_config", "none", "vision_config is 'none', which describes no tower"),
        ("text_config.num_attention_heads", 3, "num_attention_heads is 3, which does not divide"),
        ("vision_config.hidden_size", 20, "hidden_size is 20, but only 24 fits"),
        ("vision_config.patch_size", 2, "patch_size is 2, but only 4 fits"),
        ("text_config.hidden_act", "gelu", "'quick_gelu' and 'gelu'; only CLIP with one of both"),
        ("text_config.eos_token_id", 40, "eos_token_id is 40 of 40 ids"),
    ],
)
def test_clip_configurations_that_do_not_fit(tmp_path, capsys, path, value, message):
    config = changed(CLIP_CONFIG, path, value)
    source = save_single(tmp_path / "hub", random_state(clip_shapes()), config)
    assert run(clip, source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_an_old_configuration_ends_texts_with_the_last_id(tmp_path):
    config = changed(CLIP_CONFIG, "text_config.eos_token_id", 2)
    state = random_state(clip_shapes())
    source = save_single(tmp_path / "hub", state, config)
    # As large models are saved, the single number of the scale included.
    assert run(clip, source, tmp_path / "model", "--format", "orbax", "--verify") == 0
    model = pretrained.load_clip(tmp_path / "model")
    assert model.config.end_id == 39
    assert model.params["logit_scale"] == state["logit_scale"]
    with pytest.raises(ValueError, match="without a tokenizer.json"):
        model.embed_text("a cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": (24, 3, 4, 4)}, "form of its authors' own code"),
        ({"embeddings.position_embeddings": (1, 9, 24)}, "which are no square of patches"),
        ({"encoder.layer.1.output.dense.bias": None}, "'encoder.layer.1.output.dense.bias', for"),
    ],
)
def test_dino_files_that_do_not_fit(tmp_path, capsys, change, message):
    shapes = {name: shape for name, shape in (dino_shapes() | change).items() if shape}
    source = save_single(tmp_path / "hub", random_state(shapes), DINO_CONFIG)
    assert run(dino, source, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
