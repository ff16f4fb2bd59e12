"""Studies and trainings stay readable: small modules, small functions, programs that only start."""

import ast
from pathlib import Path

import pytest

import experiments

ROOM = Path(experiments.__file__).parent
MODULES = sorted(ROOM.rglob("*.py"))
#: Files that only start a program of a room.
PROGRAMS = [path for path in MODULES if "\nstart(__name__" in path.read_text()]


def test_no_module_has_more_than_350_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert lengths and not {name: count for name, count in lengths.items() if count > 350}


def test_no_function_has_more_than_60_lines():
    lengths = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert lengths and not {name: count for name, count in lengths.items() if count > 60}


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_programs_start_a_module_with_a_main(path):
    """`python -m experiments.NAME` finds the `main` of the room that the file names."""
    *_, call = ast.parse(path.read_text()).body
    module = call.value.args[1].value
    source = ROOM.parent / f"{module.replace('.', '/')}.py"
    functions = [node for node in ast.parse(source.read_text()).body if hasattr(node, "args")]
    (main,) = [function for function in functions if function.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["arguments"]
    name = path.parent.stem if path.stem == "__main__" else path.stem
    assert f"python -m experiments.{name}`" in path.read_text()
