"""Writes a page for every study with a committed table: the table, its plots, its configuration."""

from __future__ import annotations

from pathlib import Path

from generated import write_pages
from sphinx.application import Sphinx

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "experiments" / "results"

_INDEX = """# The tables in full

These have residuals, model calls and plots, too. The ± of a score is its standard deviation over
photos, that of a gain a 95 % half-width.

```{toctree}
:glob:
:maxdepth: 1

*
```
"""


def _download(label: str, path: Path, up: str) -> str:
    return f"{label}: {{download}}`{path.name} <{up}/{path.relative_to(_ROOT)}>`."


def page(folder: Path, up: str) -> str:
    """Markdown of the page of one study; `up` leads from the page to the repository's root."""
    name = folder.name
    lines = [f"# {name.replace('_', ' ').capitalize()}", ""]
    config = _ROOT / "experiments" / "configs" / f"{name}.json"
    rows = folder / "rows.jsonl"
    if config.is_file():
        lines += [
            f"Configuration: {{download}}`{config.name} <{up}/{config.relative_to(_ROOT)}>`.",
            "",
        ]
    if rows.is_file():
        lines += [_download("Rows", rows, up), ""]
    lines += [f"```{{include}} {up}/{(folder / 'table.md').relative_to(_ROOT)}", "```", ""]
    for plot in sorted(folder.glob("*.png")):
        title = plot.stem.replace("_", " ").replace("-", ", ")
        lines += [f"## {title.capitalize()}", "", f"![{title}]({up}/{plot.relative_to(_ROOT)})", ""]
    return "\n".join(lines)


def _write(app: Sphinx, config: object) -> None:
    target = Path(app.srcdir) / "results" / "tables"
    studies = {path.parent.name: path.parent for path in sorted(_RESULTS.glob("*/table.md"))}
    pages = {name: page(folder, "../../..") for name, folder in studies.items()} | {"index": _INDEX}
    for path in target.glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    write_pages(target, pages)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the pages."""
    app.connect("config-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
