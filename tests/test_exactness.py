"""The enumerable posteriors, and the script that measures samplers against them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aps_jax.io import rows
from experiments.studies import exactness, toy_priors


@pytest.fixture(scope="module")
def toy():
    return toy_priors.make_toy("8x2", is_amplitude=True)


def test_fields_are_numbered_in_order():
    for num_codes, length in ((2, 9), (8, 2), (4, 3)):
        tokens = toy_priors.fields(num_codes, length)
        np.testing.assert_array_equal(
            toy_priors.index_of(tokens, num_codes), np.arange(num_codes**length)
        )
    shares = toy_priors.frequencies(np.array([[1, 0], [1, 0], [0, 3], [7, 7]]), 8)
    assert (shares[8], shares[3], shares[63]) == (0.5, 0.25, 0.25)


def test_conditionals_of_a_table(toy):
    joint = toy.joint.reshape(8, 8)
    tokens = jnp.array([[[8, 8]], [[8, 5]], [[2, 8]], [[2, 5]]])
    logits = toy.params.prior.apply(toy.params.prior.params, tokens)[:, 0]
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    expected = [joint.sum(axis=1), joint[:, 5] / joint[:, 5].sum()]
    np.testing.assert_allclose(probs[:2, 0], expected, atol=1e-6)
    np.testing.assert_allclose(probs[2, 1], joint[2] / joint[2].sum(), atol=1e-6)
    np.testing.assert_allclose(probs[3], np.eye(8)[[2, 5]], atol=1e-6)


def test_what_a_field_predicts(toy):
    """The amplitude of the projection of the decoded picture, by float64 NumPy."""
    bits = (toy_priors.fields(8, 2)[:, :, None] >> np.array([2, 1, 0])) & 1
    codes = (2.0 * bits - 1).reshape(64, 6)
    x = np.tanh(codes @ np.float64(toy.params.codec.params))
    y = np.abs(x @ np.float64(toy.params.operator.params["matrix"]))
    np.testing.assert_allclose(toy.predicted, y, atol=1e-5)
    linear = toy_priors.make_toy("8x2", is_amplitude=False)
    np.testing.assert_allclose(np.abs(linear.predicted), y, atol=1e-5)
    assert linear.predicted.min() < -0.1 and linear.params.operator.is_linear


def test_law_of_patches(rng):
    photo = rng.uniform(-1, 1, (5, 7, 3))
    counts = np.ones(512)
    for top in range(3):
        for left in range(5):
            patch = photo[top : top + 3, left : left + 3].mean(axis=-1).ravel()
            bits = "".join(str(int(value > patch.mean())) for value in patch)
            counts[int(bits, 2)] += 1
    np.testing.assert_allclose(toy_priors.patch_joint(photo), counts / counts.sum())


def test_posterior_and_distances_against_scipy(toy, rng):
    y, sigma = rng.normal(size=4), 0.5
    likelihood = stats.norm.pdf(y, toy.predicted, sigma).prod(axis=1)
    expected = toy.joint * likelihood / (toy.joint @ likelihood)
    exact = toy_priors.exact_posterior(toy.joint, toy.predicted, y, sigma)
    np.testing.assert_allclose(exact, expected, rtol=1e-9)
    other = rng.dirichlet(np.ones(64))
    assert toy_priors.kl_divergence(other, exact) == pytest.approx(stats.entropy(other, exact))
    assert toy_priors.total_variation(other, exact) == pytest.approx(
        np.maximum(other - exact, 0).sum()
    )
    assert toy_priors.kl_divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == np.inf


def test_perfect_samples_reach_the_floor_and_others_do_not(toy, rng):
    y, fields = rng.normal(size=(2, 4)), toy_priors.fields(8, 2)
    laws = [toy_priors.exact_posterior(toy.joint, toy.predicted, row, 0.5) for row in y]
    drawn = np.concatenate([fields[rng.choice(64, p=law, size=2000)] for law in laws])
    found = exactness.distances(np.stack(laws), drawn, 8)
    assert found["total_variation"] == pytest.approx(found["floor"], rel=0.4)
    assert found["kl"] == pytest.approx(found["kl_floor"], rel=0.6)
    swapped = np.concatenate(np.split(drawn, 2)[::-1])
    far = exactness.distances(np.stack(laws), swapped, 8)
    expected = toy_priors.total_variation(*laws)
    assert far["total_variation"] == pytest.approx(expected, abs=0.05) and expected > 0.3


def test_labels_of_a_reward_are_drawn_for_in_order():
    """The posterior against the energy that samplers see, in NumPy and by Bayes' rule."""
    toy = toy_priors.make_reward_toy()
    problem = exactness.make_problem(
        "4 codes, 3 tokens, reward", exactness.Arguments(num_measurements=3, num_draws=64)
    )
    every = toy_priors.fields(4, 3)
    bits = (every[:, :, None] >> np.array([1, 0])) & 1
    x = np.tanh((2.0 * bits - 1).reshape(64, 6) @ np.float64(toy.codec.params))
    logits = np.tanh(x @ np.float64(toy.net.hidden)) @ np.float64(toy.net.out)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    laws = toy.joint * shares.T**toy.weight
    laws /= laws.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(problem.exact, laws, rtol=1e-4)
    tokens = jnp.asarray(np.tile(every, (3, 1)), jnp.int32)
    energy = jax.jit(lambda target, tokens: target.energy_of(tokens))(problem.targets(None), tokens)
    np.testing.assert_allclose(energy, -toy.weight * np.log(shares.T).ravel(), atol=1e-4)
    # What is wanted differs between labels, and from what the prior gives.
    for other in (toy.joint, laws[0], laws[1]):
        assert toy_priors.total_variation(laws[2], other) > 0.4
    assert toy_priors.total_variation(laws[0], toy.joint) > 0.4
    # A line through the bits misses a good part of the reward: it is not linear.
    design = np.c_[np.ones(64), bits.reshape(64, 6)]
    for share in np.log(shares).T:
        rest = share - design @ np.linalg.lstsq(design, share, rcond=None)[0]
        assert rest.std() > 0.3 * share.std()


def test_measurements_are_noisy_pictures_of_the_prior(toy):
    arguments = exactness.Arguments(num_measurements=400, sigma=0.5)
    y = exactness.measurements(toy, arguments)
    clean = exactness.measurements(toy, dataclasses.replace(arguments, sigma=0.0))
    noise = y - clean
    assert noise.shape == (400, 4) and stats.kstest(noise.ravel() / 0.5, "norm").pvalue > 0.01
    distance = np.abs(clean[:, None] - toy.predicted).max(axis=-1)
    assert distance.min(axis=1).max() == 0
    counts = np.bincount(distance.argmin(axis=1), minlength=64)
    law = np.zeros(64)  # Fields that look alike are counted as the first of them.
    first = np.abs(toy.predicted[:, None] - toy.predicted).max(axis=-1).argmin(axis=1)
    np.add.at(law, first, toy.joint)
    assert np.abs(counts / 400 - law).sum() / 2 < 0.2


def test_every_draw_is_compared_with_the_posterior_of_its_measurement(tmp_path, monkeypatch):
    """A sampler that tells which measurement it was given."""

    toy = toy_priors.make_toy("8x2", is_amplitude=False)

    def sample(target, key, *, config):
        y = target.energy.data
        seen.append(y.shape)
        number = jnp.arange(len(y)) % 5  # Draws differ.
        return Drawn(jnp.concatenate([number[:, None], y], axis=1))

    def distances(exact, tokens, num_codes):
        for law, own in zip(exact, np.split(tokens, len(exact)), strict=True):
            np.testing.assert_array_equal(own[:, 0], np.arange(len(own)) % 5)
            for y in own[:, 1:]:
                expected = toy_priors.exact_posterior(toy.joint, toy.predicted, y, 0.5)
                np.testing.assert_allclose(law, expected, rtol=1e-4)
        names = ("total_variation", "kl", "floor", "kl_floor")
        return dict.fromkeys(names, 0.5)

    class Drawn(NamedTuple):
        tokens: jax.Array

    seen = []
    monkeypatch.setattr(exactness, "sample_target", sample)
    monkeypatch.setattr(exactness, "METHODS", {"prior": exactness.METHODS["prior"]})
    monkeypatch.setattr(exactness, "distances", distances)
    arguments = exactness.Arguments(out=tmp_path, num_measurements=3, num_draws=10, toys=("8x2",))
    exactness.run(arguments)
    assert seen == [(30, 4)]
    table = exactness.table(
        [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    )
    assert "| prior | 0.500 (0.50) | 0.500 (0.50) | 0.500 (0.50) |" in table  # needs no decodes


def test_rows_are_those_of_all_settings():
    plain = exactness.Arguments()
    others = [{"num_measurements": 2}, {"num_draws": 9}, {"sigma": 0.4}, {"seed": 1}]
    found = [
        exactness.mark("aps", 3, 4, dataclasses.replace(plain, **other))["fingerprint"]
        for other in ({}, *others)
    ]
    found += [exactness.mark("aps", *where, plain)["fingerprint"] for where in ((2, 4), (3, 16))]
    found.append(exactness.mark("aps, warm start", 3, 4, plain)["fingerprint"])
    assert len(set(found)) == 8


def test_every_committed_row_is_of_this_bench_and_no_other():
    """Those of methods whose options are gone, too: their configuration stands in them."""
    committed = Path(exactness.__file__).parents[1] / "results/exactness/rows.jsonl"
    found = rows.read(committed, exactness.NEEDED)
    arguments = exactness.Arguments()

    def is_own(row):
        return exactness.is_own(row | {"version": exactness.aps_jax.__version__}, arguments)

    records = [name for name, options in exactness.METHODS.items() if options is None]
    assert {row["method"] for row in found} == set(exactness.METHODS) > set(records) != set()
    assert all(map(is_own, found))
    for row in (found[0], next(row for row in found if row["method"] in records)):
        assert not is_own(row | {"fingerprint": "other"})
    record = next(row for row in found if row["method"] in records)
    assert not is_own(record | {"config": record["config"] | {"num_steps": 99}})
    assert not is_own(record | {"method": "dps"})


def test_the_script_resumes_and_refuses(tmp_path, monkeypatch, capsys):
    chosen = ("prior", "best_of_n")
    methods = {name: exactness.METHODS[name] for name in chosen}
    monkeypatch.setattr(exactness, "METHODS", methods)
    arguments = exactness.Arguments(out=tmp_path, smoke=True)
    assert exactness.main(arguments) == 0
    log = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["method"], row["budget"]) for row in rows] == [("prior", None), ("best_of_n", 4)]
    assert rows[1]["decoder_evaluations"] == 5 and rows[1]["denoiser_evaluations"] == 12
    assert all(0 <= row["total_variation"] <= 1 and row["kl"] >= 0 for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Incomplete: ")  # the other cases
    assert f"| best_of_n | {rows[1]['total_variation']:.3f} (" in table
    assert (tmp_path / "total_variation.png").stat().st_size > 1000

    monkeypatch.setattr(exactness, "plot", lambda *args: None)
    log.write_text(log.read_text().splitlines()[0] + '\n{"case": ')  # a kill in the second row
    assert exactness.main(arguments) == 0
    again = [json.loads(line) for line in log.read_text().splitlines()]
    for row in (*rows, *again):
        row.pop("seconds")
    assert again == rows

    changed = exactness.Arguments(out=tmp_path, smoke=True, sigma=0.7)
    assert exactness.main(changed) == 2
    assert "other settings" in capsys.readouterr().err
    assert exactness.main(exactness.Arguments(out=tmp_path / "new", toys=("4x4",))) == 2
    assert "unknown toy '4x4', did you mean '4x3'?" in capsys.readouterr().err


def test_rows_of_something_else_or_of_another_process_are_one_line(tmp_path, capsys):
    log = tmp_path / "rows.jsonl"
    with rows.alone(log):
        assert exactness.main(exactness.Arguments(out=tmp_path, smoke=True)) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert not log.exists()
    committed = Path(exactness.__file__).parents[1] / "results/exactness/rows.jsonl"
    first = json.loads(committed.read_text().splitlines()[0])
    log.write_text(json.dumps({k: v for k, v in first.items() if k != "case"}) + "\n")
    for table in (True, False):
        assert exactness.main(exactness.Arguments(out=tmp_path, table=table)) == 2
        err = capsys.readouterr().err
        assert "line 1 is not a row of this experiment ('case')" in err and err.count("\n") == 1


def test_the_committed_rows_give_the_committed_table(tmp_path, monkeypatch):
    monkeypatch.setattr(exactness, "plot", lambda *args: None)
    committed = Path(exactness.__file__).parents[1] / "results/exactness"
    shutil.copy(committed / "rows.jsonl", tmp_path)
    assert exactness.main(exactness.Arguments(out=tmp_path, table=True)) == 0
    assert (tmp_path / "table.md").read_text() == (committed / "table.md").read_text()


def test_every_sampler_is_measured_within_its_budget():
    from contract import TOKENS

    from aps_jax.samplers.budget import decoder_evaluations

    methods = {name: options for name, options in exactness.METHODS.items() if options}
    # MMaDA's decoding is one more draw of the prior, which `maskgit` stands for.
    assert {sampler for sampler, _ in methods.values()} == set(TOKENS) - {"mmada"}
    small = ("svdd_pm", "smc", "aps-smc, phi refined at every step")
    for method in methods:
        for budget in exactness.BUDGETS:
            config = exactness.config_of(method, 3, budget, 0.5)
            if config is None:  # Too small for its steps.
                assert budget == 4 and method in small
                continue
            assert config.sigma == 0.5 and decoder_evaluations(config) <= budget
            for name, value in exactness.METHODS[method][1].items():
                assert getattr(config, name) == (3 if value == "L" else value)
