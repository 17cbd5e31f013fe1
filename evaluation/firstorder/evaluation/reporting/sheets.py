"""A table of a report under its name, in every form: CSV, Markdown, LaTeX, and HTML that copies all of them.

    sheet = Sheet("leaderboard", "Robust accuracy", (Column("model"), Column("robust, %", ".1f")), [("mine", 41.5)])
    sheet.latex()

Its rows hold values. CSV has them as they are; texts show them in their column's form, without columns that are empty
throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

from firstorder.evaluation.reporting import tables

FORMS = ("csv", "latex", "markdown")
"""What a table can be copied as."""

CALLED = {"csv": "CSV", "latex": "LaTeX", "markdown": "Markdown", "bibtex": "BibTeX"}
"""Forms as they are written."""

NOTHING = "–"
"""What is shown where there is no value."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its name, with the unit.
        form: of its numbers in texts, a format or a function; those without one are words, and are aligned left.
        data: whether it is in CSV files.
        text: whether it is in texts.
    """

    heading: str
    form: str | Callable[[Any], str] = ""
    data: bool = True
    text: bool = True

    def shown(self, value: object) -> str:
        """A value as texts show it."""
        if value is None or value == "" or (isinstance(value, float) and not isfinite(value)):
            return NOTHING
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "yes" if value else "no"
        if callable(self.form):
            return self.form(value)
        return format(value, self.form) if self.form else str(value)


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: its address in a page and in LaTeX, in lower-case letters and hyphens.
        title: what it shows, in a sentence without an end.
        columns, rows: what it holds.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Any, ...]]

    def csv(self) -> str:
        """As CSV: numbers as numbers, and no text that a spreadsheet takes for a formula."""
        chosen = [i for i, column in enumerate(self.columns) if column.data]
        kept = [[_datum(row[i]) for i in chosen] for row in self.rows]
        return tables.csv_text([self.columns[i].heading for i in chosen], kept)

    def markdown(self) -> str:
        """As Markdown, without a line break at its end."""
        header, rows, words = self._texts()
        return tables.markdown(header, rows, words=words)

    def latex(self) -> str:
        """As a LaTeX table that needs the package booktabs."""
        header, rows, words = self._texts()
        return tables.latex(header, rows, words=words, caption=f"{self.title}.", label=f"tab:{self.name}")

    def forms(self) -> dict[str, str]:
        """As everything that it can be copied as."""
        return {form: getattr(self, form)() for form in FORMS}

    def html(self, *, level: int = 3) -> str:
        """As a section of HTML with a permalink and buttons that copy it; nothing of the table is markup.

        The buttons are hidden where the page's script does not run.

        Args:
            level: of its heading.
        """
        header, rows, words = self._texts()
        sides = ["" if i < words else ' class="n"' for i in range(len(header))]
        head = "".join(f'<th scope="col"{side}>{escape(text)}</th>' for side, text in zip(sides, header, strict=True))
        lines = [
            f"<tr>{''.join(f'<td{side}>{escape(text)}</td>' for side, text in zip(sides, row, strict=True))}</tr>"
            for row in rows
        ]
        title = f"{self.name}-title"
        return "\n".join(
            [
                f'<section class="sheet" id="{escape(self.name)}" aria-labelledby="{escape(title)}">',
                f'<h{level} id="{escape(title)}">{escape(self.title)} {permalink(self.name)}</h{level}>',
                copies(self.name, self.forms()),
                f'<div class="wide" tabindex="0" role="region" aria-labelledby="{escape(title)}">',
                f"<table><thead><tr>{head}</tr></thead><tbody>",
                *lines,
                "</tbody></table></div>",
                "</section>",
            ]
        )

    def _filled(self, i: int) -> bool:
        return not self.rows or any(self.columns[i].shown(row[i]) != NOTHING for row in self.rows)

    def _texts(self) -> tuple[list[str], list[list[str]], int]:
        """The header, the rows and how many columns are words, which come first."""
        chosen = [i for i, column in enumerate(self.columns) if column.text and self._filled(i)]
        chosen.sort(key=lambda i: bool(self.columns[i].form))
        rows = [[self.columns[i].shown(row[i]) for i in chosen] for row in self.rows]
        return [self.columns[i].heading for i in chosen], rows, sum(not self.columns[i].form for i in chosen)


def permalink(name: str) -> str:
    """A link to the part of the page called `name`, to be copied."""
    return f'<a class="permalink" href="#{escape(name)}" aria-label="Link to this part of the page">#</a>'


def copies(name: str, texts: dict[str, str]) -> str:
    """Buttons that copy texts, by what they are called; a hidden form that the page's script shows.

    Args:
        name: of what they are copies of, once in the page.
        texts: none of them is markup.
    """
    parts = [f'<form class="copies" hidden data-copies="{escape(name)}">']
    for form, text in texts.items():
        parts.append(f'<button type="button" data-copy="{escape(form)}">Copy {escape(CALLED.get(form, form))}</button>')
        parts.append(f'<textarea hidden readonly data-text="{escape(form)}">\n{escape(text)}</textarea>')
    return "".join([*parts, '<output aria-live="polite"></output></form>'])


def _datum(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if isinstance(value, float) and not isfinite(value) else value
