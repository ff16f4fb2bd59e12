"""What the README and the documentation show is what the code does and the studies measured."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from conftest import mixing_prior, patch_codec

import aps_jax
from aps_jax.pretrained import Model, model_folder
from experiments.bench import command as benchmark
from experiments.bench import summary, tuning
from experiments.bench.calibration import Calibration
from experiments.bench.session import Plan, without_weights
from experiments.bench.study import load
from experiments.readme import README, filled, part

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Folders of `docs` that a build of the site writes.
GENERATED = [
    DOCS / name
    for name in (
        "_build",
        "reference/api",
        "reference/commands",
        "results/tables",
        "tutorial/notebooks",
    )
]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")]
PAGES += [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if not any(path.is_relative_to(folder) for folder in GENERATED)
]


def blocks(path, language):
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, path.read_text(), flags=re.DOTALL | re.MULTILINE)


def run(codes, scope):
    """Runs the codes in one scope; what they print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in codes:
            exec(compile(code, "example", "exec"), scope)
    return printed.getvalue()


def small_model(name):
    """In place of an embedded model, which takes half a minute to compile."""
    model_folder(name)  # An error unless there is one.
    return Model(mixing_prior(), patch_codec(), {})


@pytest.fixture(scope="module", params=["small", pytest.param("real", marks=pytest.mark.slow)])
def readme(request):
    """The scope after the README's examples, and what each of them printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "agg")
        if request.param == "small":
            patch.setattr(aps_jax, "load_pretrained", small_model)
        scope = {}
        printed = [run([code], scope) for code in blocks(README, "python")]
    return scope, printed


def test_readme_examples_run(readme):
    scope, (quickstart, operator, energy) = readme
    assert "(1, 64, 64, 3) (1, 256)" in quickstart
    faded = scope["fade"](0.5)(scope["photo"])
    assert abs(faded - 0.5 * scope["photo"]).max() < 1e-6
    assert not operator and "(1, 32, 32, 3)" in energy


def check_python(before, scope, printed):
    assert (scope["result"].tokens == before["result"].tokens).all()


def check_samplers(before, scope, printed):
    assert "denoiser=5, decoder=5, decoder_gradient=0" in printed
    assert scope["result"].images.shape == (1, 64, 64, 3)


#: What is known of the results of a page, beyond that its examples run.
CHECKS = {"howto/python.md": check_python, "howto/samplers.md": check_samplers}
EXAMPLES = [path for path in PAGES if path != README and blocks(path, "python")]
#: Those that load a model of their own, which is not small.
SLOW = [DOCS / "howto/text.md"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path in SLOW)) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_examples_of_a_page_run(path, readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Some write files.
    before, _ = readme
    scope = dict(before)
    printed = run(blocks(path, "python"), scope)
    name = path.relative_to(DOCS).as_posix()
    if name in CHECKS:
        CHECKS[name](before, scope, printed)


def test_checks_are_of_pages_with_examples():
    assert {DOCS / name for name in CHECKS} | set(SLOW) <= set(EXAMPLES)


def test_readme_is_one_page():
    assert README.read_text().count("\n") <= 150
    assert blocks(README, "python")[0].count("\n") <= 12
    first, second = blocks(README, "bash")[:2]  # What a newcomer runs; `.ci/run` does, too.
    assert "aps-jax restore" in first and "pytest" in second


def anchors(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    if "{include} ../README.md" in path.read_text():
        return anchors(README)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^```\{include\} (\S+)", text, flags=re.MULTILINE)
    links += re.findall(r"\{download\}`[^`<]*<([^>]+)>`", text)
    for link in links:
        name, _, anchor = link.partition("#")
        if ":" in name:  # Elsewhere.
            continue
        target = (path.parent / name).resolve() if name else path
        if any(target.is_relative_to(folder) for folder in GENERATED):
            continue  # The build of the site checks these.
        assert target.is_file(), f"{path}: {link}"
        assert not anchor or anchor in anchors(target), f"{path}: {link}"


def test_a_part_of_a_table():
    table = "| x | a | b |\n|---|---|---|\n| one, two | 1 | 2 |\n| three | 3 | 4 |\n"
    assert part(table, ["b"], ["three", "one, two"]) == (
        "| x | b |\n| --- | --- |\n| three | 4 |\n| one, two | 2 |"
    )
    with pytest.raises(ValueError, match="no column 'c', row 'four'"):
        part(table, ["c"], ["four"])


def test_the_readme_has_the_tables_that_the_studies_wrote():
    text = README.read_text()
    assert filled(text) == text, "run python -m experiments.readme"
    for study in ("faces", "benchmark"):
        assert f"<!-- table: experiments/results/{study}/overview.md " in text
    rows = re.findall(r"^\| .*\(\d+\) \|$", text, flags=re.MULTILINE)
    assert 1 < len(rows) <= 8


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


def test_every_study_is_shown():
    shown = "".join(path.read_text() for path in PAGES)
    for table in sorted((ROOT / "experiments" / "results").glob("*/table.md")):
        name = table.parent.name
        assert f"tables/{name}.md" in shown or f"results/{name}/" in shown, name
