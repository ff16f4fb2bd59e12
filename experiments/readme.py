"""Puts tables that the studies wrote into the README, between their marks.

python -m experiments.readme

A mark names the file and, if only a part of the table is wanted, its columns and rows:
`<!-- table: FILE | columns: NAME; NAME | rows: LABEL; LABEL -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from aps_jax.io.files import write_atomically

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_MARKED = re.compile(
    r"(?P<begin><!-- table: (?P<file>[^|\n]+?)"
    r"(?: \| columns: (?P<columns>[^|\n]+?) \| rows: (?P<rows>[^|\n]+?))? -->\n)"
    r".*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def part(table: str, columns: list[str], rows: list[str]) -> str:
    """The named columns and rows of a Markdown table, in the order given, after its first column.

    Raises:
      ValueError: the table has no such column or row.
    """
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in table.strip().splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    header, body = lines[0], {line[0]: line for line in lines[1:]}
    missing = [f"column {name!r}" for name in columns if name not in header]
    missing += [f"row {name!r}" for name in rows if name not in body]
    if missing:
        raise ValueError(f"the table has no {', '.join(missing)}")
    places = [0, *(header.index(name) for name in columns)]
    kept = [header, ["---"] * len(header), *(body[name] for name in rows)]
    return "\n".join("| " + " | ".join(line[place] for place in places) + " |" for line in kept)


def filled(text: str) -> str:
    """`text` with every marked place holding what its mark names of the file, as it is now."""

    def fill(match: re.Match[str]) -> str:
        table = (ROOT / match["file"]).read_text().strip()
        if match["columns"]:
            table = part(table, match["columns"].split("; "), match["rows"].split("; "))
        return f"{match['begin']}\n{table}\n\n{match['end']}"

    return _MARKED.sub(fill, text)


if __name__ == "__main__":
    write_atomically(README, filled(README.read_text()).encode())
