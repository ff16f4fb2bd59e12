"""Puts the tables that the studies wrote into both README files, between their marks.

python -m experiments.readme
"""

from __future__ import annotations

import re
from pathlib import Path

from aps_jax.io.files import write_atomically

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
_MARKED = re.compile(
    r"(?P<begin><!-- table: (?P<file>\S+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def filled(text: str) -> str:
    """`text` with every marked place holding the file that its mark names, as it is now."""

    def fill(match: re.Match[str]) -> str:
        table = (ROOT / match["file"]).read_text().strip()
        return f"{match['begin']}\n{table}\n\n{match['end']}"

    return _MARKED.sub(fill, text)


if __name__ == "__main__":
    for path in FILES:
        write_atomically(path, filled(path.read_text()).encode())
