"""The benchmark runs, resumes and does nothing twice."""

import json
import os
import subprocess
import sys

import pytest

import aps_jax
from aps_jax.samplers import sample
from bench.conftest import STUDY, interrupt_after, plot, read, timeless
from experiments.bench import plots, session, summary


def test_real_samplers_restore_and_are_plotted(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(session.restoring, "sample", sample)
    monkeypatch.setattr(plots, "plot", plot)
    methods = {name: STUDY["methods"][name] for name in ("bicubic", "no prior")}
    tasks = {"super_resolution": {"scale": 2}}
    code, err = bench(STUDY | {"seeds": [0], "methods": methods, "tasks": tasks})
    assert code == 0, err
    scores = summary.Scores(read(tmp_path))
    table, prior = (
        scores.of("super_resolution", method, "4 decodes")["psnr"]
        for method in ("bicubic", "no prior")
    )
    assert len(prior) == 3 and (prior > 3).all() and (prior < table).all()
    assert (tmp_path / "out" / "gains-4_decodes.png").exists()


def test_a_killed_run_goes_on_and_nothing_is_done_twice(bench, tmp_path, monkeypatch):
    code, err = bench(out="whole")
    assert code == 0, err
    whole = read(tmp_path, "whole/rows.jsonl")
    # 3 photos x 2 seeds: two methods on two tasks but no bicubic image of random pixels ...
    counts = {}
    for row in whole:
        counts[row["task"], row["method"]] = counts.get((row["task"], row["method"]), 0) + 1
    assert counts == {
        ("super_resolution", "bicubic"): 6,
        ("super_resolution", "no prior"): 6,
        ("super_resolution", "best"): 4,  # the first two photos only
        ("twice", "bicubic"): 6,
        ("twice", "no prior"): 6,
    }
    assert len(timeless(whole)) == len(whole)

    undo = interrupt_after(monkeypatch, 4)
    code, err = bench()
    assert code == 130 and "finished batches are kept" in err
    undo()
    part = read(tmp_path)
    assert 0 < len(part) < len(whole)
    # A kill in the middle of a line.
    log = tmp_path / "out" / "rows.jsonl"
    with log.open("a") as file:
        file.write('{"task": "twi')
    monkeypatch.setattr(session, "NUM_PROGRAMS", 2)
    clears, clear = [], session.jax.clear_caches
    monkeypatch.setattr(session.jax, "clear_caches", lambda: clears.append(clear()))
    code, err = bench()
    assert code == 0, err
    assert len(clears) == 2  # Programs are forgotten now and then, and the rows do not change.
    assert read(tmp_path)[: len(part)] == part
    assert timeless(read(tmp_path)) == timeless(whole)

    # Nothing is left to do, and the table needs neither photos nor model.
    before = log.read_bytes()
    monkeypatch.setattr(session.Session, "_run_method", None)
    assert bench(table=True, data=None)[0] == 0
    assert log.read_bytes() == before

    row = next(r for r in whole if (r["task"], r["method"]) == ("twice", "no prior"))
    assert (row["denoiser_evaluations"], row["decoder_evaluations"]) == (4, 8)  # two samples
    assert row["version"] == aps_jax.__version__ and "error" not in row
    best = next(r for r in whole if r["method"] == "best")
    assert (best["decoder_evaluations"], best["gradient_evaluations"]) == (4, 0)
    assert (tmp_path / "out" / "table.md").exists()
    assert (tmp_path / "out" / "pictures" / "twice_no_prior_4_decodes.png").exists()


def test_methods_of_the_same_settings_are_computed_once(bench, tmp_path, monkeypatch):
    plain = STUDY["methods"]["no prior"]
    methods = {
        "no prior": plain | {"count": 2},
        "twin": plain | {"config": plain["config"] | {"learning_rate": 1.0}},  # the default
        "other": plain | {"config": plain["config"] | {"learning_rate": 0.5}},
    }
    raw = STUDY | {"methods": methods}
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_known", lambda *args: [])
        assert bench(raw, out="apart")[0] == 0
    batches, timed = [], session.restoring.timed

    def counted(*args):
        batches.append(args)
        return timed(*args)

    monkeypatch.setattr(session.restoring, "timed", counted)
    code, err = bench(raw)
    assert code == 0, err
    assert timeless(read(tmp_path)) == timeless(read(tmp_path, "apart/rows.jsonl"))
    # Two tasks, two seeds: two photos, the third one for the twin, three photos in batches of two.
    assert len(batches) == 2 * 2 * (1 + 1 + 2)
    seconds = {}
    for row in read(tmp_path):
        place = (row["task"], row["seed"], row["image"])
        seconds.setdefault(place, {})[row["method"]] = row["seconds"]
    pairs = [found for found in seconds.values() if "no prior" in found]
    assert len(pairs) == 8 and all(found["no prior"] == found["twin"] for found in pairs)


def test_tasks_and_budgets_may_be_for_some_photos_and_tasks(bench, tmp_path):
    raw = STUDY | {
        "tasks": STUDY["tasks"] | {"super_resolution": {"scale": 2, "count": 2}},
        "budgets": {
            "4 decodes": {"evaluations": 4},
            "6 decodes": {"evaluations": 6, "tasks": ["twice"], "count": 1},
        },
        "seeds": [0],
    }
    code, err = bench(raw)
    assert code == 0, err
    counts = {}
    for row in read(tmp_path):
        cell = (row["task"], row["method"], row["budget"])
        counts[cell] = counts.get(cell, 0) + 1
    assert counts == {
        ("super_resolution", "bicubic", "4 decodes"): 2,
        ("super_resolution", "no prior", "4 decodes"): 2,
        ("super_resolution", "best", "4 decodes"): 2,
        ("twice", "bicubic", "4 decodes"): 3,
        ("twice", "no prior", "4 decodes"): 3,
        ("twice", "bicubic", "6 decodes"): 1,
        ("twice", "no prior", "6 decodes"): 1,
    }
    table = (tmp_path / "out" / "table.md").read_text()
    assert "### twice, 6 decodes" in table and "### super_resolution, 6 decodes" not in table


def test_parts_run_side_by_side_are_the_whole(bench, tmp_path):
    assert bench(out="whole")[0] == 0
    assert bench(out="out", only=("super_resolution",))[0] == 0
    assert {row["task"] for row in read(tmp_path)} == {"super_resolution"}
    assert bench(out="other", only=("twice",))[0] == 0
    with (tmp_path / "out" / "rows.jsonl").open("a") as file:
        file.write((tmp_path / "other" / "rows.jsonl").read_text())
    code, err = bench()
    assert code == 0, err
    assert timeless(read(tmp_path)) == timeless(read(tmp_path, "whole/rows.jsonl"))
    assert bench(out="third", only=("best",))[0] == 0
    assert {row["method"] for row in read(tmp_path, "third/rows.jsonl")} == {"best"}
    assert bench(out="fourth", only=("twice", "bicubic"))[0] == 0
    chosen = {(row["task"], row["method"]) for row in read(tmp_path, "fourth/rows.jsonl")}
    assert chosen == {("twice", "bicubic")}
    code, err = bench(out="fifth", only=("twice", "best"))
    assert code == 2 and "none of the methods runs on the tasks" in err
    code, err = bench(only=("bset",))
    assert code == 2 and "best" in err


@pytest.mark.slow
def test_devices_share_the_batches(tmp_path, folder):
    """The number of devices is fixed when JAX starts, so the runs have processes of their own."""
    config = tmp_path / "study.json"
    config.write_text(json.dumps(STUDY | {"model": "photo64", "seeds": [0]}))
    rows = []
    for count in ("1", "2"):
        words = [config, "--data", folder, "--out", tmp_path / count]
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmark", *map(str, words)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": count, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        rows.append(timeless(read(tmp_path, f"{count}/rows.jsonl")))
    alone, shared = rows
    assert alone.keys() == shared.keys()
    for cell, row in alone.items():
        assert (row["devices"], shared[cell]["devices"]) == (1, 2)
        assert shared[cell]["psnr"] == pytest.approx(row["psnr"], abs=0.01)


def test_the_smooth_estimate_is_a_yardstick(bench, tmp_path):
    """Its own task's noise decides how smooth: the noisier one follows the measurement less."""
    tasks = {
        "calm": {"task": "inpainting_random", "sigma": 0.01},
        "noisy": {"task": "inpainting_random", "sigma": 0.5},
        "noiseless": {"task": "inpainting_random", "sigma": 0.0},
    }
    methods = {"smooth": {"kind": "estimate"}, "grey": STUDY["methods"]["no prior"]}
    raw = STUDY | {"tasks": tasks, "seeds": [0], "compare_to": "grey"}
    assert bench(raw | {"methods": methods | {"grey": methods["grey"] | {"count": 1}}})[0] == 0
    rows = [row for row in read(tmp_path) if row["method"] == "smooth"]
    assert len(rows) == 9 and not any("decoder_evaluations" in row for row in rows)
    residual = {label: [r["residual"] for r in rows if r["task"] == label] for label in tasks}
    assert max(residual["calm"] + residual["noiseless"]) < 0.05 < min(residual["noisy"])


def test_only_phase_has_no_measurement_to_look_at(bench, tmp_path):
    tasks = {"super_resolution": {"scale": 2}, "phase_retrieval": {}}
    methods = {name: STUDY["methods"][name] for name in ("bicubic", "no prior")}
    code, err = bench(STUDY | {"tasks": tasks, "methods": methods})
    assert code == 0, err
    found = {(row["task"], row["method"]) for row in read(tmp_path)}
    assert ("super_resolution", "bicubic") in found
    assert [method for task, method in found if task == "phase_retrieval"] == ["no prior"]


def test_out_of_time_stops_between_batches(bench, tmp_path):
    code, err = bench(minutes=1e-9)
    assert code == 0 and "run the same command to go on" in err
    assert not (tmp_path / "out" / "rows.jsonl").exists()
