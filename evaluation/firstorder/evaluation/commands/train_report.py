"""`firstorder train-report`: what can be read off runs of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.reporting.terminal import refusing, say
from firstorder.evaluation.training import report
from firstorder.evaluation.training.estimates import ERRORS, errors
from firstorder.files import write_text


def train_report(
    run: Annotated[list[Path], typer.Argument(help="Folders of runs; several are drawn together.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RUN/report of the first by default.")] = None,
) -> None:
    """Compare training runs: a page with learning curves, norms and loss surfaces.

    Beside it, how far the weights of A-ENGM, estimated from the norms by the input, are from those of ENGM.
    """
    with refusing():
        logs = [report.read(folder) for folder in run]
        for path in report.write(logs, out or run[0] / "report"):
            say(f"wrote {path}")
        found = [errors(log.gradients).assign(run=log.name) for log in logs if not log.gradients.empty]
        rows = [row for own in found for row in own[["run", "step", "alpha", "error"]].itertuples(index=False)]
        if rows:
            path = (out or run[0] / "report") / ERRORS
            write_text(path, csv_text(("run", "step", "alpha", "error"), rows))
            say(f"wrote {path}")
