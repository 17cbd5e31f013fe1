"""`firstorder report`: the report of a run of `firstorder evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.reporting.page import write
from firstorder.evaluation.reporting.terminal import console, refusing
from firstorder.evaluation.runs.store import read


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RUN by default.")] = None,
) -> None:
    """Write the report of a run: a page that needs nothing else, its text, and its figures."""
    with refusing():
        found = read(run)
        for cell in found.damaged():
            line = f"damaged: {found.store.path(cell.key)}; firstorder evaluate --out {run} computes it anew"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        page, text, *figures = write(found, out or run)
    for path in (page, text):
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"wrote {len(figures)} files in {page.parent / 'figures'}", highlight=False, markup=False, soft_wrap=True
    )
