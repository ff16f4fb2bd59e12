"""What is installed, and the converters under the name that an installation has them by."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import convert
from aps_jax.cli import main

ROOT = Path(__file__).parents[1]


def test_only_aps_jax_is_installed_and_all_of_it(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "aps_jax").rglob("__init__.py")}
    expected = {".".join(room.parts) for room in rooms} | {"aps_jax.convert"}
    assert set(given["packages"]) == expected and len(given["packages"]) == len(expected)
    assert {name.split(".")[0] for name in given["packages"]} == {"aps_jax"}
    assert (ROOT / given["package_dir"]["aps_jax.convert"] / "engine.py").is_file()


def test_every_converter_is_listed(capsys):
    programs = {
        path.stem for path in (ROOT / "convert").glob("*.py") if "__main__" in path.read_text()
    }
    assert set(convert.CONVERTERS) == programs
    assert main(["convert"]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in programs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "lada"], "unknown converter 'lada', did you mean 'llada'?"),
        (["convert", "llada", "nowhere"], "convert.llada: "),
        (["convert", "llada", "nowhere", "out"], "convert.llada: no such file or folder: nowhere"),
        (["convert", "lpips", "nowhere.ckpt"], "convert.lpips: "),
        (["sweep", "nowhere"], "aps-jax sweep: error: nowhere is neither a folder of images"),
    ],
)
def test_their_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_the_command_that_was_given(capsys):
    for name in ("magvitv2", "lpips"):
        try:
            assert main(["convert", name, "--help"]) == 0
        except SystemExit as stop:
            assert not stop.code
        assert f"usage: aps-jax convert {name} " in capsys.readouterr().out


_INSTALLED = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "aps_jax.convert", folder + "/__init__.py", submodule_search_locations=[folder]
)
import aps_jax
aps_jax.convert = sys.modules["aps_jax.convert"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aps_jax.convert)
from aps_jax.cli import main
code = main(["convert", "llada", "nowhere", "out"])
assert "convert" not in sys.modules and "aps_jax.convert.llada" in sys.modules
sys.exit(code)
"""


def test_an_installation_needs_no_module_beside_the_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _INSTALLED, str(ROOT / "convert")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "convert.llada: no such file or folder: nowhere\n"
