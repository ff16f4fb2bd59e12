"""The benchmark refuses what is foreign, skips what is broken, and says why in one line."""

import errno
import json
import os
import shutil

import pytest
from PIL import Image

import aps_jax
from bench.conftest import STUDY, read, timeless
from experiments import photos
from experiments.bench import study


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


def test_a_model_without_a_prior_is_refused(bench, model):
    (model / "prior.safetensors").unlink()
    code, err = bench(STUDY)
    assert code == 2 and "has no prior.safetensors; train or convert" in err, err


def test_a_setting_changes_only_what_it_has():
    with pytest.raises(TypeError, match=r"Method has no \['space'\]"):
        study.Method(label="m").changed(space={})


def test_yardsticks_of_another_noise_are_refused(bench):
    small = STUDY | {"methods": {"bicubic": {"kind": "measurement"}}, "compare_to": "bicubic"}
    small = small | {"tasks": {"super_resolution": {"scale": 2}}, "budgets": {}}
    assert bench(small)[0] == 0
    code, err = bench(small | {"sigma": 0.1})
    assert code == 2 and "other settings" in err


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


ERRORS = {
    "sampler": ({"methods": {"no prior": {"sampler": "g2d"}}}, "did you mean 'g2d2'?"),
    "task": ({"tasks": {"super_resolutio": {}}}, "did you mean 'super_resolution'?"),
    "task option": ({"tasks": {"hdr": {"gian": 2}}}, "unknown key 'gian', did you mean 'gain'?"),
    "key": ({"batchsize": 3}, "unknown key 'batchsize', did you mean 'batch_size'?"),
    "method key": ({"methods": {"no prior": {"configs": {}}}}, "unknown key 'configs'"),
    "option": ({"methods": {"no prior": {"config": {"num_step": 2}}}}, "no option 'num_step'"),
    "value": ({"methods": {"no prior": {"config": {"sigma": -1}}}}, "sigma must be positive"),
    "kind": ({"methods": {"no prior": {"kind": "oracle"}}}, "kind: input should be 'sampler'"),
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
    "nothing": ({"images": {}}, "images: lacks 'size'; add it"),
    "label within": ({"tasks": {"hdr": {"label": "a"}}}, "tasks.hdr: unknown key 'label'"),
    "no tasks": ({"tasks": {}}, "tasks: dictionary should have at least 1 item"),
    "seeds": ({"seeds": [-1]}, "seeds.0: input should be greater than or equal to 0, got -1"),
    "size": ({"images": {"size": "16"}}, "images.size: input should be a valid integer, got '16'"),
    "label": ({"tasks": {"a|b": {"task": "hdr"}}}, "without | or #"),
    "list": ({"methods": ["aps"]}, "valid dictionary, got ['aps']"),
    "count": ({"methods": {"no prior": {"count": 0}}}, "no prior.count: input should be"),
    "space": ({"methods": {"no prior": {"tune": {"num_steps": 3}}}}, "should be a valid list"),
    "photos for tuning": (
        {"images": {"size": 16}, "tuning": {"images": {"count": 2}}}, "no photos are left"
    ),
    "without": (
        {"images": {"size": 16, "count": 2, "without": {"count": "2"}}}, "images.without.count"
    ),
    "task's count": ({"tasks": {"hdr": {"count": 0}}}, "tasks.hdr.count: input"),
    "budget's task": (
        {"budgets": {"b": {"evaluations": 4, "tasks": ["hdr"]}}}, "unknown task (of 'b')"
    ),
    "task's x": ({"tasks": {"hdr": {"x": "0.1"}}}, "tasks.hdr.x: input should be a valid number"),
    "method's x": ({"methods": {"no prior": {"x": True}}}, "x: input should be a valid"),
    "task's series": ({"tasks": {"hdr": {"series": "a"}}}, "has a series but no place on it"),
    "series of a number": ({"tasks": {"hdr": {"series": 1, "x": 1}}}, "series: input should be a"),
    "two tasks at one place": (
        {"tasks": {"hdr": {"x": 1}, "again": {"task": "hdr", "x": 1.0}}},
        "tasks 'hdr' and 'again' are both at x 1 of series 'hdr'",
    ),
    "label of x": ({"task_x_label": 3}, "task_x_label: input should be a valid string, got 3"),
    "distinct": (
        {"images": {"size": 16, "count": 2},
         "tuning": {"images": {"count": 2}, "distinct": "yes"}},
        "tuning.distinct: input should be a valid boolean",
    ),
    "best of": ({"tasks": {"hdr": {"best_of": 0}}}, "tasks.hdr.best_of: input should be greater"),
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
