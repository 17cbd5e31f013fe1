"""`firstorder figure`: a figure of a run for a paper."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting import paper
from firstorder.evaluation.reporting.terminal import refusing, wrote
from firstorder.evaluation.runs.store import read

Kind = Enum("Kind", {name: name for name in paper.KINDS}, type=str)  # type: ignore[misc]
Format = Enum("Format", {name: name for name in ("pdf", "svg", "png")}, type=str)  # type: ignore[misc]


def figure(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    kind: Annotated[
        Kind,
        typer.Argument(
            help="curve: robust accuracy by radius; passes: by passes; attacks: by attack; overlap: which attacks "
            "break the same images; transfer; frontier: its success by gradients; defences; pictures: examples that "
            "fell."
        ),
    ],
    width: Annotated[str, typer.Option(help="Of the column that it is printed in: 3.25in, 82mm, 234pt.")] = "3.25in",
    form: Annotated[Format, typer.Option("--format", help="Where --out names no file.")] = Format["pdf"],
    model: Annotated[str | None, typer.Option(help="Which it is about; by default all, or the first.")] = None,
    eps: Annotated[str | None, typer.Option(help="Radius; the largest by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="File; RUN/figures/paper-KIND.FORMAT by default.")] = None,
) -> None:
    """Write a figure of a run for a paper, as PDF, SVG or PNG, at the width of its column.

    Text is 8 points high in print. Lines differ in colours for all eyes, and in marks.
    """
    with refusing():
        size = None if eps is None else radius(eps, name="eps")
        drawn = paper.draw(read(run), kind.value, paper.inches(width), model=model, eps=size)
        path = out or run / "figures" / f"paper-{kind.value}.{form.value}"
        paper.save(drawn, path)
        wrote([path])
