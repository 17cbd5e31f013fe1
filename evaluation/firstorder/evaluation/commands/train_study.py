"""`firstorder train-study`: runs of training side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from firstorder.evaluation.reporting.terminal import bars, console, refusing, say
from firstorder.evaluation.training import study as studies


def train_study(
    study: Annotated[Path, typer.Argument(help="YAML file: seeds, base, variants.")] = studies.PACKAGED,
    data: Annotated[str | None, typer.Option(help="Training images, in place of the study's.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the functions that the file names as models.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of all runs and of the table.")] = Path("runs/study"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch, of each run.")] = 1,
) -> None:
    """Run a training configuration in several variants and seeds, and compare them.

    Finished runs are kept, and a killed study goes on.

    Without a file: MSGD, MGNC, SNGM and the ENGM family, the comparison of ENGM's Table 2 on Fashion-MNIST.
    """
    with refusing():
        chosen = studies.read(study)
        cells = studies.cells(chosen, out, trust_code=trust_code, **({} if data is None else {"data": data}))
        with bars() as bar:
            task = bar.add_task("training", total=len(cells))
            outcomes = studies.execute(
                cells, jobs=jobs, threads=threads, progress=lambda cell: bar.update(task, advance=1)
            )
    table = studies.summary(outcomes, chosen.paper)
    console.print(Markdown(studies.markdown(table, outcomes)))
    for path in studies.write(table, outcomes, out):
        say(f"wrote {path}")
