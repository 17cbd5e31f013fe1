"""`firstorder train-report`: what can be read off runs of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.reporting.terminal import console, refusing
from firstorder.evaluation.training import report


def train_report(
    run: Annotated[list[Path], typer.Argument(help="Folders of runs; several are drawn together.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RUN/report of the first by default.")] = None,
) -> None:
    """Compare training runs: a page with learning curves, norms and loss surfaces."""
    with refusing():
        logs = [report.read(folder) for folder in run]
        for path in report.write(logs, out or run[0] / "report"):
            console.print(f"wrote {path}", highlight=False, markup=False)
