"""`firstorder curve`: runs of minimum-norm attacks, shown as curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.commands.evaluate import computed_by_data, failures
from firstorder.evaluation.names.attacks import RECOMMENDED, parse
from firstorder.evaluation.reporting import curve as curves
from firstorder.evaluation.reporting.terminal import console, refusing, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.store import Run

MODELS = ("mnist-cnn", "cifar10-resnet18")
ATTACKS = ("ddn", "anu", RECOMMENDED["anu"])


def curve(
    model: Annotated[list[str] | None, typer.Option(help="Models by name; two packaged ones by default.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: anu, anu:annealed=false.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Budgets of gradients per image.")] = None,
    data: Annotated[str | None, typer.Option(help="Images by name; a packaged model brings its own.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per model.")] = 100,
    skip: Annotated[int, typer.Option(min=0, help="Images to leave out at the beginning.")] = 0,
    targeted: Annotated[bool, typer.Option("--targeted", help="Towards a random other class.")] = False,
    all_targets: Annotated[
        bool, typer.Option("--all-targets", help="Towards every class in turn, a run for each on images of the others.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, picture, and a run per data set.")] = Path("runs/curve"),
) -> None:
    """Robust accuracy at every radius, from minimum-norm attacks.

    Radii are L2. Beside the curve, the norm that is reached against the budget.
    """
    with refusing():
        for label in attack or ():
            if parse(label).bounded:
                raise ValueError(
                    f"{label} stays within a given ball and has no norm to plot; name a minimum-norm attack (ddn, anu)"
                )
        if targeted and all_targets:
            raise ValueError("--targeted and --all-targets are two goals; leave out one of them")

        def computed(goal: str | bool, folder: Path) -> list[Run]:
            return computed_by_data(
                model or MODELS,
                data,
                folder,
                Engine(jobs=jobs, threads=threads),
                attacks=attack or ATTACKS,
                steps=sorted(set(steps or (50, 100))),
                norm="L2",
                count=count,
                skip=skip,
                targeted=goal,
                pictures=0,
                diagnose=False,
            )

        runs = computed("0", out / "toward-0") if all_targets else computed(targeted, out)
        if all_targets:
            classes = min(len(run.facts["data"]["classes"]) for run in runs)
            for number in range(1, classes):
                runs += computed(str(number), out / f"toward-{number}")
    found = curves.together([one for run in runs for one in curves.norms(run)])
    header = ("model", "attack", "images", "steps", "broken", "mean norm", "median", "ms an image")
    rows = [
        (
            one.model,
            one.attack,
            str(len(one.norm)),
            str(one.steps),
            f"{100 * one.success():.1f} %",
            f"{one.mean():.4f}",
            f"{one.median():.4f}",
            f"{1e3 * one.seconds:.1f}",
        )
        for one in found
    ]
    if found:
        goal = (
            "towards every class, on images of the others" if all_targets else "targeted" if targeted else "untargeted"
        )
        title = f"smallest L2 norms, {goal}"
        console.print(table(header, rows, title=title, words=2))
        wrote(curves.write(found, out))
    if sum(map(failures, runs)):
        raise typer.Exit(1)
