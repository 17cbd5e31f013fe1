"""What the commands share: the console, progress bars, and how a user's mistake is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from firstorder.attacks.inspection import gathered

console = Console()


def bars() -> Progress:
    """Progress bars that vanish when they are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def radius(text: str) -> float:
    """The number that `text` writes, as 0.3 or 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"eps={text!r} is not a number; write 0.3 or 8/255") from None


@contextmanager
def telling() -> Iterator[None]:
    """What looks wrong, on standard error, each thing once."""
    doubts: list[str] = []
    try:
        with gathered() as doubts:
            yield
    finally:
        for doubt in doubts:
            typer.echo(f"warning: {doubt}", err=True)


@contextmanager
def refusing() -> Iterator[None]:
    """A user's mistake as one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
