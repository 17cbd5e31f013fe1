"""The page of a run of transfer: whom adversarial examples fool, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from firstorder.evaluation.reporting import document, transfer_figures
from firstorder.evaluation.reporting.transfer_outcomes import Outcome

TITLES = ("Means", "By target", "Image by image")
"""Of the tables, in their order."""


class Titled(NamedTuple):
    """A table, what it shows, and how many of its columns hold words."""

    title: str
    header: list[str]
    rows: list[list[str]]
    words: int


def write(
    path: Path,
    outcomes: Sequence[Outcome],
    tables: Sequence[Titled],
    *,
    facts: Mapping[str, object],
    models: Sequence[str],
    notices: Sequence[str],
) -> Path:
    """Write the page, its figures into figures/ beside it, and return its path.

    Args:
        path: of the page.
        outcomes: what the run found.
        tables: of them, see `transfer_report.tables`.
        facts: of the protocol, by name.
        models: a line on the weights of each.
        notices: what must not be overlooked.
    """
    heat = transfer_figures.defence_heat(outcomes)
    shown = document.Drawing(
        name="transfer", svg=Markup(), width=9.0, subject="all models", title="Success, %", heat=[heat],
        caption="With 95 % intervals of one seed's number of images (Wilson).", corner="examples ↓ target →",
    )  # fmt: skip
    parts = [document.Part(anchor="success", title="Success", drawings=[shown])]
    drawings = [
        document.drawn(draw, path.parent / "figures", name, title=title, caption=caption)
        for name, title, caption, draw in transfer_figures.views(outcomes)
    ]
    if drawings:
        parts.append(document.Part(anchor="figures", title="What it took", drawings=drawings))
    for i, (one, title) in enumerate(zip(tables, TITLES, strict=False), 1):
        table = document.Table(title="", header=one.header, rows=one.rows, words=one.words)
        parts.append(document.Part(anchor=f"table-{i}", title=title, text=one.title, tables=[table]))
    if models:
        parts.append(document.Part(anchor="models", title="Models", folded=[("Weights", "\n".join(models))]))
    lead = ", ".join(f"{key} {value}" for key, value in facts.items())
    title = "Do adversarial examples transfer?"
    return document.write(path, over="firstorder · transfer", title=title, lead=lead, parts=parts, notices=notices)
