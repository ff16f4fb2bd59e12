"""Codecs and priors of every codebook: their trainings' parts, and the study that compares them."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.codec.config import CodecConfig
from aps_jax.codec.fsq import FSQ
from aps_jax.codec.lfq import LFQ, codebook
from aps_jax.codec.magvit2 import decode_tokens, encode_tokens, init_codec_params
from aps_jax.codec.residual import Residual
from aps_jax.codec.vq import VQ
from aps_jax.io import rows
from aps_jax.io.checkpoint import save_params, update_card
from aps_jax.pretrained import load_codec
from aps_jax.prior.attention import sequence_positions
from aps_jax.prior.bundle import make_prior, make_prompted_prior
from aps_jax.prior.prompts import PromptConfig, attention_mask, sequence_ids
from aps_jax.prior.transformer import Transformer, TransformerConfig, init_transformer_params
from experiments.studies import tokenizer_models, tokenizer_report, tokenizers
from experiments.train import codec_loss
from experiments.train.masked_loss import code_numbers, draw_masks, masked_loss, merge
from experiments.train.optimizer import TrainState
from experiments.train.prior_scores import cross_entropy
from experiments.train.restarts import Restarts

TINY = CodecConfig(
    num_bits=4, encoder_channels=(4, 4), encoder_blocks=(0, 0), decoder_channels=(4, 4),
    decoder_blocks=(0, 0), num_groups=2, patch_width=4, patch_blocks=1,
)  # fmt: skip
CODECS = {
    "vq": ({"code_width": 3}, ()),
    "fsq": ({"levels": (4, 2, 2)}, ()),
    "grouped": ({}, (2,)),
}
GROUPS = Residual(jnp.stack([codebook(2)] * 2))


@pytest.mark.parametrize("name", CODECS)
def test_model_folders_know_their_codebook(name, tmp_path):
    options, axes = CODECS[name]
    config = dataclasses.replace(TINY, quantizer=name, **options)
    shapes = jax.eval_shape(lambda key: init_codec_params(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    save_params(tmp_path / "codec.safetensors", params, "float32")
    update_card(tmp_path, codec=dataclasses.asdict(config))
    codec = load_codec(tmp_path)
    assert codec.num_codes ** max(1, len(axes) * 2) == 16
    x = jax.ShapeDtypeStruct((1, 4, 6, 3), "float32")
    tokens = jax.eval_shape(encode_tokens, codec, x)
    assert tokens.shape == (1, 2, 3, *axes)
    features = jax.eval_shape(codec.encode, codec.params, x)
    assert features.shape == (*tokens.shape, codec.quantizer.num_features)
    assert jax.eval_shape(decode_tokens, codec, tokens).shape == x.shape
    if name == "vq":
        np.testing.assert_array_equal(codec.quantizer.table, params["quantizer"]["table"])


def test_numbers_of_a_place_and_its_features():
    x = jnp.asarray([[[3.0, -0.2, 0.5, -4.0]]])
    grouped = dataclasses.replace(TINY, quantizer="grouped")
    np.testing.assert_array_equal(grouped.features(x), x.reshape(1, 1, 2, 2))
    np.testing.assert_array_equal(grouped.numbers(grouped.features(x)), x)
    fsq = dataclasses.replace(TINY, quantizer="fsq", levels=(2, 2, 2, 2))
    assert jnp.max(jnp.abs(fsq.features(x))) < 1
    np.testing.assert_array_equal(fsq.numbers(x), TINY.features(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "pq"}, "must be one of"),
        ({"quantizer": "fsq", "levels": (3, 5)}, "make 15 codes"),
        ({"quantizer": "grouped", "num_bits": 5}, "does not divide"),
    ],
)
def test_codebooks_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_terms_of_a_codebook():
    """VQ moves its table towards the features; FSQ adds nothing; groups have an entropy each."""
    features = jnp.asarray([[0.5, -0.5, 0.2, 0.1], [-0.5, 0.5, 0.3, -0.1]])
    codes = jnp.sign(features)

    def terms(quantizer, features, codes):
        config = SimpleNamespace(
            codec=SimpleNamespace(quantizer=quantizer), commitment=0.5, entropy=1.0,
            entropy_tokens=8,
        )  # fmt: skip
        return codec_loss.quantizer_terms(features, codes, config)

    assert terms("fsq", features, codes) == (0.0, {})
    own = jax.grad(lambda c: terms("vq", features, c)[0])(codes)
    np.testing.assert_allclose(own, 2 * (codes - features) / features.size, rtol=1e-5)
    parts = [codec_loss.missing_entropy(part, codebook(2), 8) for part in jnp.split(features, 2, 1)]
    grouped = terms("grouped", features.reshape(2, 2, 2), codes.reshape(2, 2, 2))[1]
    np.testing.assert_allclose(grouped["missing_entropy"], sum(parts) / 2, rtol=1e-5)


def test_dead_rows_restart_at_features():
    table = jnp.asarray([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0]])
    params = {"quantizer": {"table": table}, "encoder": jnp.ones(())}
    state = TrainState(jnp.asarray(1), params, None, params)
    config = SimpleNamespace(
        codec=SimpleNamespace(quantizer="vq"),
        restart_every=2,
        steps=8,
        seed=0,
        freeze_encoder=False,
    )
    restarts = Restarts(config, lambda params, x: x)
    batch = jnp.asarray([[0.1, 0.0], [1.1, 1.0]])
    changed = restarts(state, batch)
    for tree in (changed.params, changed.ema):
        found = np.asarray(tree["quantizer"]["table"])
        np.testing.assert_array_equal(found[[0, 2]], table[np.array([0, 2])])
        assert any(np.array_equal(found[1], row) for row in np.asarray(batch))
    late = state._replace(step=jnp.asarray(7))
    assert restarts(late, batch) is late


@pytest.mark.parametrize("quantizer", [LFQ(3), FSQ((4, 2)), VQ(jnp.arange(10.0).reshape(5, 2))])
def test_numbers_of_codes_have_mean_0_and_variance_1(quantizer):
    numbers = code_numbers(quantizer)
    assert numbers.shape == (quantizer.num_codes, quantizer.num_features)
    np.testing.assert_allclose(numbers.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(numbers.std(axis=0), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def grouped():
    """A prior over two tokens of four codes per place, with the weights that are trained."""
    config = TransformerConfig(
        vocab_size=9, num_outputs=8, width=8, num_layers=1, num_heads=1, mlp_width=8,
        rope_axes=2, absolute_side=2, token_groups=2,
    )  # fmt: skip
    numbers = code_numbers(GROUPS)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "model": jax.jit(lambda key: init_transformer_params(key, config))(keys[0]),
        "head_bits": jax.random.normal(keys[1], (8, 4)),
        "embed_numbers": jax.random.normal(keys[2], (4, 8)),
    }
    return config, params, make_prior(config, merge(params, numbers))


def test_grouped_priors_see_every_token(grouped):
    _, _, prior = grouped
    tokens = jnp.full((1, 2, 2, 2), prior.num_codes, jnp.int32)
    cell = jnp.zeros(tokens.shape, bool).at[0, 0, 1]
    given = (tokens, *(jnp.where(cell.set(jnp.arange(2) == g), 2, tokens) for g in range(2)))
    logits = jax.jit(prior.apply)(prior.params, jnp.concatenate(given))
    assert prior.num_codes == 4 and logits.shape == (3, 2, 2, 2, 4)
    empty, first, second = logits
    assert jnp.all(jnp.any(first != empty, axis=-1))
    assert jnp.all(jnp.any(first != second, axis=-1))


PROMPT = PromptConfig(num_codes=4, mask_token_id=8, pad_token_id=9, begin_id=10, length=3)


def test_a_grouped_prior_reads_prompts():
    """Its logits against those of the sequence that it should read, place by place."""
    config = TransformerConfig(
        vocab_size=13, num_outputs=8, width=8, num_layers=2, num_heads=1, mlp_width=8,
        rope_axes=2, absolute_side=2, token_groups=2,
    )  # fmt: skip
    params = jax.jit(lambda key: init_transformer_params(key, config))(jax.random.key(0))
    tokens = jnp.asarray([[[[0, 3], [4, 1]], [[2, 4], [4, 4]]]], jnp.int32)
    ids, first = sequence_ids(PROMPT, jnp.asarray([9, 11, 12]), tokens)
    expected = [[9, 9], [11, 11], [12, 12], [10, 10], [0, 7], [8, 5], [2, 8], [8, 8]]
    np.testing.assert_array_equal(ids[0], expected)
    assert first == 4 and ids.dtype == tokens.dtype
    mask = np.asarray(attention_mask(PROMPT, ids, 3))
    np.testing.assert_array_equal(mask, attention_mask(PROMPT, ids[..., 0], 3))

    table = params["embed"]["embedding"]
    summed = jnp.stack([table[np.asarray(place)].sum(axis=0) for place in expected])[None]
    positions = sequence_positions(4, 2, 2, 0)
    model = Transformer(config)
    hidden = model.apply({"params": params}, summed, positions, mask, method="hidden_of")
    plain = model.apply({"params": params}, hidden[:, 4:], method="logits")
    prompted = make_prompted_prior(
        config, params, prompt=PROMPT, prompt_ids=[9, 11, 12], uncond_prompt_ids=[]
    )
    logits = jax.jit(prompted.apply)(prompted.params, tokens)
    assert logits.shape == (1, 2, 2, 2, 4) and prompted.num_codes == 4
    np.testing.assert_allclose(logits.reshape(1, 4, 8), plain, rtol=1e-5, atol=1e-5)
    alone = jax.jit(prompted.apply_unconditional)(prompted.params, tokens)
    assert np.abs(alone - logits).max() > 1e-3
    with pytest.raises(ValueError, match="image ids end at 10; head has 8 columns"):
        wide = dataclasses.replace(PROMPT, num_codes=5)
        make_prompted_prior(config, params, prompt=wide, prompt_ids=[9])


def test_loss_of_a_grouped_prior_is_its_cross_entropy(grouped):
    config, params, prior = grouped
    key = jax.random.key(1)
    tokens = jax.random.randint(jax.random.key(2), (3, 2, 2, 2), 0, 4)
    numbers = code_numbers(GROUPS)
    loss = jax.jit(lambda p: masked_loss(p, tokens, None, key, config, numbers, 8)[0])(params)
    order, counts = draw_masks(key, 3, 8)
    is_masked = (jnp.argsort(order, axis=-1) < counts[:, None]).reshape(tokens.shape)
    logits = jax.jit(prior.apply)(prior.params, jnp.where(is_masked, 4, tokens))
    losses, _ = cross_entropy(logits, tokens)
    np.testing.assert_allclose(loss, losses[is_masked].mean(), rtol=1e-5)


def test_tables_show_what_there_is():
    plan = tokenizer_models.load(tokenizers.CONFIG)
    cells = [("training", "card"), ("reconstruction", "codec"), ("bits", "prior")]
    cells += [("super-resolution x4", method) for method in ("aps", "no prior")]
    made = [
        {"tokenizer": "VQ", "task": task, "method": method, "image": str(image),
         "psnr": 20.0 + image + (method == "aps"), "lpips": 0.1, "residual": 0.1,
         "bits_per_pixel": 0.4, "codes_used": 900, "unigram_ce": 5.0, "uniform_ce": 6.931,
         "codec_seconds": 9, "prior_seconds": 9}
        for task, method in cells for image in range(2)
    ]  # fmt: skip
    text = tokenizer_report.tables(plan, made)
    assert "+1.00 ± 0.00" in text and "VQ" in text and "FSQ" not in text


def test_every_codebook_of_the_study_has_one_rate():
    plan = tokenizer_models.load(tokenizers.CONFIG)
    configs = {
        label: tokenizer_models.codec_config(plan, label, data=(), eval_data=None, out=None)
        for label in plan.tokenizers
    }
    assert {config.codec.num_bits for config in configs.values()} == {10}
    assert configs["FSQ"].codec.levels == (8, 8, 4, 4)


def test_the_committed_table_is_that_of_the_committed_rows():
    folder = tokenizers.CONFIG.parents[1] / "results" / "tokenizers"
    found = rows.read(folder / "rows.jsonl", tokenizers.NEEDED)
    plan = tokenizer_models.load(tokenizers.CONFIG)
    assert tokenizer_report.tables(plan, found) == (folder / "table.md").read_text()
