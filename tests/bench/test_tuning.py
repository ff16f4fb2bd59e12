"""Options are chosen on photos of their own."""

import json

import numpy as np
import pytest

import aps_jax
from bench.conftest import STUDY, interrupt_after, read, timeless
from experiments.bench import study, tuning


def test_tuning_is_recorded_and_used(bench, tmp_path, monkeypatch):
    methods = {
        "no prior": STUDY["methods"]["no prior"] | {"tune": {"learning_rate": [0.01, 0.1, 3.0]}},
        "codes": {"sampler": "straight_through", "config": {"learning_rate": 1e-6},
                  "tune": {"variables": ["bits", "tokens"], "learning_rate": [0.5, 1.0]}},
    }  # fmt: skip
    raw = STUDY | {
        "tasks": {"super_resolution": {"scale": 2}},
        "methods": methods,
        "tuning": {"images": {"count": 2}, "trials": 3},
    }
    some = next(iter(methods))
    assert bench(raw, tune=True, only=(some,), out="part")[0] == 0
    part = json.loads((tmp_path / "part" / "tuned.json").read_text())
    assert list(part["methods"]) == [some]
    parts = {row["method"] for row in read(tmp_path, "part/tuning.jsonl")}
    assert parts == {f"{some} #{index}" for index in range(3)}

    assert not any("repeats" in trial for trial in part["methods"][some]["trials"])

    # What is tuned can be run before the rest is.
    code, err = bench(raw, out="part")
    assert code == 2 and "not tuned yet: codes" in err
    assert bench(raw, out="part", only=(some,))[0] == 0
    assert {row["method"] for row in read(tmp_path, "part/rows.jsonl")} == {some}
    assert bench(raw, out="part", table=True)[0] == 0

    undo = interrupt_after(monkeypatch, 1)
    assert bench(raw, tune=True)[0] == 130
    undo()
    assert not (tmp_path / "out" / "tuned.json").exists()
    code, err = bench(raw, tune=True)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "tuned.json").read_text())
    trials = read(tmp_path, "out/tuning.jsonl")
    assert {row["image"] for row in trials} == {"1.png", "4.png"}  # not those of the table
    for name, method in methods.items():
        entry = record["methods"][name]
        assert len(entry["trials"]) == 3 and entry["trials"][0]["options"] == {}
        assert len({json.dumps(t["options"]) for t in entry["trials"]}) == 3
        for index, trial in enumerate(entry["trials"]):
            found = [row["psnr"] for row in trials if row["method"] == f"{name} #{index}"]
            assert trial["score"] == pytest.approx(np.mean(found), abs=1e-6)
            assert all(value in method["tune"][key] for key, value in trial["options"].items())
        scores = [trial["score"] for trial in entry["trials"]]
        assert entry["best"] == int(np.argmax(scores))
        assert entry["options"] == entry["trials"][entry["best"]]["options"]

    assert bench(raw)[0] == 0
    tuned = read(tmp_path)
    assert bench(raw, untuned=True, out="untuned")[0] == 0
    plain = read(tmp_path, "untuned/rows.jsonl")
    is_changed = [bool(record["methods"][row["method"]]["options"]) for row in tuned]
    assert any(is_changed)
    for one, other, changed in zip(tuned, plain, is_changed, strict=True):
        assert (one["fingerprint"] != other["fingerprint"]) == changed
    # The same options written into the configuration give the same rows.
    for name in methods:
        methods[name]["config"] = (
            methods[name].get("config", {}) | record["methods"][name]["options"]
        )
    explicit = {k: v for k, v in raw.items() if k != "tuning"} | {"methods": methods}
    assert bench(explicit, out="explicit")[0] == 0
    assert timeless(read(tmp_path, "explicit/rows.jsonl")) == timeless(tuned)

    changed = raw | {"tuning": raw["tuning"] | {"trials": 2}}
    code, err = bench(changed)
    assert code == 2 and "tuned.json is of another configuration" in err


def test_trials_are_run_on_all_photos_for_tuning():
    raw = STUDY | {"tuning": {"images": {"count": 2}, "trials": 2}}
    methods = {
        "no prior": {"count": 1, "config": {"num_steps": 2}, "tune": {"learning_rate": [0.1]}}
    }
    trials = tuning.tuning_study(study.parse(raw | {"methods": methods}))
    assert [trial.count for trial in trials.methods.values()] == [None, None]


def test_methods_are_tuned_on_the_tuning_tasks_that_they_run_on(bench, tmp_path):
    methods = {
        "no prior": STUDY["methods"]["no prior"] | {"tune": {"learning_rate": [0.1]}},
        "some": {"tasks": ["twice"], "config": {"num_steps": 2}, "tune": {"learning_rate": [0.1]}},
    }
    raw = STUDY | {"methods": methods, "tuning": {"images": {"count": 2}, "trials": 2}}
    # Fewer photos of one task than of the other do not mean that trials are missing.
    raw |= {"tasks": STUDY["tasks"] | {"super_resolution": {"scale": 2, "count": 1}}}
    code, err = bench(raw, tune=True)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "tuned.json").read_text())["methods"]
    assert record.keys() == methods.keys()
    trials = read(tmp_path, "out/tuning.jsonl")
    for name, tasks in (("no prior", ("super_resolution", "twice")), ("some", ("twice",))):
        for index, trial in enumerate(record[name]["trials"]):
            own = [row for row in trials if row["method"] == f"{name} #{index}"]
            means = [np.mean([r["psnr"] for r in own if r["task"] == task]) for task in tasks]
            assert trial["score"] == pytest.approx(np.mean(means))
    assert bench(raw)[0] == 0

    raw["tuning"] = raw["tuning"] | {"tasks": ["super_resolution"]}
    code, err = bench(raw, tune=True, out="none")
    assert code == 2 and "'some' has a search space, but runs on none of the tasks" in err


REPEATING = {
    "sampler": "best_of_n",
    "config": {"num_steps": 2},
    "tune": {"gumbel_temperature": [4.5, 2.0], "prior_temperature": [1.0, 0.7]},
}


def test_trials_that_repeat_others_are_reported_or_not_drawn():
    raw = STUDY | {"methods": {"no prior": REPEATING}, "tasks": {"hdr": {}}}
    default = {"gumbel_temperature": 4.5, "prior_temperature": 1.0}
    config = aps_jax.samplers.SAMPLERS["best_of_n"].config()
    assert all(getattr(config, name) == value for name, value in default.items())
    drawn = {}
    for is_distinct in (False, True):
        tuned = {"images": {"count": 2}, "trials": 4, "distinct": is_distinct}
        found = [study.parse(raw | {"tuning": tuned | {"seed": seed}}) for seed in range(8)]
        drawn[is_distinct] = [tuning.trials_of(s, s.methods["no prior"]) for s in found]
        for parsed, trials in zip(found, drawn[is_distinct], strict=True):
            rows = [
                {"task": "hdr", "method": f"no prior #{i}", "psnr": 1.0} for i in range(len(trials))
            ]
            record = tuning.record(parsed, rows, "")
            repeats = [trial.get("repeats") for trial in record["methods"]["no prior"]["trials"]]
            assert repeats == [0 if options == default else None for options in trials]
            lines = [f"no prior: trial {i} repeats trial 0" for i in range(4) if repeats[i] == 0]
            assert tuning.repeated(record) == lines
    assert any(default in trials for trials in drawn[False])
    assert not any(default in trials for trials in drawn[True])
    # Three points are left, which is what four trials need; five are too many.
    tuned = {"images": {"count": 2}, "trials": 5, "distinct": True}
    parsed = study.parse(raw | {"tuning": tuned})
    with pytest.raises(ValueError, match="has 3 points to try, tuning needs 4"):
        tuning.trials_of(parsed, parsed.methods["no prior"])
    parsed = study.parse(raw | {"tuning": tuned | {"distinct": False}})
    assert len(tuning.trials_of(parsed, parsed.methods["no prior"])) == 5


def test_repeated_trials_are_said_on_the_console(bench):
    method = STUDY["methods"]["no prior"] | {"tune": {"learning_rate": [1.0, 0.5]}}  # 1: default
    raw = STUDY | {"methods": {"no prior": method}}
    raw |= {"tuning": {"images": {"count": 2}, "trials": 3}}
    code, err = bench(raw, tune=True, limit=1, out="few")
    assert code == 2 and "--limit is for runs" in err
    code, err = bench(raw, tune=True)
    assert code == 0 and "note: no prior: trial" in err and "repeats trial 0" in err


def test_failed_trials_cannot_win(model):
    raw = STUDY | {"tuning": {"images": {"count": 2}, "trials": 2, "metric": "lpips"}}
    raw = raw | {"methods": {"no prior": {"tune": {"learning_rate": [0.1]}}}, "budgets": {}}
    parsed = study.parse(raw)
    rows = [
        {"task": task, "method": f"no prior #{trial}", "lpips": value}
        for task in parsed.tasks
        for trial, value in ((0, 0.3), (1, 0.2))
    ]
    assert tuning.record(parsed, rows, "")["methods"]["no prior"]["best"] == 1  # lower is better
    del rows[1]["lpips"]
    assert tuning.record(parsed, rows, "")["methods"]["no prior"]["best"] == 0
    assert tuning.record(parsed, rows[:-1], "")["methods"] == {}  # not finished
    del rows[0]["lpips"]
    with pytest.raises(ValueError, match="every trial of 'no prior' failed"):
        tuning.record(parsed, rows, "")
