"""Tables, and what rows say of their configuration."""

import dataclasses
import json

import numpy as np
import pytest

import aps_jax
from bench.conftest import STUDY, read
from experiments.bench import command as benchmark
from experiments.bench import identity, plan, study, summary
from experiments.bench.calibration import Calibration


def test_aggregation_against_numpy(rng):
    """Means over seeds first, then over photos; pairs by photo; failures left out."""
    psnr = rng.normal(20, 2, (2, 4, 3))  # method, photo, seed
    rows = [
        {"task": "hdr", "method": name, "budget": None, "seed": seed, "image": f"{photo}",
         "psnr": psnr[m, photo, seed], "lpips": 0.25, "decoder_evaluations": 7}
        for m, name in enumerate(("a", "b")) for photo in range(4) for seed in range(3)
    ]  # fmt: skip
    del rows[2]["psnr"]
    rows[2]["error"] = "not finite"
    psnr[0, 0, 2] = np.nan
    one, two = (summary.Scores(rows).of("hdr", name, None) for name in "ab")
    means = np.nanmean(psnr, axis=2)
    np.testing.assert_allclose(one["psnr"].loc[list("0123")], means[0])
    found = summary.gain(one, two, "psnr")
    difference = means[0] - means[1]
    assert found.mean == pytest.approx(difference.mean())
    assert found.half_width == pytest.approx(3.182446 * difference.std(ddof=1) / 2)
    assert summary.gain(one.loc[["0"]], two, "psnr") is None
    parsed = study.parse(
        STUDY | {"tasks": {"hdr": {}}, "methods": {"a": {}, "b": {}}, "compare_to": "b",
                 "budgets": {}}
    )  # fmt: skip
    text = summary.table(parsed, rows)
    assert f"| a | 4 | {means[0].mean():.2f} ± {means[0].std():.2f} |" in text
    assert f"| 7 | {found.mean:+.2f} ± {found.half_width:.2f} | +0.000 ± 0.000 |" in text
    assert "left out: 1 (a on hdr)" in text
    short = summary.overview(parsed, rows).splitlines()
    assert short[2] == f"| b | {means[1].mean():.2f}; 0.250 (4) |"
    assert short[3] == f"| a | {found.mean:+.2f} ± {found.half_width:.2f}; +0.000 ± 0.000 (4) |"


def test_gains_over_another_method_are_only_printed(bench, tmp_path, capsys):
    assert bench()[0] == 0
    folder = tmp_path / "out"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    arguments = benchmark.Arguments(
        config=tmp_path / "study.json", out=folder, table=True, compare_to="bicubic"
    )
    assert benchmark.main(arguments) == 0
    text = capsys.readouterr().out
    rows = read(tmp_path)
    own, other = (
        summary.Scores(rows).of("super_resolution", name, "4 decodes")
        for name in ("bicubic", "no prior")
    )
    found = summary.gain(other, own, "psnr")
    mean = own["psnr"].mean()
    assert f"| bicubic | {mean:.2f}; – (3) |" in text
    assert f"| no prior | {found.mean:+.2f} ± {found.half_width:.2f}; – (3) |" in text
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    for options, part in (
        ({"compare_to": "bicubic"}, "add --table"),
        ({"compare_to": "bicubi", "table": True}, "did you mean 'bicubic'?"),
    ):
        code, err = bench(**options)
        assert code == 2 and part in err.splitlines()[-1]
    more = STUDY["methods"] | {"new": {"config": {"num_steps": 2}}}
    code, err = bench(STUDY | {"methods": more}, compare_to="new", table=True)
    assert code == 2 and "'new' has no rows yet" in err


def test_rows_carry_what_a_budget_and_the_defaults_made_of_a_configuration(bench, tmp_path):
    assert bench()[0] == 0
    found = {(row["task"], row["method"]): row.get("config") for row in read(tmp_path)}
    plain = {"num_steps": 2, "num_inner_steps": 2, "warm_start": "logits"}
    assert found == {
        ("super_resolution", "bicubic"): None,
        ("super_resolution", "no prior"): {"sampler": "aps", "prior": "none"} | plain,
        ("super_resolution", "best"): {"sampler": "best_of_n", "num_steps": 2, "num_candidates": 4},
        ("twice", "bicubic"): None,
        ("twice", "no prior"): {"sampler": "aps", "prior": "none", "draw": "categorical",
                                "sigma": 0.1, "num_samples": 2} | plain,
    }  # fmt: skip
    for row in read(tmp_path):
        if "config" in row:
            names = [name for name in row["config"] if name not in ("sampler", "prior")]
            kind = identity.config_class(row["config"]["sampler"])
            config = kind(**{name: row["config"][name] for name in names})
            prior = row["config"].get("prior", "model")
            assert (
                identity.described(row["config"]["sampler"], config, prior=prior) == row["config"]
            )


def identity_of(config, **others):
    """What decides the rows of a configuration of "no prior" on "twice"."""
    parsed = study.parse(STUDY)
    task, method = parsed.tasks["twice"], parsed.methods["no prior"]
    return identity.fingerprint(
        parsed, {}, task, method, identity.described("aps", config, **others)
    )


def test_options_may_come_and_go_and_rows_stay_those_of_their_computation():
    plain = aps_jax.APSConfig(num_steps=3)
    grown = dataclasses.make_dataclass(
        "Grown", [("new", float, 0.5)], bases=(aps_jax.APSConfig,), frozen=True, kw_only=True
    )
    assert identity_of(plain) == identity_of(grown(num_steps=3))
    assert identity_of(plain) == identity_of(dataclasses.replace(plain, learning_rate=1.0))
    found = {
        identity_of(plain),
        identity_of(plain, prior="none"),
        identity_of(grown(num_steps=3, new=0.6)),
        *(identity_of(dataclasses.replace(plain, **other)) for other in
          ({"num_steps": 4}, {"learning_rate": 0.5}, {"keep_best": True}, {"sigma": 0.1})),
    }  # fmt: skip
    assert len(found) == 7


def test_rows_of_an_option_that_is_gone_are_shown_and_not_run(bench, tmp_path):
    code, err = bench()
    assert code == 0, err
    log = tmp_path / "out" / "rows.jsonl"
    table = (tmp_path / "out" / "table.md").read_text()
    # As if "best" had been run with an option that has been removed since.
    made = plan.Plan(study.load(tmp_path / "study.json"), log, Calibration(tmp_path / "c"), None)
    task, method = made.study.tasks["super_resolution"], made.study.methods["best"]
    rows = read(tmp_path)
    for row in rows:
        if row["method"] == "best":
            row["config"]["gone"] = 2.0
            row["fingerprint"] = identity.fingerprint(
                made.study, made.model, task, method, row["config"]
            )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(text)
    assert bench(table=True)[0] == 2
    methods = STUDY["methods"] | {"best": {"kind": "record", "count": 3}}
    raw = STUDY | {"methods": methods}
    code, err = bench(raw)
    assert code == 0, err
    assert log.read_text() == text and (tmp_path / "out" / "table.md").read_text() == table
    # What it was made with is part of what a row is.
    log.write_text(text.replace('"gone": 2.0', '"gone": 3.0'))
    code, err = bench(raw, table=True)
    assert code == 2 and "rows of another configuration" in err
