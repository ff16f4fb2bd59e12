"""What the README shows is what the code does and what the studies measured."""

import re
from pathlib import Path

from experiments.bench import command as benchmark
from experiments.bench import summary, tuning
from experiments.bench.calibration import Calibration
from experiments.bench.session import Plan, without_weights
from experiments.bench.study import load
from experiments.readme import FILES, filled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_examples_run(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    quickstart, pure, operator, energy, samplers = blocks("python")
    scope = {}
    exec(compile(quickstart, "quickstart", "exec"), scope)
    assert "(1, 64, 64, 3) (1, 256)" in capsys.readouterr().out
    assert quickstart.count("\n") <= 12
    tokens = scope["result"].tokens
    exec(compile(pure, "pure", "exec"), scope)
    assert (scope["result"].tokens == tokens).all()
    exec(compile(operator, "operator", "exec"), scope)
    faded = scope["fade"](0.5)(scope["photo"])
    assert abs(faded - 0.5 * scope["photo"]).max() < 1e-6
    exec(compile(energy, "energy", "exec"), scope)
    assert "(1, 32, 32, 3)" in capsys.readouterr().out
    exec(compile(samplers, "samplers", "exec"), scope)
    assert "denoiser=5, decoder=5, decoder_gradient=0" in capsys.readouterr().out
    assert scope["result"].images.shape == (1, 64, 64, 3)


def test_tables_are_those_that_the_studies_wrote():
    assert "<!-- table: experiments/results/restoration/overview.md -->" in README
    for path in FILES:
        assert filled(path.read_text()) == path.read_text(), "run python -m experiments.readme"


def test_the_studies_tables_are_those_of_their_rows():
    for config in sorted((ROOT / "experiments" / "configs").glob("*.json")):
        folder = ROOT / "experiments" / "results" / config.stem
        if not (folder / "rows.jsonl").exists():
            continue
        study, left_out = without_weights(load(config), None)
        if study.tuning is not None:
            arguments = benchmark.Arguments(config=config, out=folder)
            identity = benchmark.tuning_identity(study, arguments)
            study = tuning.tuned(study, folder / "tuned.json", identity)
        # Refused if they are of another configuration.
        plan = Plan(study, folder / "rows.jsonl", Calibration(folder / "calibration.json"), None)
        found = plan.rows(version=None, ignored=tuple(left_out))
        for name in ("table", "overview"):
            text = getattr(summary, name)(study, found)
            assert (folder / f"{name}.md").read_text().strip() == text.strip(), config.stem


def test_memory_of_real_models_is_that_of_the_plan():
    plan = (ROOT / "experiments" / "results" / "memory_plan" / "plan.md").read_text()
    shown = re.findall(r"^\| (?:256|512) \|.*$", README, flags=re.MULTILINE)
    assert shown
    for line in shown:
        assert line in plan, f"the plan lacks this line of the README: {line}"


def test_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
