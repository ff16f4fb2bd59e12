"""Every notebook runs from top to bottom, in the reduced form that it offers."""

import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 6


@pytest.mark.slow  # `.ci/docs` executes them as they are.
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tiny_model, monkeypatch):
    monkeypatch.setenv("APS_JAX_QUICK", str(tiny_model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_installs_what_is_missing_and_leaves_jax_alone(path, monkeypatch):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (install,) = [source for source in cells if '"pip", "install"' in source]
    assert install == next(source for source in cells if source.startswith("import"))
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(install, {})
    assert not commands  # The package is here.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "aps_jax" else find(name)
    )
    exec(install, {})
    (command,) = commands
    jax = [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
    assert command[-2:] == jax and re.fullmatch(r"aps_jax(\[text\])?", command[-3])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        assert (path.parent / link).is_file(), link
