"""The terminal: the console, tables, progress bars, and how a user's mistake is reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(emoji=False)
"""The one console. Names such as `:smile:` and `[red]` are shown as they are: `say` and `table` know no markup."""


def bars() -> Progress:
    """Progress bars that vanish when they are done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
    words: int = 1,
) -> Table:
    """A table to print; the columns after the first `words` hold numbers and are aligned right."""
    made = Table(
        title=None if title is None else escape(title),
        title_justify="left",
        caption=None if caption is None else escape(caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, heading in enumerate(header):
        made.add_column(escape(heading), justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*[escape(cell) for cell in row])
    return made


def wrote(paths: Iterable[Path]) -> None:
    """Say which files were written, a line each."""
    for path in paths:
        say(f"wrote {path}")


@contextmanager
def refusing() -> Iterator[None]:
    """A user's mistake as one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
