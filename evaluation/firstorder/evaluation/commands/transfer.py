"""`firstorder transfer`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from firstorder.evaluation.names import data as datasets
from firstorder.evaluation.names import models
from firstorder.evaluation.names.attacks import RECOMMENDED
from firstorder.evaluation.names.defences import defence as parse_defence
from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting import transfer_report
from firstorder.evaluation.reporting.terminal import bars, console, refusing, telling
from firstorder.evaluation.runs.transfer import CLEAN, Cell, Study, correct, create

ATTACKS = ("i-fgsm", "mi-fgsm", "ni-fgsm", "si-ni-fgsm", "clipped-ngm", RECOMMENDED["clipped-ngm"])

WIDE = 4
"""With more judges than these the terminal gets a line for each instead of a column."""


def transfer(
    source: Annotated[list[str] | None, typer.Option(help="Models crafted on; A+B for an ensemble in logits.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Models that judge; the sources by default.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: si-ni-fgsm:m=3, mi-fgsm+quantised.")] = None,
    defence: Annotated[list[str] | None, typer.Option(help="Defences before targets: jpeg:quality=50.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii, as 16/255.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of steps T; several draw a curve.")] = None,
    data: Annotated[str, typer.Option(help="mnist, cifar10, an .npz file, or a folder with labels.json.")] = "cifar10",
    count: Annotated[int, typer.Option(min=1, help="Images right on all models to attack.")] = 200,
    skip: Annotated[int, typer.Option(min=0, help="Of these, how many to leave out at the beginning.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Draws of random defences.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 0,
    model_dir: Annotated[Path, typer.Option(help="RobustBench's checkpoints.")] = Path("models"),
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and finished cells.")] = Path("runs/transfer"),
) -> None:
    """How often examples made on one model fool others, bare and defended. Called again, it goes on where it was."""
    if threads is not None:
        torch.set_num_threads(threads)
    sources = source or ["cifar10-resnet18"]
    targets = target or list(dict.fromkeys(name for entry in sources for name in entry.split("+")))
    budgets, labels = sorted(set(steps or (10,))), attack or list(ATTACKS)
    outcomes = []
    with refusing(), telling():
        radii = {text: radius(text, "eps") for text in eps or ("16/255",)}
        for label, e, budget in itertools.product(labels, radii.values(), budgets):
            create(label, eps=e, steps=budget)
        guards = {spec: parse_defence(spec) for spec in defence or ()}
        zoo = models.Zoo(folder=model_dir)
        names = list(dict.fromkeys([name for entry in sources for name in entry.split("+")] + targets))
        makers = {name: models.finder(name, zoo=zoo) for name in names}
        images = datasets.load(data)
        networks = {name: models.ready(make()) for name, make in makers.items()}
        right = correct(networks, images.x, images.y, batch_size=batch_size).nonzero()[skip : skip + count, 0]
        study = Study(
            networks,
            targets,
            images.x[right],
            images.y[right],
            defences=guards,
            draws=draws,
            folder=out / "cells",
            batch_size=batch_size,
        )
        plan = [
            Cell(source=s, attack=label, eps=e, steps=budget, seed=seed)
            for s, label, e, budget in itertools.product(sources, labels, radii.values(), budgets)
        ]
        plan = ([Cell(source=sources[0], attack=CLEAN, eps=0.0, steps=0)] if guards else []) + plan
        with bars() as bar:
            task = bar.add_task("", total=len(plan) * len(right))
            for cell in plan:
                bar.update(task, description=escape(f"{cell.source}: {cell.attack}, T = {cell.steps}"))
                outcomes.append(study.run(cell, progress=lambda n: bar.update(task, advance=n)))
    wide = len(outcomes[0].fooled) <= WIDE
    header, lines = (transfer_report.table if wide else transfer_report.long_table)(outcomes, budgets[-1])
    table = Table(
        title=f"success, %, of {len(right)} images that all models classify correctly, T = {budgets[-1]}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in header:
        words = heading in ("source", "attack", "judge")
        table.add_column(escape(heading), justify="left" if words else "right", overflow="fold")
    for line in lines:
        table.add_row(*[escape(value) for value in line])
    console.print(table)
    for doubt in transfer_report.doubts(outcomes):
        console.print(doubt, highlight=False, markup=False)
    facts = {"data": images.name, "images": len(right), "seed": seed, "draws of random defences": draws}
    for path in transfer_report.write(outcomes, out, facts=facts):
        console.print(f"wrote {path}", highlight=False)
