"""Brings the notebooks, which lie beside `docs`, into the tutorial for the time of a build."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

_SOURCE = Path(__file__).parents[2] / "notebooks"


def _copy(app: Sphinx, config: object) -> None:
    target = Path(app.srcdir) / "tutorial" / "notebooks"
    target.mkdir(exist_ok=True)
    for stale in {path.name for path in target.iterdir()} - {p.name for p in _SOURCE.iterdir()}:
        (target / stale).unlink()
    for path in _SOURCE.glob("*.ipynb"):
        copy = target / path.name
        # Links to pages lead to them from the folder of the notebooks and from here.
        text = path.read_text("utf-8").replace("](../docs/", "](../../")
        if not copy.exists() or copy.read_text("utf-8") != text:  # Else it is built again.
            copy.write_text(text, "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the copy."""
    app.connect("config-inited", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
