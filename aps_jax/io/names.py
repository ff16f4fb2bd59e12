"""Looks names up, and says what was probably meant when there is no such name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def choose(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """Entry `name` of `known`; ValueError that says what there is, and the nearest name."""
    if name in known:
        return known[name]
    hint = suggestion(name, known)
    raise ValueError(f"unknown {kind} {name!r}{hint}; choose from {', '.join(known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The words that point to the nearest known name, or nothing if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
