"""Tables, and what rows say of their configuration."""

import json

import numpy as np
import pytest

import aps_jax
import experiments.rows
from bench.conftest import STUDY, read
from experiments import benchmark
from experiments.bench import parsing, plan, study, summary
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
    one, two = (summary.scores_of(rows, "hdr", name, None) for name in "ab")
    means = np.nanmean(psnr, axis=2)
    np.testing.assert_allclose([one[f"{i}"]["psnr"] for i in range(4)], means[0])
    found = summary.gain(one, two, "psnr")
    difference = means[0] - means[1]
    assert found.mean == pytest.approx(difference.mean())
    assert found.half_width == pytest.approx(3.182446 * difference.std(ddof=1) / 2)
    assert summary.gain({"0": one["0"]}, two, "psnr") is None
    parsed = parsing.parse(
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
        summary.scores_of(rows, "super_resolution", name, "4 decodes")
        for name in ("bicubic", "no prior")
    )
    found = summary.gain(other, own, "psnr")
    mean = np.mean([photo["psnr"] for photo in own.values()])
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
            kind = study.config_class(row["config"]["sampler"])
            config = kind(**{name: row["config"][name] for name in names})
            method = parsing.parse(STUDY).methods[row["method"]]
            assert study.described(method, config) == row["config"]


def test_rows_without_their_config_get_it_from_the_table(bench, tmp_path):
    methods = {"twin": STUDY["methods"]["no prior"]}
    raw = STUDY | {"methods": STUDY["methods"]}
    assert bench(raw)[0] == 0
    log = tmp_path / "out" / "rows.jsonl"
    new = log.read_text()
    rows = [{k: v for k, v in row.items() if k != "config"} for row in read(tmp_path)]
    old = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(old)
    # They are read, compared and gone on with as they are, by other methods, too.
    code, err = bench(raw | {"methods": STUDY["methods"] | methods})
    assert code == 0 and "config" not in err, err
    assert log.read_text().startswith(old)
    twins = [row for row in read(tmp_path) if row["method"] == "twin"]
    assert len(twins) == 12 and all(row["config"]["num_inner_steps"] == 2 for row in twins)
    log.write_text(old)
    # While they are written nothing is changed.
    with experiments.rows.alone(log):
        code, err = bench(raw, table=True)
    assert code == 0 and "rows stay without config: another process" in err
    assert log.read_text() == old
    code, err = bench(raw, table=True)
    assert code == 0 and f"note: {new.count('config')} rows of {log} have got" in err
    assert log.read_text() == new
    code, err = bench(raw, table=True)
    assert code == 0 and err == "" and log.read_text() == new


def test_only_rows_of_the_same_fingerprint_get_a_config(tmp_path, model):
    parsed = parsing.parse(STUDY | {"model": str(model)})
    log = tmp_path / "rows.jsonl"
    made = plan.Plan(parsed, log, Calibration(tmp_path / "c.json"), None)
    cells = list(made.expected().items())
    rows = [
        cell._asdict() | {"image": "a.png", "fingerprint": found, "version": "0.0.1", "psnr": 1.25}
        for cell, found in cells
    ]
    rows[-1]["fingerprint"] = "other"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut off')
    assert plan.add_configs(made) == sum(cell.method != "bicubic" for cell, _ in cells) - 1
    after = read(tmp_path, "rows.jsonl")
    assert [{k: v for k, v in row.items() if k != "config"} for row in after] == rows
    assert "config" not in after[-1]
    assert plan.add_configs(made) == 0


def test_options_without_effect_are_no_part_of_a_fingerprint():
    """Rows from before there was such an option, or its default, are still of the computation."""
    parsed = parsing.parse(STUDY)
    task, method = parsed.tasks["twice"], parsed.methods["no prior"]

    def name(config):
        return study.fingerprint(parsed, {}, task, method, config)

    kind = aps_jax.samplers.SAMPLERS["maskgit"].config
    changed = {"remask_strength": 0.5}
    assert name(kind()) == name(kind(**changed)) != name(kind(num_steps=3))
    assert name(kind(reveal="remdm-cap")) != name(kind(reveal="remdm-cap", **changed))
    kinds = {aps_jax.APSConfig, *(entry.config for entry in aps_jax.samplers.SAMPLERS.values())}
    for kind in kinds:
        if hasattr(kind, "remdm"):
            assert name(kind()) == name(kind(**changed))
            assert len({name(kind(remdm=r)) for r in ("none", "cap", "rescale")}) == 3
            assert name(kind(remdm="cap")) != name(kind(remdm="cap", **changed))
