"""The design that every page has: one base template, one style sheet, one script; figures and tables in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from firstorder.evaluation.reporting import drawing, tables
from firstorder.evaluation.reporting.sheets import copies, permalink
from firstorder.evaluation.reporting.summary import Rate
from firstorder.evaluation.reporting.tables import radius
from firstorder.files import write_text

Heat = tuple[str, Sequence[str], Sequence[tuple[str, Sequence[Rate | None]]]]
"""A table of shares: its title, the names of its columns, and its lines, each a name and shares."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as a page shows it.

    Attributes:
        name: of its files, without suffix.
        svg: to be put into the page: drawn narrow, then as it is in the files.
        width: in inches, of the latter.
        subject: the model and the radius that it is about.
        title, caption: what it shows, in plain text.
        heat: tables of shares, which a page shows in place of the figure; empty without any.
        corner: what their lines are.
    """

    name: str
    svg: Markup
    width: float
    subject: str
    title: str
    caption: str
    heat: Sequence[Heat] = ()
    corner: str = ""


class View(NamedTuple):
    """A figure to be drawn for a page: the name of its files, what it shows, and the figure at a width in inches."""

    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as a page shows it.

    Attributes:
        title: empty for none.
        header, rows: texts.
        words: how many columns are aligned left.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def copies(self, name: str, caption: str) -> Markup:
        """Buttons that copy it; `name` is its address in the page, `caption` takes the place of a title."""
        caption = (self.title or caption).rstrip(".") + "."
        texts = {
            "csv": tables.csv_text(self.header, self.rows),
            "latex": tables.latex(self.header, self.rows, words=self.words, caption=caption, label=f"tab:{name}"),
            "markdown": tables.markdown(self.header, self.rows, words=self.words),
        }
        return Markup(copies(f"{name}-copies", texts))  # escapes them


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of a page.

    Attributes:
        anchor: its address in the page.
        title: its heading.
        text: what it shows, in plain text.
        notes: what must not be overlooked, in plain text.
        tables, drawings: what it has.
        folded: titles and texts that are unfolded.
        markup: what another function made of it.
    """

    anchor: str
    title: str
    text: str = ""
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    folded: Sequence[tuple[str, str]] = ()
    markup: Markup | None = None


def drawn(
    draw: Callable[[float], Figure], folder: Path, name: str, *, title: str, caption: str = "", subject: str = ""
) -> Drawing:
    """A figure for a page; its files are NAME.png and NAME.svg in the folder. See `drawing.both`."""
    with drawing.style():
        svg, width = drawing.both(draw, folder, name)
    return Drawing(name=name, svg=svg, width=width, subject=subject or title, title=title, caption=caption)


def write(
    path: Path, *, over: str, title: str, lead: str, parts: Sequence[Part], notices: Sequence[str] = (), name: str = ""
) -> Path:
    """Write a page that needs nothing else, and return its path.

    Args:
        path: of the page.
        over: what it is, above its title.
        title, lead: its title and first sentences.
        parts: its sections.
        notices: what must not be overlooked.
        name: of the window; the title by default.
    """
    context = {"over": over, "heading": title, "lead": lead, "parts": parts, "notices": notices, "name": name or title}
    context["sections_of_page"] = [("summary", "Summary"), *((part.anchor, part.title) for part in parts)]
    write_text(path, environment(autoescape=True).get_template("document.html").render(context))
    return path


def environment(**options: Any) -> Environment:
    """The templates, with the forms of figures."""
    loader = PackageLoader("firstorder.evaluation")
    found = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    found.filters.update(
        radius=radius,
        percent=lambda rate: f"{100 * rate.value:.1f}",
        interval=_interval,
        number=lambda value, form: format(value, form) if isfinite(value) else "–",
        short=lambda digest: digest[:12],
        value=_value,
        permalink=lambda name: Markup(permalink(name)),
    )
    return found


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * low:.1f} – {100 * high:.1f}"


def _value(value: object) -> str:
    """A plain value of the specification in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None or value == "" else f"{value:.6g}" if isinstance(value, float) else str(value)
