"""The benchmark on toy models: it resumes, refuses what is foreign, skips what is broken."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from conftest import mixing_prior, patch_codec
from matplotlib.text import Text
from PIL import Image

import aps_jax
import experiments.rows
from aps_jax.pretrained import Model
from aps_jax.sampler import SampleResult, StepInfo
from aps_jax.samplers import sample_function
from aps_jax.samplers.budget import decoder_evaluations
from experiments import benchmark, photos
from experiments.bench import parsing, plan, plots, session, study, summary, tuning
from experiments.bench import rows as rows_of
from experiments.bench.calibration import Calibration

STUDY = {
    "images": {"size": 16, "count": 3},
    "lpips": False,
    "seeds": [0, 1],
    "batch_size": 2,
    "compare_to": "no prior",
    "tasks": {
        "super_resolution": {"scale": 2},
        "twice": {"task": "inpainting_random", "best_of": 2, "sigma": 0.1},
    },
    "methods": {
        "bicubic": {"kind": "measurement"},
        "no prior": {"prior": "none", "config": {"num_steps": 2, "warm_start": "logits"}},
        "best": {
            "sampler": "best_of_n",
            "config": {"num_steps": 2},
            "tasks": ["super_resolution"],
            "count": 2,
        },
    },
    "budgets": {"4 decodes": {"evaluations": 4}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 255, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 18), Image.Resampling.BICUBIC).save(
            folder / f"{index}.png"
        )
    return folder


@pytest.fixture(autouse=True)
def model(tmp_path_factory, monkeypatch):
    """Models without convolutions, which compile at once, behind a folder of any bytes."""
    folder = tmp_path_factory.getbasetemp() / "toy_weights"
    folder.mkdir(exist_ok=True)
    for name in ("codec.safetensors", "prior.safetensors"):
        (folder / name).write_bytes(name.encode())
    toy = Model(mixing_prior(window=4), patch_codec(), {})
    monkeypatch.setattr(aps_jax, "load_pretrained", lambda name: toy)
    monkeypatch.setattr(session.restoring, "sample_function", lambda name: fake_sample)
    monkeypatch.setattr(plots, "plot", lambda *args: [])
    return folder


plot = plots.plot


def fake_sample(params, y, keys, *, config):
    """A sampler of noise, which keys and configuration decide, and which compiles at once."""
    shape = (config.num_samples, 16, 16, 3)
    noise = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    # Not by `hash`, which differs from one process to the next.
    noise = noise * (zlib.crc32(repr(config).encode()) % 97 / 97)
    rows = (1, config.num_samples, len(keys))
    ones = jax.numpy.ones(rows)
    info = StepInfo(ones, ones > 0, ones, jax.numpy.full(rows, 4), None)
    return SampleResult(noise[:, 0], keys, info, noise, noise[:, 0], noise[:, 0])


@pytest.fixture
def bench(tmp_path, folder, model, capsys):
    """Runs the benchmark in this process; gives exit code and stderr."""

    def run(raw=STUDY, *, out="out", data=folder, **options):
        path = tmp_path / "study.json"
        text = raw if isinstance(raw, str) else json.dumps({"model": str(model)} | raw)
        path.write_text(text)
        capsys.readouterr()
        arguments = benchmark.Arguments(config=path, out=tmp_path / out, data=data, **options)
        code = benchmark.main(arguments)
        return code, capsys.readouterr().err

    return run


def read(tmp_path, name="out/rows.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def timeless(rows):
    """Rows by what they are of, without the seconds."""
    return {
        (*rows_of.cell_of(row), row["image"]): {k: v for k, v in row.items() if k != "seconds"}
        for row in rows
    }


def interrupt_after(monkeypatch, count):
    """Ctrl-C in place of the batch after the first `count`."""
    append, calls = session.append_rows, []

    def stop(path, rows):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(path, rows)

    monkeypatch.setattr(session, "append_rows", stop)
    return lambda: monkeypatch.setattr(session, "append_rows", append)


def test_real_samplers_restore_and_are_plotted(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(session.restoring, "sample_function", sample_function)
    monkeypatch.setattr(plots, "plot", plot)
    methods = {name: STUDY["methods"][name] for name in ("bicubic", "no prior")}
    tasks = {"super_resolution": {"scale": 2}}
    code, err = bench(STUDY | {"seeds": [0], "methods": methods, "tasks": tasks})
    assert code == 0, err
    table = summary.scores_of(read(tmp_path), "super_resolution", "bicubic", "4 decodes")
    prior = summary.scores_of(read(tmp_path), "super_resolution", "no prior", "4 decodes")
    assert all(3 < photo["psnr"] < table[image]["psnr"] for image, photo in prior.items())
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
    code, err = bench()
    assert code == 0, err
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


def test_rows_of_something_else_are_refused(bench, tmp_path, model):
    small = STUDY | {"tasks": {"super_resolution": {"scale": 2}}, "seeds": [0]}
    small = small | {"methods": {"no prior": STUDY["methods"]["no prior"]}}
    assert bench(small)[0] == 0
    log = tmp_path / "out" / "rows.jsonl"
    before = log.read_bytes()

    def refused(raw, *parts, **options):
        code, err = bench(raw, **options)
        assert code == 2 and err.startswith("benchmark: error: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err
        assert log.read_bytes() == before

    refused(small | {"sigma": 0.1}, "rows of another configuration", "other settings")
    refused(small | {"images": {"size": 8, "count": 3}}, "rows of another configuration")
    refused(small | {"seeds": [1]}, "seed 0: not in this one")
    with_prior = {"no prior": STUDY["methods"]["no prior"] | {"prior": "model"}}
    refused(small | {"methods": with_prior}, "other settings")
    refused(small | {"budgets": {"4 decodes": {"evaluations": 6}}}, "other settings")
    weights = model / "prior.safetensors"
    weights.write_bytes(b"other weights")
    refused(small, "the model that made them")
    refused(small, "the model that made them", table=True)
    weights.write_bytes(b"prior.safetensors")
    # More of the same is welcome.
    assert bench(small | {"seeds": [0, 1]})[0] == 0
    assert log.read_bytes().startswith(before)

    before = log.read_bytes().replace(b'"version": "', b'"version": "0.0.1+')
    log.write_bytes(before)
    refused(small | {"seeds": [0, 1]}, "of aps_jax 0.0.1+", f"this is {aps_jax.__version__}")
    # A table of another version's rows is welcome, one of several versions' is not.
    assert bench(small | {"seeds": [0, 1]}, table=True)[0] == 0
    before = before.replace(b'"version": "0.0.1+', b'"version": "', 1)
    log.write_bytes(before)
    refused(small | {"seeds": [0, 1]}, "rows of aps_jax 0.0.1+", table=True)
    before = b'{"step": 3}\n'
    log.write_bytes(before)
    refused(small, "line 1 is not a row")


def test_yardsticks_of_another_noise_are_refused(bench):
    small = STUDY | {"methods": {"bicubic": {"kind": "measurement"}}, "compare_to": "bicubic"}
    small = small | {"tasks": {"super_resolution": {"scale": 2}}, "budgets": {}}
    assert bench(small)[0] == 0
    code, err = bench(small | {"sigma": 0.1})
    assert code == 2 and "other settings" in err


def test_unreadable_photos_are_recorded_and_skipped(bench, folder, tmp_path):
    broken = tmp_path / "photos"
    shutil.copytree(folder, broken)
    whole = (broken / "2.png").read_bytes()
    (broken / "2.png").write_bytes(whole[: len(whole) // 2])
    raw = STUDY | {
        "tasks": {"super_resolution": {"scale": 2}},
        "methods": {"no prior": STUDY["methods"]["no prior"]},
        "seeds": [0],
    }
    assert bench(raw, out="whole")[0] == 0
    code, err = bench(raw, data=broken)
    assert code == 1 and "skipped 2.png" in err
    assert list(json.loads((tmp_path / "out" / "unreadable.json").read_text())) == ["2.png"]
    # The others are measured with the noise that they have anyway.
    others = timeless(read(tmp_path))
    expected = timeless(read(tmp_path, "whole/rows.jsonl"))
    assert len(others) == 2 and others.items() <= expected.items()
    # Repaired, it is added.
    (broken / "2.png").write_bytes(whole)
    assert bench(raw, data=broken)[0] == 0
    assert timeless(read(tmp_path)) == expected

    for path in broken.iterdir():
        path.write_bytes(b"")
    code, err = bench(raw, data=broken, out="none")
    assert code == 2 and "3 cannot be read" in err


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


def test_restorations_that_fail_are_recorded(bench, tmp_path, monkeypatch):
    compiled = session.restoring.compile_method

    def diverging(*args):
        def run(*batch):
            restored = compiled(*args)(*batch)
            return restored._replace(is_finite=np.array([True, False]))

        return run

    monkeypatch.setattr(session.restoring, "compile_method", diverging)
    raw = STUDY | {"methods": {"no prior": STUDY["methods"]["no prior"]}, "seeds": [0]}
    raw = raw | {"tasks": {"super_resolution": {"scale": 2}}}
    code, err = bench(raw)
    assert code == 1 and "1 restorations failed" in err
    assert ["error" in row for row in read(tmp_path)] == [False, True, False]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| no prior | 2 |" in text and "Failed restorations, left out: 1" in text


def test_a_full_disk_leaves_whole_rows(bench, tmp_path, monkeypatch):
    raw = STUDY | {"methods": {"no prior": STUDY["methods"]["no prior"]}, "seeds": [0]}
    assert bench(raw | {"images": {"size": 16, "count": 3}}, limit=2)[0] == 0
    log = tmp_path / "out" / "rows.jsonl"
    before = log.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, err = bench(raw)
    assert code == 2 and "No space left on device; free some space" in err
    assert err.splitlines()[-1].startswith("benchmark: error: ")
    assert log.read_bytes() == before


def test_out_of_time_stops_between_batches(bench, tmp_path):
    code, err = bench(minutes=1e-9)
    assert code == 0 and "run the same command to go on" in err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


ERRORS = {
    "sampler": ({"methods": {"no prior": {"sampler": "g2d"}}}, "did you mean 'g2d2'?"),
    "task": ({"tasks": {"super_resolutio": {}}}, "did you mean 'super_resolution'?"),
    "task option": ({"tasks": {"hdr": {"gian": 2}}}, "unknown key 'gian', did you mean 'gain'?"),
    "key": ({"batchsize": 3}, "unknown key 'batchsize', did you mean 'batch_size'?"),
    "method key": ({"methods": {"no prior": {"configs": {}}}}, "unknown key 'configs'"),
    "option": ({"methods": {"no prior": {"config": {"num_step": 2}}}}, "no option 'num_step'"),
    "value": ({"methods": {"no prior": {"config": {"sigma": -1}}}}, "sigma must be positive"),
    "kind": ({"methods": {"no prior": {"kind": "oracle"}}}, "unknown kind of method"),
    "reference": ({"compare_to": "aps"}, "unknown method (compare_to) 'aps'"),
    "budget": ({"budgets": {"few": {"evaluations": 1}}}, "too small"),
    "knob": (
        {
            "methods": {"no prior": {"config": {"num_inner_steps": 3}}},
            "budgets": {"b": {"evaluations": 30}},
        },
        "decides num_inner_steps",
    ),
    "seconds alone": (
        {"budgets": {"s": {"evaluations": 4, "seconds_of": "no prior"}}}, "needs one in evaluations"
    ),
    "method's task": ({"methods": {"no prior": {"tasks": ["hdr"]}}}, "unknown task"),
    "no tasks": ({"tasks": {}}, "at least one task"),
    "seeds": ({"seeds": [-1]}, "seeds must be"),
    "size": ({"images": {"size": "16"}}, "images.size must be a whole number"),
    "label": ({"tasks": {"a|b": {"task": "hdr"}}}, "without | or #"),
    "list": ({"methods": ["aps"]}, "methods must be an object"),
    "count": ({"methods": {"no prior": {"count": 0}}}, "count must be a whole number"),
    "space": ({"methods": {"no prior": {"tune": {"num_steps": 3}}}}, "must be a list of values"),
    "photos for tuning": (
        {"images": {"size": 16}, "tuning": {"images": {"count": 2}}}, "no photos are left"
    ),
    "without": (
        {"images": {"size": 16, "count": 2, "without": {"count": "2"}}}, "images.without.count"
    ),
    "task's count": ({"tasks": {"hdr": {"count": 0}}}, "task 'hdr': count"),
    "budget's task": (
        {"budgets": {"b": {"evaluations": 4, "tasks": ["hdr"]}}}, "unknown task (of budget 'b')"
    ),
    "task's x": ({"tasks": {"hdr": {"x": "0.1"}}}, "task 'hdr': x must be a finite number"),
    "method's x": ({"methods": {"no prior": {"x": True}}}, "x must be a finite number, got True"),
    "task's series": ({"tasks": {"hdr": {"series": "a"}}}, "has a series but no place on it"),
    "series of a number": ({"tasks": {"hdr": {"series": 1, "x": 1}}}, "series must be words"),
    "two tasks at one place": (
        {"tasks": {"hdr": {"x": 1}, "again": {"task": "hdr", "x": 1.0}}},
        "tasks 'hdr' and 'again' are both at x 1 of series 'hdr'",
    ),
    "label of x": ({"task_x_label": 3}, "task_x_label must be words, got 3"),
    "distinct": (
        {"images": {"size": 16, "count": 2},
         "tuning": {"images": {"count": 2}, "distinct": "yes"}},
        "tuning.distinct must be true or false",
    ),
    "best of": ({"tasks": {"hdr": {"best_of": 0}}}, "best_of must be"),
    "weights": ({"tasks": {"nonlinear_blur": {}}}, "--blur-weights"),
    "large": ({"images": {"size": 64}}, "at least 64 pixels"),
    "tuned": (
        {"tuning": {"images": {"count": 2}, "trials": 2},
         "methods": {"no prior": {"tune": {"num_steps": [1, 2]}}}},
        "--tune first",
    ),
    "narrow space": (
        {"tuning": {"images": {"count": 2}, "trials": 9},
         "methods": {"no prior": {"tune": {"num_steps": [1, 2]}}}},
        "2 points to try, tuning needs 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, bench, tmp_path):
    changes, part = ERRORS[case]
    code, err = bench(STUDY | {"methods": {"no prior": {}}, "budgets": {}} | changes)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("benchmark: error: ") and part in last, err
    assert not (tmp_path / "out").exists()


def test_more_errors(bench, tmp_path):
    (tmp_path / "empty").mkdir()
    for options, part in (
        ({"data": tmp_path / "empty"}, "no images below"),
        ({"data": None}, "--data is needed"),
        ({"table": True}, "has no rows"),
        ({"tune": True}, "no tuning section"),
    ):
        code, err = bench(**options)
        assert code == 2 and part in err.splitlines()[-1], err
    code, err = bench("{")
    assert code == 2 and "is not JSON" in err


# Tuning.


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
    trials = tuning.tuning_study(parsing.parse(raw | {"methods": methods}))
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
        found = [parsing.parse(raw | {"tuning": tuned | {"seed": seed}}) for seed in range(8)]
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
    parsed = parsing.parse(raw | {"tuning": tuned})
    with pytest.raises(ValueError, match="has 3 points to try, tuning needs 4"):
        tuning.trials_of(parsed, parsed.methods["no prior"])
    parsed = parsing.parse(raw | {"tuning": tuned | {"distinct": False}})
    assert len(tuning.trials_of(parsed, parsed.methods["no prior"])) == 5


def test_repeated_trials_are_said_on_the_console(bench):
    method = STUDY["methods"]["no prior"] | {"tune": {"learning_rate": [1.0, 0.5]}}  # 1: default
    raw = STUDY | {"methods": {"no prior": method}}
    raw |= {"tuning": {"images": {"count": 2}, "trials": 3}}
    code, err = bench(raw, tune=True)
    assert code == 0 and "note: no prior: trial" in err and "repeats trial 0" in err


def test_failed_trials_cannot_win(model):
    raw = STUDY | {"tuning": {"images": {"count": 2}, "trials": 2, "metric": "lpips"}}
    raw = raw | {"methods": {"no prior": {"tune": {"learning_rate": [0.1]}}}, "budgets": {}}
    parsed = parsing.parse(raw)
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


# Budgets in seconds.


def test_seconds_become_evaluations(tmp_path):
    """A method of 0.1 + 0.02 n seconds is given the n that takes the reference's 1.5 seconds."""
    under = study.Budget(label="n", evaluations=20)
    budget = study.Budget(label="s", evaluations=20, like="ref")
    rows = [
        {"task": "t", "method": name, "budget": "n", "seconds": seconds}
        for name, seconds in (("ref", 1.4), ("ref", 1.6), ("fast", 0.5))
    ]
    config = aps_jax.APSConfig(num_steps=1)

    def make(evaluations):
        if evaluations < 3:
            raise ValueError
        return dataclasses.replace(config, num_inner_steps=evaluations)

    calibration = Calibration(tmp_path / "c.json")
    calibration.settle(
        "t", "fast", budget, source="a", under=under, rows=rows, make=make,
        try_out=lambda config: 0.1 + 0.02 * decoder_evaluations(config),
    )  # fmt: skip
    found = Calibration(tmp_path / "c.json").evaluations("t", "fast", "s", "a")
    assert abs(0.1 + 0.02 * found - 1.5) < 0.03
    assert Calibration(tmp_path / "c.json").evaluations("t", "fast", "s", "other rows") is None
    with pytest.raises(ValueError, match="one has none"):
        calibration.settle(
            "t", "slow", budget, source="a", under=under, rows=rows, make=make, try_out=None
        )


def test_equal_seconds_run_and_resume(bench, tmp_path):
    raw = STUDY | {
        "tasks": {"super_resolution": {"scale": 2}},
        "budgets": {
            "time": {"evaluations": 4, "seconds_of": "no prior"},
            "4 decodes": {"evaluations": 4},
        },
    }
    assert bench(raw, limit=2)[0] == 0
    entries = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert {name.split(" | ")[1] for name in entries} == {"no prior", "best"}
    rows = read(tmp_path)
    assert [row["budget"] for row in rows] == sorted(row["budget"] for row in rows)
    for row in rows:
        if (row["budget"], row["method"]) == ("time", "best"):
            found = entries["super_resolution | best | time"]["evaluations"]
            assert row["decoder_evaluations"] == found
    assert bench(raw)[0] == 0  # the third photo, under what was found for the first two
    assert read(tmp_path)[: len(rows)] == rows
    # Seconds of other devices do not compare.
    path = tmp_path / "out" / "rows.jsonl"
    path.write_text(path.read_text().replace('"devices": 1', '"devices": 3'))
    code, err = bench(raw)
    assert code == 2 and "over 3 devices, here are 1" in err


def test_calibration_does_not_follow_a_line_that_falls(tmp_path):
    """Seconds that fall as evaluations rise are noise; what was tried last is kept."""
    budget = study.Budget(label="s", evaluations=20, like="ref")
    rows = [
        {"task": "t", "method": name, "budget": "n", "seconds": seconds}
        for name, seconds in (("ref", 1.5), ("fast", 0.5))
    ]
    calibration = Calibration(tmp_path / "c.json")
    calibration.settle(
        "t", "fast", budget, source="a", under=study.Budget(label="n", evaluations=20), rows=rows,
        make=lambda n: aps_jax.APSConfig(num_steps=1, num_inner_steps=n),
        try_out=lambda config: 0.4,
    )  # fmt: skip
    assert calibration.evaluations("t", "fast", "s", "a") == 60


def test_seconds_are_per_photo(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(session.restoring.time, "perf_counter", lambda: next(clock))
    x = np.zeros((3, 2, 2, 3))
    assert session.restoring.timed(lambda *args: x, None, x, None, None) == (x, 2.0)


# What a batch is restored with.


def test_only_phase_has_no_measurement_to_look_at(bench, tmp_path):
    tasks = {"super_resolution": {"scale": 2}, "phase_retrieval": {}}
    methods = {name: STUDY["methods"][name] for name in ("bicubic", "no prior")}
    code, err = bench(STUDY | {"tasks": tasks, "methods": methods})
    assert code == 0, err
    found = {(row["task"], row["method"]) for row in read(tmp_path)}
    assert ("super_resolution", "bicubic") in found
    assert [method for task, method in found if task == "phase_retrieval"] == ["no prior"]


def test_methods_get_their_prior_and_say_the_steps_they_made(monkeypatch):
    """`prior: none` puts a prior without an opinion in place of the model's."""

    def sample(params, y, keys, *, config):
        tokens = jax.numpy.full((len(y), 16), params.prior.num_codes)
        opinion = jax.numpy.std(params.prior.apply(params.prior.params, tokens))
        images = jax.numpy.broadcast_to(opinion, (len(y), 1, 8, 8, 3))
        # Early stop: three of the planned steps.
        rows = jax.numpy.ones((1, 1, len(y)))
        info = StepInfo(rows, rows > 0, rows, 3 * rows.astype(int), None)
        return SampleResult(images[:, 0], keys, info, images, images[:, 0], images[:, 0])

    monkeypatch.setattr(session.restoring, "sample_function", lambda name: sample)
    operator = aps_jax.operators.denoising()
    params = aps_jax.Params(mixing_prior(window=4), patch_codec(), operator)
    x = jax.numpy.zeros((2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    config = aps_jax.APSConfig(num_steps=1, num_inner_steps=9)
    found = {}
    for prior in ("model", "none"):
        method = study.Method(label="m", prior=prior)
        run = session.restoring.compile_method(method, config, 0.1, params, x, x, keys)
        found[prior] = run(params, x, x, keys)
    assert float(found["model"].images.max()) > 0.01
    assert float(abs(found["none"].images).max()) == 0
    assert found["model"].cost["gradient_evaluations"].tolist() == [3, 3]
    assert found["model"].cost["decoder_evaluations"].tolist() == [3, 3]


# Aggregation and configurations.


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


def test_points_of_fewer_photos_are_hollow(monkeypatch, tmp_path):
    methods = {f"m{x}": {"series": "s", "x": x} for x in (1, 2, 3)}
    raw = {"tasks": {"hdr": {}}, "methods": methods, "compare_to": "m1", "budgets": {}}
    rows = [
        {"task": "hdr", "method": f"m{x}", "budget": None, "seed": 0, "image": f"{photo}",
         "psnr": 10.0 * x + photo, "lpips": 0.1 * photo}
        for x in (1, 2, 3) for photo in range(2 if x == 3 else 4)
    ]  # fmt: skip
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots._plot_sweep(parsing.parse(STUDY | raw), rows, None, tmp_path / "sweep.png")
    heights = ((11.5, 21.5, 31.5), (0.15, 0.15, 0.15))  # Those of 4 photos, and paired gains.
    for axis, expected in zip(figures[0].axes, heights, strict=True):
        hollow = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
        assert [tuple(line.get_xdata()) for line in hollow] == [(3,)]
        assert hollow[0].get_ydata()[0] == pytest.approx(expected[2])
        whole = next(line for line in axis.get_lines() if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(np.asarray(whole.get_ydata(), float), expected)
        assert hollow[0].get_color() == whole.get_color()


CONFIGS = sorted((photos.Path(benchmark.__file__).parent / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_committed_configurations_are_valid(path):
    parsed = parsing.load(path)
    smoke = benchmark.smoked(parsed)
    assert smoke.methods.keys() == parsed.methods.keys()
    for form in (parsed, smoke):
        if form.tuning is not None:
            assert tuning.tuning_study(form).methods
        for method in form.methods.values():
            for task in form.tasks.values():
                if method.kind == "sampler":
                    budget = form.budgets[0]
                    study.config_of(method, task, budget.evaluations if budget else None)


def test_the_perceptual_term_needs_an_image():
    method = parsing.parse(
        STUDY | {"methods": {"no prior": {"config": {"perceptual_weight": 0.1}}}, "budgets": {}}
    ).methods["no prior"]
    task = study.Task(label="t", name="super_resolution", options={}, sigma=0.05)
    key = jax.random.key(0)
    for name, size, weight in (
        ("super_resolution", 64, 0.1), ("super_resolution", 60, 0.0), ("phase_retrieval", 64, 0.0)
    ):  # fmt: skip
        operator = plan.make_operator(name, (size, size)).init(key, (size, size))
        config = study.config_of(method, task, None, operator, (size, size))
        assert config.perceptual_weight == weight


def test_the_best_sample_is_that_of_least_residual(rng):
    samples = jax.numpy.asarray(rng.uniform(-1, 1, (3, 4, 8, 8, 3)), "float32")
    operator = aps_jax.operators.denoising()
    y = samples[jax.numpy.arange(3), jax.numpy.array([2, 0, 3])] + 0.01
    is_finite = jax.numpy.ones((4, 3), bool)
    chosen, is_sound = session.restoring._best(operator, samples, y, is_finite)
    np.testing.assert_allclose(chosen, y - 0.01, atol=1e-6)
    assert is_sound.all()
    # A sample that is not a number, or whose objective was none, is never the best ...
    broken, is_partly = samples.at[:, 1].set(np.nan), is_finite.at[1].set(False)
    for other, those in ((broken, is_finite), (samples, is_partly), (broken, is_partly)):
        found, is_sound = session.restoring._best(operator, other, y, those)
        np.testing.assert_allclose(found, chosen, atol=1e-6)
        assert is_sound.all()
    first = session.restoring._best(operator, samples, y, is_finite.at[2, 0].set(False))
    assert abs(first[0][0] - chosen[0]).max() > 0.1 and first[1].all()
    # ... but where all are so, and then it is said.
    assert not session.restoring._best(operator, samples, y, ~is_finite)[1].any()
    one = session.restoring._best(operator, samples[:, :1], y, is_partly[1:2])
    assert not one[1].any() and (one[0] == samples[:, 0]).all()


def test_one_broken_sample_of_several_does_not_fail_the_photo(bench, tmp_path, monkeypatch):
    """Sample 1 of the first photo breaks in its first step; both of the second photo do."""

    def sample(params, y, keys, *, config):
        result = fake_sample(params, y, keys, config=config)
        if config.num_samples == 1:
            return result
        is_finite = jax.numpy.ones((3, 2, len(keys)), bool)
        is_finite = is_finite.at[0, 1, 0].set(False).at[2, :, 1].set(False)
        return result._replace(info=result.info._replace(is_finite=is_finite))

    monkeypatch.setattr(session.restoring, "sample_function", lambda name: sample)
    raw = STUDY | {"seeds": [0], "images": {"size": 16, "count": 2}}
    raw |= {"methods": {"no prior": STUDY["methods"]["no prior"]}}
    assert bench(raw)[0] == 1
    failed = [(row["task"], row["image"]) for row in read(tmp_path) if "error" in row]
    assert failed == [("twice", "5.png")]


def test_yardsticks_are_compiled_before_they_are_timed():
    """What runs on the first call alone is not in the seconds of a batch."""
    operator = aps_jax.operators.denoising()
    params = aps_jax.Params(mixing_prior(window=4), patch_codec(), operator)
    x = jax.numpy.zeros((2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    for kind in ("codec", "estimate", "measurement"):
        method = study.Method(label="m", kind=kind)
        run = session.restoring.compile_method(method, None, 0.1, params, x, x, keys)
        with jax.log_compiles(), CompiledPrograms() as compiled:
            session.restoring.timed(run, params, x, x, keys)
        assert compiled.names == [], kind


class CompiledPrograms(logging.Handler):
    """Collects what JAX compiles, while `jax.log_compiles` is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Finished XLA compilation"):
            self.names.append(message)

    def __enter__(self):
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)


# What rows say of their configuration.


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


def test_tuning_rows_get_their_config_too(bench, tmp_path):
    methods = {"no prior": STUDY["methods"]["no prior"] | {"tune": {"learning_rate": [0.1]}}}
    raw = STUDY | {"methods": methods, "tuning": {"images": {"count": 2}, "trials": 2}}
    assert bench(raw, tune=True)[0] == 0 and bench(raw)[0] == 0
    log = tmp_path / "out" / "tuning.jsonl"
    new = log.read_text()
    assert {row["config"].get("learning_rate") for row in read(tmp_path, "out/tuning.jsonl")} == {
        None, 0.1
    }  # fmt: skip
    rows = read(tmp_path, "out/tuning.jsonl")
    log.write_text("".join(json.dumps(row | {"config": 0}) + "\n" for row in rows))
    log.write_text(log.read_text().replace(', "config": 0', ""))
    assert "config" not in log.read_text()
    assert bench(raw, table=True)[0] == 0
    assert log.read_text() == new


# Photos of their own, and gains over another method.


def test_rows_of_other_photos_are_refused(bench, folder, tmp_path):
    raw = STUDY | {"methods": {"no prior": STUDY["methods"]["no prior"]}, "seeds": [0]}
    assert bench(raw)[0] == 0
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    other = tmp_path / "others"
    shutil.copytree(folder, other)
    (other / "2.png").rename(other / "2b.png")
    for options in ({}, {"limit": 1}):
        code, err = bench(raw, data=other, **options)
        assert code == 2 and f"not among those chosen from {other} (2.png)" in err
        assert err.count("\n") == 1 and (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    # Fewer of the same photos are no others.
    assert bench(raw, limit=1)[0] == 0
    # Nor is one that cannot be read any more.
    (other / "2b.png").rename(other / "2.png")
    (other / "2.png").write_bytes(b"")
    code, err = bench(raw, data=other)
    assert code == 1 and "cannot be read" in err


def test_too_small_photos_are_recorded_and_no_failure(bench, folder, tmp_path):
    small = tmp_path / "photos"
    shutil.copytree(folder, small)
    Image.new("RGB", (30, 12)).save(small / "2.png")
    raw = STUDY | {"methods": {"no prior": STUDY["methods"]["no prior"]}, "seeds": [0]}
    code, err = bench(raw, data=small)
    assert code == 0 and "skipped 2.png: smaller than 16 pixels: 30x12" in err
    record = json.loads((tmp_path / "out" / "unreadable.json").read_text())
    assert record == {"2.png": "smaller than 16 pixels: 30x12"}
    # No other photo takes its place, and it has no place of its own.
    assert {row["image"] for row in read(tmp_path)} == {"0.png", "5.png"}
    crops = photos.evaluation_crops(small, size=16, count=3)
    assert crops.positions.tolist() == [0, 1] and crops.unreadable == {}


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


# Plots.


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files, by name of the file."""
    found = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.setdefault(path, figure))
    return found


def toy_rows(score_of, *, tasks, methods, budget=None, photos=4, **more):
    """Rows of one seed, with a PSNR of `score_of(task, method, photo)` and an LPIPS of a tenth."""
    return [
        {"task": task, "method": method, "budget": budget, "seed": 0, "image": f"{photo}",
         "psnr": score_of(task, method, photo), "lpips": score_of(task, method, photo) / 10} | more
        for task in tasks for method in methods for photo in range(photos)
    ]  # fmt: skip


SIGMAS = {
    "sr, 0.1": {"task": "super_resolution", "sigma": 0.1, "x": 0.1, "series": "upscaling"},
    "sr, 0.01": {"task": "super_resolution", "sigma": 0.01, "x": 0.01, "series": "upscaling"},
    "hdr": {"x": 0.05},
    "denoising": {},
}


def test_tasks_are_plotted_by_family(figures, tmp_path):
    raw = {"tasks": SIGMAS, "compare_to": "b", "budgets": {}, "task_x_label": "noise"}
    parsed = parsing.parse(
        STUDY | raw | {"methods": {"a": {}, "b": {}, "c": {"kind": "codec"}, "d": {}}}
    )
    gains = {"a": [1, 2, 3, 4], "b": [0] * 4, "c": [-1] * 4, "d": [5] * 4}
    level = {"sr, 0.1": 20, "sr, 0.01": 30, "hdr": 40, "denoising": 50}
    rows = toy_rows(
        lambda task, method, photo: level[task] + photo + gains[method][photo],
        tasks=SIGMAS, methods=gains,
    )  # fmt: skip
    # The last has fewer photos, and is missing in one place.
    rows = [
        row for row in rows
        if row["method"] != "d" or (row["image"] < "2" and row["task"] != "sr, 0.01")
    ]  # fmt: skip
    (path,) = plot(parsed, rows, tmp_path)[1:]
    picture = figures[tmp_path / "tasks.png"]
    titles = [axis.get_title() for axis in picture.axes]
    assert titles == [
        "upscaling: PSNR, dB", "upscaling: LPIPS", "hdr: PSNR, dB", "hdr: LPIPS"
    ]  # fmt: skip
    axis = picture.axes[0]
    assert axis.get_xlabel() == "noise" and len(axis.containers) == 4
    curves = {line.get_label(): line for line in axis.containers}
    for label, gain in (("a", 2.5), ("b", 0), ("c", -1)):
        line, _, (bars,) = curves[label]
        expected = [[0.01, 31.5 + gain], [0.1, 21.5 + gain]]
        np.testing.assert_allclose(np.float64(line.get_xydata()), expected)
        low, high = bars.get_segments()[0][:, 1]
        width = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2 if label == "a" else 0
        assert (high - low) / 2 == pytest.approx(width, abs=1e-6)
    assert curves["c"][0].get_linestyle() == "--" and curves["a"][0].get_linestyle() == "-"
    (hollow,) = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
    np.testing.assert_allclose(np.float64(hollow.get_xydata()), [[0.1, 26.5]])
    (legend,) = picture.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", "b", "c", "d", "d, fewer photos"]
    figures.clear()
    assert plots._plot_tasks(parsed, [], None, tmp_path / "none.png") is None and not figures
    assert plots._plot_tasks(parsed, rows[:1], None, tmp_path / "one.png") is None and not figures
    assert path is picture


def test_places_of_tasks_do_not_change_fingerprints(model):
    raw = STUDY | {"model": str(model), "methods": {"no prior": {}}, "budgets": {}}
    plain = {
        label: {name: value for name, value in task.items() if name not in ("x", "series")}
        for label, task in SIGMAS.items()
    }
    found = [
        plan.Plan(parsing.parse(raw | more), None, Calibration(model / "none.json"), None)
        for more in ({"tasks": SIGMAS, "task_x_label": "noise"}, {"tasks": plain})
    ]
    assert found[0].expected() == found[1].expected()


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


def test_quality_is_plotted_against_what_a_budget_does_not_fix(figures, tmp_path):
    raw = {"tasks": {"hdr": {}}, "compare_to": "a"}
    methods = {name: {"sampler": "straight_through"} for name in ("a", "b", "c")}
    methods |= {"d": {"kind": "codec"}, "prior": {"sampler": "maskgit"}}
    budgets = {"even": {"evaluations": 9}, "time": {"evaluations": 9, "seconds_of": "a"}}
    parsed = parsing.parse(STUDY | raw | {"methods": methods, "budgets": budgets})
    costs = {"a": (9, 1.0), "b": (9, 2.0), "c": (8, 40.0), "prior": (0, 0.5), "d": (None, 0.1)}
    rows = []
    for method, (evaluations, seconds) in costs.items():
        count = {} if evaluations is None else {"decoder_evaluations": evaluations}
        for budget in ("even", "time"):
            if budget == "time" and count:
                count, seconds = {"decoder_evaluations": 10 * evaluations * (method == "b")
                                  or evaluations}, 1.0  # fmt: skip
            rows += toy_rows(
                lambda task, method, photo: 20 + 5 * "abc".find(method) + photo,
                tasks=["hdr"], methods=[method], budget=budget, seconds=seconds, **count,
            )  # fmt: skip
    plot(parsed, rows, tmp_path)
    expected = {
        "even": ("seconds", {"a": (1, 21.5), "b": (2, 26.5), "c": (40, 31.5),
                             "prior": (0.5, 16.5)}),
        "time": ("decoder evaluations", {"a": (9, 21.5), "b": (90, 26.5), "c": (8, 31.5),
                                         "prior": (0, 16.5)}),
    }  # fmt: skip
    for budget, (label, points) in expected.items():
        picture = figures[tmp_path / f"quality-{budget}.png"]
        axis = picture.axes[0]
        assert axis.get_xlabel() == label
        assert {text.get_text(): text.xy for text in axis.texts} == {
            name: pytest.approx(place) for name, place in points.items()
        }
        for text in axis.texts:  # Names are readable.
            box = text.get_window_extent()
            assert axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
            others = [other for other in axis.texts if other is not text]
            assert not any(box.overlaps(other.get_window_extent()) for other in others)
    # Without a budget in seconds nobody promised that the machine was idle.
    figures.clear()
    del budgets["time"]
    untimed = parsing.parse(STUDY | raw | {"methods": methods, "budgets": budgets})
    plot(untimed, [row for row in rows if row["budget"] == "even"], tmp_path)
    assert list(figures) == [tmp_path / "gains-even.png"]
    # One cost for all says nothing.
    rows = [row for row in rows if row["budget"] == "even" and row["method"] in ("prior", "a")]
    figures.clear()
    plot(parsed, rows, tmp_path)
    assert list(figures) == [tmp_path / "gains-even.png"]


def test_names_of_crowded_points_do_not_cover_each_other(tmp_path):
    picture, axes = plots.figure(1, 1, (5.5, 4.2))
    axis = axes[0][0]
    places = [(5 + 0.01 * i, 7 + 0.02 * i) for i in range(6)]
    axis.plot([0, 10, *(x for x, _ in places)], [0, 10, *(y for _, y in places)], "o")
    plots._name_points(picture, [(axis, f"a method {i}", xy) for i, xy in enumerate(places)])
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
    assert plots.save_figure(picture, tmp_path / "a.png").stat().st_size > 1000


# The committed studies.

STUDIES = [path for path in CONFIGS if (path.parents[1] / "results" / path.stem).exists()]


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_committed_rows_get_their_config(path, tmp_path, monkeypatch):
    results = path.parents[1] / "results" / path.stem
    for name in ("rows.jsonl", "tuning.jsonl", "tuned.json", "calibration.json"):
        if (results / name).exists():
            shutil.copy(results / name, tmp_path)
    before = read(tmp_path, "rows.jsonl")
    arguments = benchmark.Arguments(config=path, out=tmp_path, table=True)
    assert benchmark.main(arguments) == 0
    after = read(tmp_path, "rows.jsonl")
    assert [{k: v for k, v in row.items() if k != "config"} for row in after] == [
        {k: v for k, v in row.items() if k != "config"} for row in before
    ]
    for name in ("table.md", "overview.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text()
    for row in after:
        assert ("config" in row) == ("decoder_evaluations" in row), row
    if (tmp_path / "tuning.jsonl").exists():
        trials = read(tmp_path, "tuning.jsonl")
        assert all("config" in row for row in trials)
        stored = json.loads((results / "tuned.json").read_text())
        parsed, _ = session.without_weights(parsing.load(path), None)
        found = tuning.record(parsed, trials, stored["identity"])
        for entry in found["methods"].values():
            for trial in entry["trials"]:
                trial.pop("repeats", None)
        assert found == stored
