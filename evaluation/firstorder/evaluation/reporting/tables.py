"""The one way to write a table: as CSV, and as Markdown. On the terminal: `reporting.terminal.table`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

FORMULA = ("=", "+", "-", "@", "\t")
"""What begins a formula where a spreadsheet opens a CSV file."""


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV.

    Args:
        header: a name for each column.
        rows: numbers are written with six digits, None as nothing. A text that a spreadsheet would take for a formula
            begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_value(value) for value in row] for row in rows)
    return text.getvalue()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table as Markdown, without a line break at its end; the columns after the first `words` stand to the right."""
    line = "|" + "---|" * words + "---:|" * (len(header) - words)
    return "\n".join([_line(header), line, *(_line(row) for row in rows)])


def escaped(text: str) -> str:
    """A text that Markdown shows as it is in a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def radius(eps: float) -> str:
    """A radius as the field writes it: 0.3, but 8/255."""
    short = f"{eps:g}"
    return short if len(short) <= 5 else f"{eps * 255:g}/255"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


def _value(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return value
    text = value.replace("\r", "")
    return f"'{text}" if text.startswith(FORMULA) else text
