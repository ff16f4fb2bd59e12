"""Pages that the build itself writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_pages(target: Path, pages: Mapping[str, str]) -> None:
    """Writes pages by name; one that is there as it should be stays, or it would be built again."""
    target.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = target / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
