"""Lets autodoc read docstrings that are written as plain English, not as reStructuredText.

`|A(x) - y|` and `[B, *grid, d]` are what they look like, and a module's pseudo-code, told by its
indentation, is shown as it stands.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

#: Text between backticks, which stays, or a character that reStructuredText would take for markup.
_MARKUP = re.compile(r"``.+?``|`[^`]+`|[|*\\]|(?<=\w)_(?!\w)", re.DOTALL)
#: Arguments such as `**options: ...`, which napoleon escapes itself, and items of lists.
_KEPT = re.compile(r"^\s*(\*{1,2}\w+:|[*-] )")


def _plain(found: re.Match[str]) -> str:
    text = found[0]
    if text.startswith("``"):
        return text
    # Literal text has two backticks, in which napoleon takes no colon for the end of a type.
    return f"`{text}`" if text.startswith("`") else "\\" + text


def escape(line: str) -> str:
    """A line of plain English as reStructuredText."""
    start = found.end() if (found := _KEPT.match(line)) else 0
    kept, rest = line[:start], line[start:]
    return kept + _MARKUP.sub(_plain, rest)


def _is_indented(paragraph: list[str]) -> bool:
    """Whether a paragraph has lines that stand further right than its first one."""
    depths = [len(line) - len(line.lstrip()) for line in paragraph]
    return max(depths) > depths[0] and not re.match(r"\s*([*-]|\d+\.) ", paragraph[0])


def _with_code(lines: list[str]) -> list[str]:
    """Module docstrings: indented paragraphs become literal blocks."""
    done: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        if paragraph and _is_indented(paragraph):
            done += [".. code-block:: text", "", *("   " + text for text in paragraph)]
        else:
            done += map(escape, paragraph)
        done.append("")
        paragraph = []
    return done


def _rewrite(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    if any(".. " in line for line in lines):  # Written as reStructuredText after all.
        return
    lines[:] = _with_code(lines) if what == "module" else [escape(line) for line in lines]


def _shorten(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returned: str
) -> tuple[str, str] | None:
    """Signatures without all the defaults of the configuration that is their default."""
    return signature and (re.sub(r"= ?APSConfig\([^()]*\)", "=APSConfig()", signature), returned)


def _skip(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Fields of a named tuple, which its docstring describes, are not listed once more."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the rewriting, before napoleon's."""
    app.connect("autodoc-process-docstring", _rewrite, priority=100)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
