"""Tables as Markdown, as short as they can be: diffs of committed tables then show values only."""

from __future__ import annotations

import pandas as pd
from tabulate import DataRow, TableFormat

_ROW = DataRow("| ", " | ", " |")
_COMPACT = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, aligns: "|" + "---|" * len(widths),
    linebetweenrows=None,
    linebelow=None,
    headerrow=_ROW,
    datarow=_ROW,
    padding=0,
    with_header_hide=None,
)


def markdown(frame: pd.DataFrame) -> str:
    """A table of strings as Markdown, without its index; missing values are a dash."""
    plain = {"stralign": None, "numalign": None, "disable_numparse": True}
    return frame.fillna("–").to_markdown(index=False, tablefmt=_COMPACT, **plain)
