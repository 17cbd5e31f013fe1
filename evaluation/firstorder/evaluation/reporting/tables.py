"""The one way to write a table: as CSV, Markdown and LaTeX. On the terminal: `reporting.terminal.table`."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence

FORMULA = ("=", "+", "-", "@", "\t")
"""What begins a formula where a spreadsheet opens a CSV file."""

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": r"\char96{}", "[": "{[}", "]": "{]}", "*": "{*}",
    "–": "--", "ε": r"$\varepsilon$", "∞": r"$\infty$", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "−": "$-$",
    "…": r"\ldots{}", "·": r"$\cdot$", "→": r"$\rightarrow$",
}  # fmt: skip
"""Characters that are commands or ligatures in LaTeX, or that it does not know, and what shows them."""

LONG = 48
"""Characters of a text that is broken into lines in LaTeX."""

LETTERS = "ßæøœłÆØŒŁ"
ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
"""Letters beside ASCII that every LaTeX knows, and which accents those of ASCII may have."""


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV.

    Args:
        header: a name for each column.
        rows: numbers are written with six digits, None as nothing. A text that a spreadsheet would take for a formula
            begins with an apostrophe, also in the header.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_value, header))
    writer.writerows([_value(value) for value in row] for row in rows)
    return text.getvalue()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table as Markdown, without a line break at its end; the columns after the first `words` are aligned right."""
    line = "|" + "---|" * words + "---:|" * (len(header) - words)
    return "\n".join([_line(header), line, *(_line(row) for row in rows)])


def latex(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, caption: str = "", label: str = ""
) -> str:
    """A table as LaTeX that needs the package booktabs, with a line break at its end.

    Args:
        header: a text for each column.
        rows: likewise; every character means itself, and those that LaTeX has no glyph for are shown as U+XXXX.
        words: how many columns are aligned left; the others are aligned right.
        caption: of the table.
        label: by which a text refers to it; letters, digits, colons and hyphens.
    """
    lines = [r"\begin{table}", r"  \centering"]
    lines += [rf"  \caption{{{_tex(caption)}}}"] if caption else []
    lines += [rf"  \label{{{label}}}"] if label else []
    held = list(rows)
    long = [i for i in range(words) if any(len(row[i]) > LONG for row in held)]
    sides = [rf"p{{{0.75 / len(long):.2f}\linewidth}}" if i in long else "l" for i in range(words)]
    lines += [rf"  \begin{{tabular}}{{{''.join(sides)}{'r' * (len(header) - words)}}}", r"    \toprule"]
    lines += [_tex_row(header, len(header)), r"    \midrule", *(_tex_row(row, words) for row in held)]
    return "\n".join(["% \\usepackage{booktabs}", *lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def escaped(text: str) -> str:
    """A text that Markdown shows as it is in a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def radius(eps: float) -> str:
    """A radius as the field writes it: 0.3, but 8/255."""
    short = f"{eps:g}"
    return short if len(short) <= 5 else f"{eps * 255:g}/255"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


def _tex_row(cells: Sequence[str], words: int) -> str:
    texts = [*map(_tex, cells[:words]), *(_tex(f"−{cell[1:]}" if cell[:1] == "-" else cell) for cell in cells[words:])]
    return rf"    {' & '.join(texts)} \\"


def _tex(text: str) -> str:
    """A text in which every character means itself."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    pairs = zip(line, f"{line[1:]} ", strict=bool(line))
    return "".join("-{}" if pair == ("-", "-") else _tex_char(pair[0]) for pair in pairs)


def _tex_char(char: str) -> str:
    if char in LATEX:
        return LATEX[char]
    parts = unicodedata.normalize("NFD", char)
    known = char in LETTERS or (parts[0].isascii() and (len(parts) == 1 or parts[1:] in list(ACCENTS)))
    return char if known else f"U+{ord(char):04X}"


def _value(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return value
    text = value.replace("\r", "")
    return f"'{text}" if text.startswith(FORMULA) else text
