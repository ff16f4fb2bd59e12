"""The directive `public-names`: what a package exports, each with a link to its description."""

from __future__ import annotations

import importlib
import inspect

from docstrings import escape
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx


def _home(package: str, name: str, value: object) -> str:
    if inspect.ismodule(value):
        return value.__name__
    home = getattr(value, "__module__", None)
    if isinstance(value, dict) or home is None:
        module = importlib.import_module(package)
        homes = getattr(module, "_HOMES", {})
        return f"{package}.{homes[name]}.{name}" if name in homes else f"{package}.{name}"
    parent, _, leaf = home.rpartition(".")
    # A function that hides the module of the same name is described in the module's place.
    return home if leaf == name and parent == package else f"{home}.{name}"


class PublicNames(Directive):
    """A list of the names in `__all__` with the first sentence of each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parses the list as reStructuredText, so that its links are resolved as usual."""
        package = self.arguments[0]
        module = importlib.import_module(package)
        lines: list[str] = []
        for name in sorted(getattr(module, "__all__", ()), key=str.lower):
            value = getattr(module, name)
            has_text = inspect.ismodule(value) or callable(value)
            summary = (inspect.getdoc(value) or "") if has_text else "A table by name."
            target = _home(package, name, value)
            lines += [f":py:obj:`{name} <{target}>`", "   " + escape(summary.split("\n")[0]), ""]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=package), 0, node)
        return node.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
