"""Budgets in seconds."""

import dataclasses
import json

import pytest

import aps_jax
from aps_jax.samplers.budget import decoder_evaluations
from bench.conftest import STUDY, read
from experiments.bench import study
from experiments.bench.calibration import Calibration


def test_seconds_become_evaluations(tmp_path):
    """A method of 0.1 + 0.02 n seconds is given the n that takes the reference's 1.5 seconds."""
    under = study.Budget(label="n", evaluations=20)
    budget = study.Budget(label="s", evaluations=20, seconds_of="ref")
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
    budget = study.Budget(label="s", evaluations=20, seconds_of="ref")
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
