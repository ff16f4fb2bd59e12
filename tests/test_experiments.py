"""The trainings and studies run end to end on tiny settings and generated photos."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import aps_jax
from aps_jax.codec import lfq
from aps_jax.codec.magvit2 import (
    CodecConfig,
    PatchPath,
    encode_tokens,
    init_codec_params,
    make_codec,
    reconstruct,
    space_to_depth,
)
from aps_jax.io.checkpoint import load_params, read_card
from aps_jax.pretrained import load_codec
from aps_jax.prior.bundle import make_prior
from aps_jax.prior.transformer import (
    CodeEmbedding,
    TransformerConfig,
    init_transformer_params,
)
from aps_jax.prior.windows import prior_logits
from experiments import photos, training
from experiments.bench import command as benchmark
from experiments.train import (
    captions,
    celeba_captions,
    codec_loss,
    codec_yardsticks,
    patches,
    prior_scores,
    widening,
    window_placement,
)
from experiments.train import codec as train_codec
from experiments.train import prior as train_prior
from experiments.train.masked_loss import code_numbers, merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Smooth colour fields with an edge: photos enough for a codec to learn something."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 96)
    for index in range(6):
        corners = rng.uniform(0, 255, (2, 3))
        image = ramp[:, None, None] * corners[0] + ramp[None, :, None] * corners[1]
        image[:, : rng.integers(20, 70)] *= 0.5
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def codec_run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("codec")
    # Its many kernels take Muon long to compile; the prior's run has it.
    config = train_codec.Config(
        data=(folder,), eval_data=folder, out=out, smoke=True, optimizer="adamw"
    )
    train_codec.train(config)
    return config


@pytest.fixture(scope="module")
def prior_run(folder, codec_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("prior")
    config = train_prior.Config(
        data=(folder,), eval_data=folder, codec=codec_run.out / "model", out=out, smoke=True
    )
    train_prior.train(config)
    return config


def test_codec_training_leaves_model_log_and_pictures(codec_run):
    rows = training.read_rows(codec_run.out / "codec.jsonl")
    assert rows[-1]["step"] == codec_run.resolved().steps
    assert np.isfinite(rows[-1]["eval_psnr"])
    for name in ("codec_curves.png", "codec_reconstructions.png", "model/codec.safetensors"):
        assert (codec_run.out / name).stat().st_size > 100
    assert read_card(codec_run.out / "model")["codec_training"]["steps"] == rows[-1]["step"]
    assert read_card(codec_run.out / "model")["codec_training"]["data"] == [
        path.name for path in codec_run.data
    ]  # no paths of this machine


@pytest.mark.slow
def test_interrupted_codec_training_repeats_the_uninterrupted_one(codec_run, tmp_path):
    """Half the steps, a stop, the other half: the same weights as in one go."""
    config = dataclasses.replace(codec_run, out=tmp_path)
    whole = codec_run.resolved()
    half = dataclasses.replace(whole, smoke=False, out=tmp_path, minutes=1e-9, eval_every=1)
    train_codec.train(half)  # out of time after the first step
    assert training.read_rows(tmp_path / "codec.jsonl")[-1]["step"] == 1
    train_codec.train(config)
    names = "model/codec.safetensors"
    assert (tmp_path / names).read_bytes() == (codec_run.out / names).read_bytes()


def test_a_training_saved_before_its_first_row_goes_on(codec_run, tmp_path):
    """Checkpoints may come before rows of the log, which are every 25 steps."""
    config = dataclasses.replace(codec_run.resolved(), smoke=False, out=tmp_path, save_every=1)
    half = dataclasses.replace(config, minutes=1e-9)
    train_codec.train(half)
    (tmp_path / "codec.jsonl").unlink()
    train_codec.train(half)
    assert training.read_rows(tmp_path / "codec.jsonl")[-1]["step"] == 2


@pytest.mark.slow
def test_training_on_four_devices_equals_that_on_one(folder, codec_run, tmp_path):
    """Device counts are fixed when JAX starts, so the run has a process of its own."""
    command = [sys.executable, "-m", "experiments.train_codec", "--smoke", "--tensorboard"]
    command += ["--data", folder, "--eval-data", folder, "--out", tmp_path, "--optimizer", "adamw"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=environment, check=True, timeout=400)
    for row, expected in zip(
        training.read_rows(tmp_path / "codec.jsonl"),
        training.read_rows(codec_run.out / "codec.jsonl"),
        strict=True,
    ):
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=2e-3), name
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval_psnr" in events.read_bytes()


@pytest.mark.slow
def test_training_in_bfloat16_follows_that_in_float32(codec_run, tmp_path):
    train_codec.train(dataclasses.replace(codec_run, out=tmp_path, dtype="bfloat16"))
    rows = [training.read_rows(out / "codec.jsonl")[-1] for out in (tmp_path, codec_run.out)]
    assert rows[0]["mse"] != rows[1]["mse"]
    assert rows[0]["mse"] == pytest.approx(rows[1]["mse"], rel=0.05)
    assert read_card(tmp_path / "model")["codec"]["dtype"] == "float32"


def test_a_missing_writer_for_tensorboard_is_an_error(codec_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = dataclasses.replace(codec_run, out=tmp_path, tensorboard=True)
    with pytest.raises(ValueError, match="needs tensorboardX; run: pip install"):
        training.fit(None, None, None, None, config, tmp_path / "log")


@pytest.mark.slow
def test_training_starts_from_given_weights(codec_run, prior_run, tmp_path):
    """With a vanishing learning rate the exported weights are the initial ones."""
    still = {"init": prior_run.out / "model", "learning_rate": 1e-12, "weight_decay": 0.0}
    train_codec.train(dataclasses.replace(codec_run, out=tmp_path / "codec", **still))
    train_prior.train(dataclasses.replace(prior_run, out=tmp_path / "prior", **still))
    for part, run in (("codec", codec_run), ("prior", prior_run)):
        before = load_file(run.out / "model" / f"{part}.safetensors")
        after = load_file(tmp_path / part / "model" / f"{part}.safetensors")
        for name, tensor in before.items():
            np.testing.assert_allclose(after[name], tensor, atol=2e-3, err_msg=name)
        card = read_card(tmp_path / part / "model")
        assert card[f"{part}_training"]["started_from"]["steps"] == run.resolved().steps


def test_a_table_starts_as_the_codes_of_signs_it_replaces(codec_run, prior_run, tmp_path):
    """The codec and the prior of a table are at first those that they go on from."""
    init = prior_run.out / "model"
    given = aps_jax.load_pretrained(init)
    table = dataclasses.replace(CodecConfig(), quantizer="vq")
    config = dataclasses.replace(codec_run, init=init, codec=table, out=tmp_path).resolved()
    assert config.codec.quantizer == "vq" and config.codec.code_width == 6
    codec = make_codec(config.codec, train_codec.initial_params(config, []))
    tokens = jax.random.randint(jax.random.key(1), (2, 8, 8), 0, codec.num_codes)
    np.testing.assert_array_equal(
        codec.quantizer.lookup(tokens), given.codec.quantizer.lookup(tokens)
    )
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
    np.testing.assert_allclose(reconstruct(codec, x), reconstruct(given.codec, x), atol=1e-5)

    config = dataclasses.replace(prior_run, init=init).resolved()
    model = config.transformer(codec.quantizer)
    assert model.code_bits is None
    numbers = code_numbers(codec.quantizer)
    weights = merge(train_prior.initial_params(config, model, codec.quantizer), numbers)
    noisy = jnp.where(tokens % 3 == 0, codec.num_codes, tokens)[:, :4, :4]
    logits = prior_logits(make_prior(model, weights), noisy)
    np.testing.assert_allclose(logits, prior_logits(given.prior, noisy), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_more_bits_in_groups_change_no_picture_at_the_start(codec_run, tmp_path):
    init = codec_run.out / "model"
    given = load_codec(init)
    groups = CodecConfig(quantizer="grouped", num_bits=10, code_groups=2)
    config = dataclasses.replace(codec_run, init=init, codec=groups, out=tmp_path).resolved()
    codec = make_codec(config.codec, train_codec.initial_params(config, []))
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
    tokens = encode_tokens(codec, x)
    assert tokens.shape == (2, 8, 8, 2) and codec.num_codes == 32
    np.testing.assert_allclose(reconstruct(codec, x), reconstruct(given, x), atol=1e-5)
    # Its own bits say something, which nobody listens to yet.
    features = codec.encode(codec.params, x).reshape(-1, 10)
    places = widening.places(6, 5, 2)
    np.testing.assert_array_equal(places, [0, 5, 1, 6, 2, 7])
    new = np.setdiff1d(np.arange(10), places)
    assert np.std(features[:, new], axis=0).min() > 0
    before = given.encode(given.params, x).reshape(-1, 6)
    np.testing.assert_allclose(features[:, places], before, atol=1e-5)
    # A prior whose logits and embeddings are sums over bits is the same prior of groups.
    sizes = TransformerConfig(
        vocab_size=66, num_outputs=64, width=8, num_layers=1, num_heads=1, mlp_width=8, code_bits=6
    )
    weights = init_transformer_params(jax.random.key(3), sizes)
    per_bit = jax.random.normal(jax.random.key(4), (8, 6))
    weights["head"]["kernel"] = per_bit @ lfq.codebook(6).T
    wide = widening.prior_of(weights, sizes, codec.quantizer)
    rows, kernel = wide["embed"]["embedding"], wide["head"]["kernel"]
    assert rows.shape == (66, 8) and kernel.shape == (8, 64)
    old, mask = encode_tokens(given, x), jnp.full((2, 8, 8), 64)
    for own, ids in ((old, tokens + 32 * jnp.arange(2)), (mask, jnp.full((2, 8, 8, 2), 64))):
        expected = CodeEmbedding(sizes).apply({"params": weights["embed"]}, own.reshape(2, -1))
        found = rows[ids].sum(axis=3).reshape(2, 64, 8)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    together = kernel[:, tokens[..., 0]] + kernel[:, 32 + tokens[..., 1]]
    np.testing.assert_allclose(together, weights["head"]["kernel"][:, old], atol=1e-5)
    few = dataclasses.replace(groups, num_bits=4)
    with pytest.raises(ValueError, match="num-bits 4 is less than the 6 bits of --init"):
        dataclasses.replace(codec_run, init=init, codec=few, out=tmp_path).resolved()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_a_frozen_encoder_stays_and_the_decoder_learns(codec_run, tmp_path, quantizer):
    """So does a table, in which rows that no token uses would be restarted otherwise."""
    init = codec_run.out / "model"
    codec = dataclasses.replace(codec_run.codec, quantizer=quantizer)
    config = dataclasses.replace(
        codec_run, out=tmp_path, init=init, codec=codec, freeze_encoder=True, restart_every=1
    )
    train_codec.train(config)
    before, after = (load_file(f / "codec.safetensors") for f in (init, tmp_path / "model"))
    if quantizer == "vq":
        np.testing.assert_array_equal(after.pop("quantizer/table"), lfq.codebook(6))
    assert before.keys() == after.keys()
    for name in before:
        changed = not np.array_equal(before[name], after[name])
        assert changed == name.startswith("decoder"), name
    assert read_card(tmp_path / "model")["codec_training"]["freeze_encoder"] is True


def test_a_run_goes_on_with_its_own_settings_only(codec_run, tmp_path, capsys):
    """A full run in the folder of a smoke run would otherwise start from its tiny weights."""
    config = dataclasses.replace(codec_run, smoke=False, steps=1)
    assert training.run("train_codec", train_codec.train, config) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_codec: error:") and err.count("\n") == 1
    assert "another run" in err and "choose another folder" in err
    finished = (codec_run.out / "codec.jsonl").read_text()
    assert training.run("train_codec", train_codec.train, codec_run) == 0
    assert (codec_run.out / "codec.jsonl").read_text() == finished


def test_smoke_runs_take_the_sizes_of_given_weights(folder, tmp_path):
    photo64 = aps_jax.load_pretrained("photo64").card
    common = {"data": (folder,), "eval_data": folder, "out": tmp_path, "smoke": True}
    codec = train_codec.Config(init="photo64", **common).resolved()
    assert codec.steps == 6 and codec.codec.num_bits == photo64["codec"]["num_bits"] == 13
    prior = train_prior.Config(init="photo64", codec="photo64", **common).resolved()
    assert prior.steps == 6 and prior.width == photo64["prior"]["width"] == 192
    with pytest.raises(ValueError, match="no model 'photo65'.*photo64"):
        train_prior.Config(init="photo65", codec="photo64", **common).resolved()


@pytest.fixture
def captions_run(folder, prior_run, tmp_path):
    """Absolute positions and words are new; the rest starts from a prior without them."""
    pytest.importorskip("tokenizers")
    lines = ["file,caption", '0.png,"dark, red left"', "1.png,light", '2.png,"light, red left"']
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return dataclasses.replace(
        prior_run,
        out=tmp_path / "out",
        init=prior_run.out / "model",
        optimizer="adamw",
        captions=tmp_path / "captions.csv",
        absolute_positions=True,
        eval_shrink=3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq", "grouped"])
def test_trainings_go_on_from_signs(codec_run, captions_run, tmp_path, quantizer):
    """Codec, then prior with words; the folder is a model that restores with a prompt."""
    wanted = CodecConfig(quantizer=quantizer, num_bits=8, code_groups=2)
    init = codec_run.out / "model"
    codec = dataclasses.replace(
        codec_run, out=tmp_path / "codec", init=init, codec=wanted, code_noise=0.3
    )
    train_codec.train(codec)
    prior = dataclasses.replace(captions_run, codec=codec.out / "model")
    train_prior.train(prior)
    assert training.read_rows(prior.out / "prior.jsonl")[-1]["eval_ce_prompted"] > 0
    model = aps_jax.load_pretrained(prior.out / "model", prompt="dark, red left")
    operator = aps_jax.operators.inpainting_random(fraction=0.5)
    x = jnp.zeros((1, 32, 32, 3))
    operator = operator.init(jax.random.key(0), x)
    y = aps_jax.measure(jax.random.key(1), x, operator=operator, sigma=0.05)
    result = aps_jax.posterior(model, operator, y, jax.random.key(2), sigma=0.05, preset="draft")
    assert result.tokens.shape == (1, 128 if quantizer == "grouped" else 64)
    assert bool(jnp.all(jnp.isfinite(result.images)))


@pytest.mark.slow
def test_prior_training_reads_captions_and_whole_pictures(captions_run):
    train_prior.train(captions_run)
    folder = captions_run.out / "model"
    card = read_card(folder)
    assert card["prior"]["absolute_side"] == 8 and card["prior_window"] is None
    assert card["prior_training"]["eval_ce_1_prompted"] > 0
    model = aps_jax.load_pretrained(folder, prompt="light, Red left")
    masked = jnp.full((1, 8, 8), model.prior.num_codes)
    logits = jax.jit(lambda prior, tokens: prior.apply(prior.params, tokens))(model.prior, masked)
    assert logits.shape == (1, 8, 8, 64) and np.isfinite(logits).all()
    assert model.prior.params["uncond_prompt"].shape == (0,)
    with pytest.raises(ValueError, match="'green' in a prompt; it knows: dark, left, light, red"):
        aps_jax.load_pretrained(folder, prompt="green")


def test_captions_of_other_pictures_are_refused(captions_run, tmp_path):
    (tmp_path / "others.csv").write_text("file,caption\nx.png,dark\n")
    config = dataclasses.replace(captions_run, captions=tmp_path / "others.csv")
    with pytest.raises(ValueError, match="no training picture is named in"):
        train_prior.train(config)
    (tmp_path / "wrong.csv").write_text("name,caption\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['file'\]"):
        captions.read_captions(tmp_path / "wrong.csv")


def test_random_phrases_are_subsets_and_some_prompts_are_dropped():
    rng = np.random.default_rng(0)
    drawn = [captions.random_phrases(rng, ("a", "b c", "d"), drop=0.2) for _ in range(500)]
    share = np.mean([not phrases for phrases in drawn])
    assert 0.14 < share < 0.26 and captions.random_phrases(rng, (), drop=0.0) == ()
    assert {frozenset(phrases) for phrases in drawn} >= {frozenset(("b c",)), frozenset(("a", "d"))}
    words = captions.vocabulary({"": ("a", "b c", "d")}, num_codes=8, max_words=2)
    np.testing.assert_array_equal(
        captions.framed(words, [("a", "b c", "d"), (), ("b c",)]), [[12, 15], [9, 9], [13, 14]]
    )


def test_captions_of_celeba_name_what_is_there_and_not():
    attributes = dict.fromkeys(celeba_captions.PHRASES, "-1") | {"Smiling": "1", "Bangs": "1"}
    text = celeba_captions.caption(attributes)
    assert text == "woman, old, smiling, closed mouth, bangs, beard"


def test_damaged_photos_end_a_training_in_one_line(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "half.png").write_bytes((folder / "0.png").read_bytes()[:200])
    config = train_codec.Config(
        data=(folder, broken), eval_data=folder, out=tmp_path / "out", smoke=True
    )
    assert training.run("train_codec", train_codec.train, config) == 2
    err = capsys.readouterr().err
    assert "half.png" in err and err.count("\n") == 1


def test_photos_of_sixteen_bits_keep_their_tones(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    (photo,) = photos.load_photos([tmp_path], min_side=64)
    expected = np.repeat((ramp / 257)[..., None], 3, axis=-1)
    assert photo.mode == "RGB"
    np.testing.assert_allclose(np.asarray(photo, np.float64), expected, atol=0.51)


def test_a_random_encoder_cannot_be_frozen(codec_run, tmp_path):
    with pytest.raises(ValueError, match="needs --init"):
        train_codec.train(dataclasses.replace(codec_run, out=tmp_path, freeze_encoder=True))


def test_patch_training_comes_first_and_is_not_repeated(folder, codec_run, tmp_path):
    """The run starts from a codec that equals its patch path, which learnt something by itself."""
    config = codec_run.resolved()
    random = jax.jit(init_codec_params, static_argnums=1)(jax.random.key(config.seed), config.codec)
    start = load_params(codec_run.out / "patches.safetensors", random)
    x = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3), minval=-1)
    codec = make_codec(config.codec, start)
    path = PatchPath(config.codec, config.codec.num_bits)
    apply = jax.jit(lambda start, x: path.apply({"params": start["encoder"]["patch"]}, x))
    features = apply(start, space_to_depth(x, 4))
    np.testing.assert_allclose(jax.jit(codec.encode)(start, x), features, atol=1e-6)
    pictures = photos.load_photos([folder], min_side=32)
    longer = dataclasses.replace(config, patch_steps=60, warmup=5)
    learnt = patches.train_patches(random, pictures, longer)
    held_out = photos.to_float([photo.crop((0, 0, 32, 32)) for photo in pictures])
    scores = [
        codec_loss.evaluate(params, held_out, config.codec)["eval_psnr"]
        for params in (start, learnt)
    ]
    assert scores[1] > scores[0] + 2


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimizers_fit_a_linear_map_and_keep_the_size_of_steps(codec_run, name):
    """Least squares through stacked matrices [2, 6, 6]: both reach a hundredth of the loss."""
    config = dataclasses.replace(
        codec_run, optimizer=name, learning_rate=0.2, warmup=5, steps=200, weight_decay=0.0
    )
    optimizer = training.make_optimizer(config)
    keys = jax.random.split(jax.random.key(0), 3)
    x, target = jax.random.normal(keys[0], (64, 6)), jax.random.normal(keys[1], (2, 6, 6))

    def loss(params):
        fitted = jnp.einsum("bi,lio->lbo", x, params["kernel"]) + params["bias"]
        return jnp.mean((fitted - jnp.einsum("bi,lio->lbo", x, target)) ** 2)

    params = {"kernel": jax.random.normal(keys[2], (2, 6, 6)), "bias": jnp.ones(6)}
    state, first = training.init_state(params, optimizer), loss(params)
    step = jax.jit(
        lambda state: training.apply_gradients(state, jax.grad(loss)(state.params), optimizer, 0.9)
    )
    for _ in range(200):
        state = step(state)
    assert loss(state.params) < first / 100


def test_muon_orthogonalises_the_updates_of_kernels(codec_run):
    """The singular values of a step hardly differ, however unequal those of the gradient are."""
    config = dataclasses.replace(
        codec_run, optimizer="muon", learning_rate=1.0, warmup=1, weight_decay=0.0
    )
    optimizer = training.make_optimizer(dataclasses.replace(config, steps=1000))
    params = {"conv": jnp.zeros((3, 3, 4, 8)), "stacked": jnp.zeros((2, 8, 8))}
    keys = jax.random.split(jax.random.key(1), 2)
    grads = {
        "conv": jax.random.normal(keys[0], (3, 3, 4, 8)) * 3.0 ** -jnp.arange(8),
        "stacked": jax.random.normal(keys[1], (2, 8, 8)) * 3.0 ** -jnp.arange(8),
    }
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(grads, opt_state, params)  # the warm-up's first step is zero
    updates, _ = optimizer.update(grads, opt_state, params)
    matrices = [updates["conv"].reshape(36, 8), *updates["stacked"]]
    for matrix in matrices:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert values[4] > 0.4 * values[0]


def test_unknown_optimizer_is_an_error(codec_run):
    with pytest.raises(ValueError, match="muon or adamw"):
        training.make_optimizer(dataclasses.replace(codec_run, optimizer="sgd"))


def test_prior_training_leaves_a_model_that_loads_and_scores(prior_run):
    rows = training.read_rows(prior_run.out / "prior.jsonl")
    assert rows[-1]["step"] == prior_run.resolved().steps
    model = aps_jax.load_pretrained(prior_run.out / "model")
    assert model.prior.num_codes == model.codec.num_codes
    assert "prior_training" in model.card


def test_a_trained_model_is_benchmarked(prior_run, folder, tmp_path):
    """One run of the real architecture; what it promises is tested on toy models."""
    study = {
        "model": str(prior_run.out / "model"),
        "images": {"size": 32, "shrink": 2, "count": 2},
        "lpips": False,
        "batch_size": 2,
        "compare_to": "codec",
        "tasks": {"super_resolution": {"scale": 2}},
        "methods": {
            "codec": {"kind": "codec"},
            "aps": {"config": {"num_steps": 2, "num_inner_steps": 1}},
        },
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study))
    arguments = benchmark.Arguments(config=path, data=folder, out=tmp_path / "out")
    assert benchmark.main(arguments) == 0
    assert "| aps | 2 |" in (tmp_path / "out" / "table.md").read_text()


def test_crops_are_a_function_of_seed_and_step(folder):
    pictures = photos.load_photos([folder], min_side=32)
    one = photos.random_batch(pictures, 0, 5, batch_size=3, size=32)
    same = photos.random_batch(pictures, 0, 5, batch_size=3, size=32)
    other = photos.random_batch(pictures, 0, 6, batch_size=3, size=32)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert one.dtype == np.float32 and -1 <= one.min() and one.max() <= 1


def test_crops_leave_plain_ground_where_they_can():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    half = noise.copy()
    half[:, 64:] = 255  # a catalogue picture: something beside white
    assert photos.flat_share(Image.fromarray(noise)) == 0
    assert photos.flat_share(Image.fromarray(half)) == 0.5

    def mean_share(max_flat):
        crops = [
            photos.random_crop(
                np.random.default_rng(seed), Image.fromarray(half), 32, max_flat=max_flat
            )
            for seed in range(40)
        ]
        return np.mean([photos.flat_share(crop) for crop in crops])

    assert mean_share(0.25) < 0.2 < 0.3 < mean_share(1.0)
    white = Image.new("RGB", (64, 64), "white")  # nothing else to find
    crop = photos.random_crop(np.random.default_rng(0), white, 32, max_flat=0.1)
    assert photos.flat_share(crop) == 1


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images below"):
        photos.list_images([tmp_path])


def test_offset_chooses_other_photos(folder):
    names, _ = photos.center_crops(folder, size=32, count=3)
    others, _ = photos.center_crops(folder, size=32, count=3, offset=1)
    assert names == ["0.png", "2.png", "5.png"] and others == ["1.png", "3.png"]


def test_k_means_finds_separate_clusters(rng):
    """The error falls to that of the clusters' own means, also from starts inside one cluster."""
    means = 10 * rng.normal(size=(6, 5))
    label = rng.integers(6, size=600)
    points = jnp.asarray(means[label] + 0.1 * rng.normal(size=(600, 5)), jnp.float32)
    centres = codec_yardsticks.k_means(jax.random.key(0), points, 24, 20)
    error = points - centres[codec_yardsticks.nearest(points, centres)]
    assert jnp.mean(error**2) < 0.1**2
    distances = jnp.sum((points[:, None] - centres[None]) ** 2, axis=-1)
    np.testing.assert_array_equal(
        codec_yardsticks.nearest(points, centres), jnp.argmin(distances, axis=-1)
    )


@pytest.mark.slow
def test_window_placements_are_scored_at_masked_tokens(folder, prior_run, tmp_path):
    model = aps_jax.load_pretrained(str(prior_run.out / "model"))
    out = tmp_path / "windows.json"
    window_placement.main(
        window_placement.Arguments(
            eval_data=folder, out=out, model=str(prior_run.out / "model"), count=3, ratios=(0.5,)
        )
    )
    found = json.loads(out.read_text())
    side = 2 * model.prior.window
    crops = photos.evaluation_crops(folder, size=side * model.codec.stride, shrink=2, count=3)
    assert found["photos"] == len(crops.images) == 3 and found["field"] == side
    names = ("overlap 0", "overlap 0.25", "one call")
    assert [found[name]["windows"] for name in names] == [4, 9, 1]
    tokens = jax.jit(encode_tokens)(model.codec, crops.images).reshape(3, side, side)
    rank = np.argsort(np.random.default_rng(0).random((3, side**2)), axis=-1)
    is_masked = (rank < side**2 / 2).reshape(3, side, side)
    noisy = jnp.where(is_masked, model.prior.num_codes, tokens)
    logits = jax.jit(lambda prior, tokens: prior.apply(prior.params, tokens))(model.prior, noisy)
    log_probs = jax.nn.log_softmax(logits)
    losses = -np.take_along_axis(np.asarray(log_probs), np.asarray(tokens)[..., None], -1)[..., 0]
    expected = np.array([a[b].mean() for a, b in zip(losses, is_masked, strict=True)])
    assert abs(expected.mean() - losses.mean()) > 1e-3  # all tokens would not do
    one_call = found["one call"]
    np.testing.assert_allclose(one_call["ce_0.5"], expected.mean(), atol=1e-4)
    shipped = found["overlap 0.25"]
    assert shipped["ce_0.5_over_shipped"] == [0, 0]
    gain, _ = one_call["ce_0.5_over_shipped"]
    assert gain == pytest.approx(one_call["ce_0.5"] - shipped["ce_0.5"], abs=2e-4)


def test_jpeg_is_the_best_one_within_the_rate(rng):
    ramp = np.linspace(0, 200, 64)
    noise = rng.normal(0, 12, (64, 64, 3))
    pixels = np.clip(ramp[:, None, None] + noise, 0, 255).astype(np.uint8)
    errors = []
    for rate in (3.0, 2.0, 1.0):
        decoded, achieved = codec_yardsticks.jpeg(pixels, rate * 64 * 64)
        assert 0.6 * rate < achieved <= rate
        errors.append(np.mean((decoded.astype(float) - pixels) ** 2))
    assert errors[0] < errors[1] < errors[2]


def test_cross_entropy_is_that_of_a_softmax(rng):
    logits = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    labels = jnp.asarray(rng.integers(7, size=5))
    losses, hits = prior_scores.cross_entropy(logits, labels)
    np.testing.assert_allclose(
        losses, -jax.nn.log_softmax(logits)[jnp.arange(5), labels], rtol=1e-5
    )
    np.testing.assert_array_equal(hits, jnp.argmax(logits, axis=-1) == labels)


def test_neighbours_explain_what_they_determine(rng):
    """Bit 0 copies the left neighbour, bit 1 is a coin: log 2 nats are left of 2 log 2."""
    rows = np.repeat(rng.integers(2, size=(300, 6, 1)), 6, axis=2)
    coins = rng.integers(2, size=rows.shape)
    codes = lfq.codebook(2)
    tokens = np.asarray(
        [int(np.flatnonzero((codes == np.array(pair) * 2 - 1).all(axis=1))[0])
         for pair in np.stack([rows, coins], axis=-1).reshape(-1, 2)]
    ).reshape(rows.shape)  # fmt: skip
    found = prior_scores.neighbour_cross_entropy(tokens[:200], tokens[200:], codes)
    assert abs(found - np.log(2)) < 0.05
    split = {"train": tokens[:200], "eval": tokens[200:]}
    scores = prior_scores.yardsticks(split, lfq.LFQ(2))
    assert abs(scores["unigram_ce"] - 2 * np.log(2)) < 0.02
    assert scores["codes_used"] == 4
