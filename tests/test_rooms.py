"""The plan of the house: imports go down from floor to floor, and nowhere in a circle."""

import ast
from pathlib import Path

import grimp
import pytest

#: Packages and modules of `aps_jax` from the top down; one imports only from floors below its own.
FLOORS = (
    {"cli"},
    {"restore", "notebook", "writing", "animation"},
    {"images", "presets", "pretrained"},
    {"scores"},
    {"faces", "metrics", "sharding", "text"},
    {"samplers"},
    {"sampler"},
    {"sampling"},
    {"config", "energies", "prior"},
    {"operators", "schedules"},
    {"codec", "tasks"},
    {"flops", "io"},
    {"types"},
)


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("aps_jax")


def room(module):
    return module.split(".")[1] if "." in module else None


def test_every_room_has_its_floor(graph):
    rooms = {room(module) for module in graph.modules} - {None}
    assert rooms == set().union(*FLOORS)


def test_imports_go_down(graph):
    floor = {name: index for index, names in enumerate(FLOORS) for name in names}
    upwards = [
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        # The package itself only points to its parts, when they are first used.
        if room(module) and room(imported) and room(module) != room(imported)
        and floor[room(imported)] <= floor[room(module)]
    ]  # fmt: skip
    assert not upwards


def test_no_module_imports_in_a_circle(graph):
    circles = [
        module
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if room(module) and graph.chain_exists(importer=imported, imported=module)
    ]
    assert not circles


#: Lines of a module, and of a function with its docstring, that a reader still keeps in mind.
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60


@pytest.mark.parametrize("package", ["aps_jax", "convert"])
def test_modules_and_functions_stay_small(package):
    too_long = []
    for path in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            too_long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{path.name}: {node.name}")
    assert not too_long
