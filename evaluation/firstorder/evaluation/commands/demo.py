"""`firstorder demo`: packaged specifications, run and shown on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from firstorder.evaluation.commands.evaluate import computed, failures
from firstorder.evaluation.names import documents
from firstorder.evaluation.reporting import demo as pages
from firstorder.evaluation.reporting import demo_outcomes
from firstorder.evaluation.reporting.terminal import console, refusing, say, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.specification import specify

SPECIFICATIONS = ("demo-mnist", "demo-cifar10")
"""Among the assets."""

VERDICTS = ("demo-verdict-mnist", "demo-verdict-cifar10")
"""Likewise: a verdict on each of these models, beside PGD."""


def demo(
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the figures, and the runs.")] = Path("runs/demo"),
) -> None:
    """Attack the packaged MNIST and CIFAR-10 models with every bounded attack at equal budgets.

    Then give a verdict on both.
    """
    engine, outcomes, endings, failed = Engine(jobs=jobs, threads=threads), [], [], 0
    for name in (*SPECIFICATIONS, *VERDICTS):
        with refusing():
            run = computed(specify(documents.read(Path(name))[0]), out / Path(name).stem.removeprefix("demo-"), engine)
        if name in VERDICTS:
            endings.append(demo_outcomes.ending(run))
        else:
            outcomes.append(demo_outcomes.outcome(run))
            console.print(_table(outcomes[-1]))
        failed += failures(run)
    wrote(pages.write(outcomes, out, endings))
    for ending in endings:
        _print_ending(ending)
    if failed:
        raise typer.Exit(1)


def _print_ending(ending: demo_outcomes.Ending) -> None:
    header = ("attack", "robust accuracy", "forwards", "backwards", "passes")
    rows = [
        (attack, f"{100 * robust:.1f} %", f"{forwards:.0f}", f"{backwards:.0f}", f"{forwards + backwards:.0f}")
        for attack, robust, forwards, backwards in ending.rows
    ]
    console.print(table(header, rows, title=ending.title, caption="passes per image"))
    for note in ending.notes:
        say(note)


def _table(outcome: demo_outcomes.Outcome) -> Table:
    header = ("attack", "steps", "robust accuracy", "mean L∞", "mean L2", "gradients")
    rows = [
        (
            row.attack.replace(",", ",\n"),
            str(row.steps),
            f"{100 * row.robust_accuracy:.1f} %",
            f"{row.mean_linf:.4f}",
            f"{row.mean_l2:.3f}",
            f"{row.gradients:g}",
        )
        for row in outcome.rows
    ]
    first, second = outcome.title.split("\n")
    title = f"{first}: clean accuracy {100 * outcome.clean_accuracy:.1f} %\n{second}"
    left_out = f"left out, as one step takes more: {', '.join(outcome.left_out)}" if outcome.left_out else None
    return table(header, rows, title=title, caption=left_out)
