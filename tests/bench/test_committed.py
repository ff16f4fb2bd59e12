"""The committed studies and their configurations."""

import json
import shutil

import pytest

from bench.conftest import read
from experiments import photos
from experiments.bench import command as benchmark
from experiments.bench import identity, session, study, tuning

CONFIGS = sorted((photos.Path(photos.__file__).parent / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_committed_configurations_are_valid(path):
    parsed = study.load(path)
    smoke = benchmark.smoked(parsed)
    assert smoke.methods.keys() == parsed.methods.keys()
    for form in (parsed, smoke):
        if form.tuning is not None:
            assert tuning.tuning_study(form).methods
        for method in form.methods.values():
            for task in form.tasks.values():
                if method.kind == "sampler":
                    budget = form.budgets[0]
                    identity.config_of(method, task, budget and budget.limit(method))


STUDIES = [path for path in CONFIGS if (path.parents[1] / "results" / path.stem).exists()]


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_committed_rows_give_the_committed_tables(path, tmp_path):
    results = path.parents[1] / "results" / path.stem
    for name in ("rows.jsonl", "tuning.jsonl", "tuned.json", "calibration.json"):
        if (results / name).exists():
            shutil.copy(results / name, tmp_path)
    arguments = benchmark.Arguments(config=path, out=tmp_path, table=True)
    assert benchmark.main(arguments) == 0
    for name in ("table.md", "overview.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text()
    for row in read(tmp_path, "rows.jsonl"):
        assert ("config" in row) == ("decoder_evaluations" in row), row
    if (tmp_path / "tuning.jsonl").exists():
        trials = read(tmp_path, "tuning.jsonl")
        assert all("config" in row for row in trials)
        stored = json.loads((results / "tuned.json").read_text())
        parsed, _ = session.without_weights(study.load(path), None)
        found = tuning.record(parsed, trials, stored["identity"])
        for entry in found["methods"].values():
            for trial in entry["trials"]:
                trial.pop("repeats", None)
        assert found == stored
