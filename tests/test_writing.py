"""Lines of text under a reward: tokenizer, reward, target, samplers and `aps-jax write`."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from safetensors import safe_open

from aps_jax import cli, energies, pretrained
from aps_jax.io import checkpoint
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params
from aps_jax.samplers import sample_target
from aps_jax.sampling.target import make_target
from aps_jax.text.classifier import ClassifierConfig, TextReward, init_classifier_params
from aps_jax.text.tokenizer import load_tokenizer
from aps_jax.writing import load_writer, text_config
from experiments import lines
from experiments.studies import toy_priors
from experiments.train import text as train_text

TEXTS = [
    "the food was great and the staff was friendly .",
    "i 'm not going back , the food was cold !",
    "good coffee at $ 2 ( really ) .",
]
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of random weights."""
    folder = tmp_path_factory.mktemp("writer")
    lines.train_tokenizer(TEXTS, folder / "tokenizer.json", 80)
    tokenizer = load_tokenizer(folder)
    prior = TransformerConfig(
        vocab_size=tokenizer.size + 1, width=8, num_layers=1, num_heads=2, mlp_width=8,
        tie_embeddings=True,
    )  # fmt: skip
    reward = ClassifierConfig(
        vocab_size=tokenizer.size, width=6, hidden=5, vocabulary=tokenizer.fingerprint()
    )
    for name, init, config in (
        ("prior", init_transformer_params, prior), ("classifier", init_classifier_params, reward)
    ):  # fmt: skip
        params = jax.tree.map(lambda leaf: 0.3 * leaf, random_params(init, config))
        checkpoint.save_params(folder / f"{name}.safetensors", params)
        checkpoint.update_card(folder, **{name: dataclasses.asdict(config)})
    checkpoint.update_card(folder, prior_window=LENGTH, text={"length": LENGTH, "end_id": 0})
    return folder


@pytest.fixture(scope="module")
def writer(folder):
    return load_writer(folder)


@pytest.fixture(scope="module")
def reward():
    """Random weights that tell four words apart."""
    config = ClassifierConfig(vocab_size=4, width=3, hidden=5, reach=1)
    params = random_params(init_classifier_params, config)
    return TextReward(jax.tree.map(lambda leaf: 1.5 * leaf, params), config)


# The tokenizer and the parts of the data.


def test_text_comes_back_from_its_ids(writer):
    for text in TEXTS:
        ids = writer.tokenizer.encode(text)
        assert writer.tokenizer.decode(ids) == text
        assert writer.tokenizer.encode(text.upper()) == ids
        assert 0 not in ids and max(ids) < writer.tokenizer.size
    assert len(writer.tokenizer.encode("the food")) < len("the food")
    with pytest.raises(ValueError, match="does not know 'é'"):
        writer.tokenizer.encode("café")


def test_a_vocabulary_has_a_fingerprint_of_its_own(folder, writer, tmp_path):
    lines.train_tokenizer(TEXTS[:2], tmp_path / "tokenizer.json", 80)
    assert load_tokenizer(folder).fingerprint() == writer.tokenizer.fingerprint()
    assert load_tokenizer(tmp_path).fingerprint() != writer.tokenizer.fingerprint()


def test_parts_are_disjoint_blocks_and_labels_come_from_names(tmp_path):
    for label in (0, 1):
        rows = [f"line {number} of {label}" for number in range(2 * 20 * lines.BLOCK)]
        (tmp_path / f"a.{label}").write_text("\n".join(rows))
    parts = {name: lines.read_lines((tmp_path,), name) for name in lines.PARTS}
    texts = [line.text for part in parts.values() for line in part]
    assert len(set(texts)) == len(texts) == 2 * 2 * 20 * lines.BLOCK
    for name, share in lines.PARTS.items():
        assert len(parts[name]) == 2 * 2 * share * lines.BLOCK
        assert all(line.text.endswith(str(line.label)) for line in parts[name])
    with pytest.raises(ValueError, match="no text at"):
        lines.read_lines((tmp_path / "absent",))


# The reward.


def reference_logits(params, x):
    """The classifier in NumPy, token by token."""
    from scipy.special import erf, softmax

    del erf  # Flax's GELU is the tanh form.
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = []
    for line in np.asarray(x, np.float64):
        hidden = []
        for place in range(len(line)):
            near = [
                line[p] if 0 <= p < len(line) else np.zeros(line.shape[1])
                for p in range(place - 1, place + 2)
            ]
            h = np.concatenate(near) @ params["mix"]["kernel"] + params["mix"]["bias"]
            hidden.append(h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2)
        hidden = np.stack(hidden)
        shares = softmax(hidden @ params["score"]["kernel"][:, 0])
        rows.append(shares @ hidden @ params["out"]["kernel"] + params["out"]["bias"])
    return np.stack(rows)


def test_reward_and_its_gradient_against_numpy(reward, rng):
    x = rng.normal(size=(2, 1, 5, 3)).astype(np.float32)
    expected = reference_logits(reward.params, x[:, 0])
    np.testing.assert_allclose(reward(jnp.asarray(x)), expected, atol=1e-5)

    energy = energies.text_reward(reward, "positive")
    mixed = energies.text_reward(reward, ["negative", "positive"])(jnp.asarray(x))
    np.testing.assert_allclose(jnp.exp(-mixed[0]) + jnp.exp(-energy(jnp.asarray(x))[0]), 1.0)
    value, back = jax.vjp(energy, jnp.asarray(x))

    def reference(x):
        logits = reference_logits(reward.params, x[:, 0])
        return np.log(np.exp(logits).sum(axis=1)) - logits[:, 1]

    np.testing.assert_allclose(value, reference(x), atol=1e-5)
    gradient = np.asarray(back(jnp.ones(2))[0])
    for place in [(0, 0, 0, 1), (1, 0, 4, 2), (0, 0, 2, 0)]:
        step = np.zeros(x.shape)
        step[place] = 1e-5
        slope = (reference(x + step) - reference(x - step)).sum() / 2e-5
        np.testing.assert_allclose(gradient[place], slope, atol=1e-4)


def test_rows_of_the_table_have_one_length_and_are_nearest_to_themselves(reward):
    table = reward.codec.quantizer.table
    np.testing.assert_allclose(jnp.linalg.norm(table, axis=-1), 3**0.5, rtol=1e-5)
    tokens = jnp.array([[[0, 1, 2, 3]]])
    codes = reward.codec.quantizer.lookup(tokens)
    np.testing.assert_array_equal(reward.codec.quantizer.nearest(codes), tokens)


# Sampling.


def test_exact_samplers_reach_the_posterior_of_a_reward(reward):
    """A perfect prior over 64 lines and a reward that is linear in nothing."""
    joint = np.random.default_rng(3).dirichlet(np.full(64, 0.7))
    every = toy_priors.fields(4, 3)
    energy = energies.scaled(energies.text_reward(reward, "positive"), 3.0)
    prior = toy_priors.table_prior(joint, 4, 3)
    chance = np.asarray(reward.probabilities(jnp.asarray(every)))[:, 1]
    law = joint * chance**3
    law /= law.sum()
    untouched = toy_priors.total_variation(joint, law)
    assert untouched > 0.25

    rows, in_order = 1500, {"num_steps": 3, "reveal": "random", "schedule": "linear"}
    target = make_target(prior, reward.codec, energy, grid=(1, 3), batch=rows)

    def distance(name, **options):
        config = text_config(name, **in_order, **options)
        result = jax.jit(sample_target)(target, jax.random.key(0), config=config)
        found = toy_priors.frequencies(np.asarray(result.tokens), 4)
        return toy_priors.total_variation(found, law)

    draws = np.random.default_rng(0).multinomial(rows, law) / rows
    floor = toy_priors.total_variation(draws, law)
    assert distance("smc", num_particles=24, weights="absolute", num_fills=4) < floor + 0.04
    # It weighs a candidate by one likely fill, which is not its value, and so only comes near.
    near = distance("svdd_pm", num_candidates=12, selection="sample", selection_temperature=1.0)
    assert near < 0.6 * untouched


@pytest.mark.parametrize("sampler", ["aps", "entrgi"])
def test_prompts_stay_and_lines_follow_the_seed(writer, sampler):
    target = writer.target("positive", prompt=TEXTS[0][:8], num_lines=3, weight=2.0)
    config = text_config(sampler, num_steps=3, num_inner_steps=2)
    run = jax.jit(sample_target)
    one, same, other = (
        np.asarray(run(target, jax.random.key(seed), config=config).tokens) for seed in (0, 0, 1)
    )
    ids = writer.tokenizer.encode(TEXTS[0][:8])
    np.testing.assert_array_equal(one[:, : len(ids)], [ids] * 3)
    assert one.max() < writer.tokenizer.size
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one[0] != one[1]).any()
    assert all(line.startswith(TEXTS[0][:8]) for line in writer.lines(one))


def test_lines_of_several_prompts_follow_each_other(writer):
    prompts = ["the food", "i 'm"]
    target = writer.target(["positive", "negative"], prompt=prompts, num_lines=2, length=8)
    assert target.tokens.shape == (4, 8)
    for row, text in enumerate(np.repeat(prompts, 2)):
        ids = writer.tokenizer.encode(text)
        np.testing.assert_array_equal(target.tokens[row, : len(ids)], ids)
        assert (target.tokens[row, len(ids) :] == target.mask).all()
    np.testing.assert_array_equal(target.energy.data, [1, 1, 0, 0])
    for options, message in (
        ({"prompt": []}, "one prompt"),
        ({"prompt": prompts, "num_lines": 0}, "one line"),
        ({"prompt": [*prompts, "a"]}, "2 labels are given for 3 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.target(["positive", "negative"], **options)


def test_ids_of_a_line_end_and_come_back(writer):
    text = "the food was cold !"
    ids = writer.ids(text)
    dirty = np.where((np.arange(LENGTH) > LENGTH - 2), 5, ids)
    np.testing.assert_array_equal(writer.settled(dirty[None])[0], ids)
    assert ids.shape == (LENGTH,) and ids[-1] == 0 and writer.lines(ids[None]) == [text]


# The command.


def test_write_makes_a_file_and_a_record(folder, tmp_path, capsys):
    words = [
        "write", "--model", str(folder), "--reward", "negative", "--prompt", "the food",
        "--num-samples", "2", "--num-steps", "2", "--num-inner-steps", "1",
    ]  # fmt: skip
    out = tmp_path / "new" / "text.txt"
    assert cli.main([*words, "--out", str(out)]) == 0
    written = out.read_text().splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == written and len(written) == 2
    assert all(line.startswith("the food") for line in written)
    record = json.loads((out.parent / "result.json").read_text())
    assert [line["text"] for line in record["lines"]] == written
    judge = load_writer(folder)
    ids = np.array([line["ids"] for line in record["lines"]])
    assert judge.lines(ids) == written and (judge.settled(ids) == ids).all()
    chances = judge.reward.probabilities(jnp.asarray(ids))
    np.testing.assert_allclose(
        [line["probability"] for line in record["lines"]], chances[:, 0], atol=1e-5
    )
    assert record["settings"]["reward"] == "negative" and record["config"]["num_steps"] == 2
    assert not (out.parent / ".state").exists()
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["aps", "smc", "best_of_n"])
def test_an_interrupted_command_goes_on_where_it_was(folder, tmp_path, sampler):
    """A real signal to a real process, between two timesteps or in one."""
    words = [
        "write", "--model", str(folder), "--reward", "positive", "--prompt", "the",
        "--sampler", sampler, "--num-samples", "400", "--num-steps", "12",
    ]  # fmt: skip
    out = tmp_path / "out"
    # Background jobs of a shell, and so their children, ignore the signal.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from aps_jax.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--out", str(out / "text.txt")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (out / ".state").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert printed == "" and "Traceback" not in err and os.listdir(out) == [".state"]
    last = err.splitlines()[-1]
    assert last.startswith("aps-jax: interrupted; continue with: ") and "--resume" in last

    with safe_open(out / ".state", framework="numpy") as state:
        done = int(state.get_tensor("state.step"))

    # Word for word what the message says to do.
    told = shlex.split(last.split("continue with: ")[1])
    assert told[0] == "aps-jax" and cli.main(told[1:]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "whole" / "text.txt")]) == 0
    names = ["text.txt", "result.json"]
    resumed, whole = ([(place / name).read_text() for name in names]
                      for place in (out, tmp_path / "whole"))  # fmt: skip
    assert resumed[0] == whole[0] and not (out / ".state").exists()
    records = [json.loads(text) for text in (resumed[1], whole[1])]
    assert records[0]["lines"] == records[1]["lines"]
    assert records[0]["history"] == records[1]["history"]
    assert 0 < done < len(records[0]["history"]["num_masked"])


def test_write_refuses_what_it_cannot_do(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("classifier.safetensors", "tokenizer.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    card = checkpoint.read_card(folder)
    checkpoint.update_card(other, classifier=card["classifier"] | {"vocabulary": "0"})
    bare = tmp_path / "bare"
    bare.mkdir()
    checkpoint.update_card(bare, **card)
    base = {"--model": str(folder), "--reward": "positive", "--out": str(tmp_path / "out" / "a")}
    for change, words in (
        ({"--reward": "posetive"}, "unknown reward 'posetive', did you mean 'positive'"),
        ({"--prompt": "the food " * 12}, "lines have at most 12 here, their end included: shorten"),
        ({"--prompt": "café"}, "does not know 'é'"),
        ({"--reward-model": str(other)}, "reads another vocabulary"),
        ({"--reward-model": str(tmp_path / "none")}, "no model"),
        ({"--model": str(bare)}, "tokenizer.json"),
        ({"--model": "photo64"}, "writes no lines of text"),
        ({"--sampler": "apss"}, "unknown sampler 'apss', did you mean 'aps'"),
        ({"--option": "num_fills=2"}, "num_fills"),
        ({"--option": "guidance_scale=3"}, "--option guidance_scale is of images"),
        ({"--option": "decode_scale=4"}, "--option decode_scale is of images"),
        ({"--sampler": "aps-l"}, "--sampler aps-l is of images"),
        ({"--weight": "-1"}, "--weight must be"),
        ({"--num-samples": "0"}, "--num-samples must be at least 1"),
        ({"--length": "13"}, "lines have from 2 to 12 tokens, got 13"),
        ({"--out": str(tmp_path)}, "is a folder"),
    ):
        argv = [word for pair in (base | change).items() for word in pair]
        assert cli.main(["write", *argv]) == 2, change
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, (change, err)
    assert not (tmp_path / "out").exists()
    (bare / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match=r"classifier.safetensors"):
        load_writer(bare)


@pytest.mark.slow
def test_a_training_goes_on_from_a_model(tmp_path, capsys):
    for label in (0, 1):
        (tmp_path / f"data.{label}").write_text("\n".join(TEXTS * 700))
    common = {"data": tuple(tmp_path.glob("data.*")), "smoke": True}
    first, second = (tmp_path / name for name in ("first", "second"))
    assert train_text.main(train_text.Config(out=first, **common)) == 0
    config = train_text.Config(out=second, init=first / "model", learning_rate=0.0, **common)
    assert train_text.main(config) == 0
    folders = [out / "model" for out in (first, second)]
    for name in ("tokenizer.json", "prior.safetensors"):  # Nothing was learnt at this rate.
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    cards = [checkpoint.read_card(folder) for folder in folders]
    assert cards[1]["prior_training"]["started_from"] == cards[0]["prior_training"]
    assert cards[1]["prior"] == cards[0]["prior"] and cards[1]["text"] == cards[0]["text"]
    capsys.readouterr()
    config = train_text.Config(out=tmp_path / "third", init=Path("photo64"), **common)
    assert train_text.main(config) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The embedded model.


@pytest.mark.skipif("lines32" not in pretrained.EMBEDDED_MODELS, reason="not embedded")
def test_the_embedded_model_is_small_and_knows_good_from_bad():
    folder = pretrained.model_folder("lines32")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    writer = load_writer("lines32")
    good = ["the food was great and the staff is friendly .", "i love this place !"]
    bad = ["the food was cold and the staff is rude .", "i will never go back !"]
    ids = jnp.asarray(np.stack([writer.ids(line) for line in [*good, *bad]]))
    chance = writer.reward.probabilities(ids)[:, 1]
    assert chance[:2].min() > 0.8 > 0.2 > chance[2:].max()
    # The prior finds the right word in its place better than chance by far.
    masked = ids.at[:, 2].set(writer.prior.num_codes)
    logits = writer.prior.apply(writer.prior.params, masked[:, None])[:, 0, 2]
    own = jax.nn.log_softmax(logits)[jnp.arange(4), ids[:, 2]]
    assert own.mean() > 2 - np.log(writer.prior.num_codes)
