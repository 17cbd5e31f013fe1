"""`firstorder curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.attacks import RECOMMENDED
from firstorder.evaluation.reporting import curve as curves
from firstorder.evaluation.reporting.demo_figures import norm_curves
from firstorder.evaluation.reporting.terminal import bars, console, refusing, telling

MODELS = ("mnist-cnn", "cifar10-resnet18")
ATTACKS = ("ddn", "anu", RECOMMENDED["anu"])


def curve(
    model: Annotated[list[str] | None, typer.Option(help="Packaged models with images.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: anu, anu:annealed=false.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Budgets of gradients per image.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per model.")] = 100,
    skip: Annotated[int, typer.Option(min=0, help="Images to leave out at the beginning.")] = 0,
    targeted: Annotated[bool, typer.Option("--targeted", help="Towards a random other class.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the tables.")] = Path("runs/curve"),
) -> None:
    """Robust accuracy against the L2 radius, and the norm reached against the budget, of minimum-norm attacks."""
    if threads is not None:
        torch.set_num_threads(threads)
    runs = []
    with refusing():
        budgets = sorted(set(steps or (50, 100)))
        plan = [
            (name, packaged.get(name), label, curves.create(label, budget, packaged.get(name).data))
            for name in model or MODELS
            for label in attack or ATTACKS
            for budget in budgets
        ]
    with telling(), bars() as bar:
        task = bar.add_task("", total=len(plan))
        for name, chosen, label, search in plan:
            bar.update(task, description=f"{name}: {label}, {search.steps} steps")
            images = chosen.images()
            x, y = images.x[skip : skip + count], images.y[skip : skip + count]
            if not len(x):
                raise typer.BadParameter(f"--skip {skip} leaves none of the {len(images.x)} images of {name}")
            y = curves.random_targets(y, len(images.classes)) if targeted else y
            found, doubtful = curves.search(search, chosen.model(), x, y, targeted=targeted)
            runs.append(curves.Run(model=name, attack=label, steps=search.steps, norm=found, doubtful=doubtful))
            bar.update(task, advance=1)
    table = Table(
        title=f"smallest L2 norms, {'targeted' if targeted else 'untargeted'}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("model", "attack"):
        table.add_column(heading, no_wrap=True)
    for heading in ("images", "steps", "broken", "mean norm", "median"):
        table.add_column(heading, justify="right")
    for row in runs:
        broken = f"{100 * row.success():.1f} %"
        sizes = f"{row.mean():.4f}", f"{row.median():.4f}"
        table.add_row(row.model, row.attack, str(len(row.norm)), str(row.steps), broken, *sizes)
    console.print(table)
    picture = out / "curve.png"
    for path in [*curves.write(runs, out), norm_curves(runs, picture)]:
        console.print(f"wrote {path}", highlight=False)
