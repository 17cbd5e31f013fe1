"""`firstorder transfer`: a run in which examples are carried from model to model, shown as papers on transfer do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.commands.evaluate import computed, failures
from firstorder.evaluation.names.attacks import RECOMMENDED, parse
from firstorder.evaluation.reporting import transfer_report
from firstorder.evaluation.reporting.terminal import console, refusing, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.specification import Specification, specify

ATTACKS = ("i-fgsm", "mi-fgsm", "ni-fgsm", "si-ni-fgsm", "clipped-ngm", RECOMMENDED["clipped-ngm"])

WIDE = 4
"""With more targets than these the terminal gets a line for each instead of a column."""


def transfer(
    source: Annotated[list[str] | None, typer.Option(help="Models crafted on; A+B for an ensemble in logits.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Models that examples are tried on; the sources by default.")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: si-ni-fgsm:m=3, mi-fgsm+quantised.")] = None,
    defence: Annotated[list[str] | None, typer.Option(help="Defences before targets: jpeg:quality=50.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii, as 16/255.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of steps T; several draw a curve.")] = None,
    data: Annotated[str, typer.Option(help="mnist, cifar10, an .npz file, or a folder with labels.json.")] = "cifar10",
    count: Annotated[int, typer.Option(min=1, help="Images right on all models to attack.")] = 200,
    skip: Annotated[int, typer.Option(min=0, help="Of these, how many to leave out at the beginning.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Draws of random defences.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0,
    model_dir: Annotated[Path, typer.Option(help="RobustBench's checkpoints.")] = Path("models"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run, its tables and pictures.")] = Path("runs/transfer"),
) -> None:
    """How often examples made on one model fool others, bare and defended. Called again, it goes on where it was."""
    with refusing():
        specification = specified(
            source or ["cifar10-resnet18"],
            target,
            attacks=attack or ATTACKS,
            defences=defence or (),
            eps=eps or ("16/255",),
            steps=sorted(set(steps or (10,))),
            data=data,
            count=count,
            skip=skip,
            draws=draws,
            batch_size=batch_size,
            seeds=seed,
            pictures=0,
            zoo={"folder": str(model_dir)},
        )
        run = computed(specification, out, Engine(jobs=jobs, threads=threads))
    outcomes = transfer_report.outcomes(run)
    if outcomes:
        _print(outcomes, run.facts["data"]["count"])
        wrote(transfer_report.write(run, out))
    if failures(run):
        raise typer.Exit(1)


def specified(sources: list[str], targets: list[str] | None, **keys: object) -> Specification:
    """What a transfer table computes: on images that all models classify correctly, with attacks that have a radius."""
    members = dict.fromkeys(name for entry in sources for name in entry.split("+"))
    tried_on = list(dict.fromkeys(targets or members))
    models = list(dict.fromkeys([*members, *tried_on]))
    found = specify({"models": models, "sources": sources, "targets": tried_on, "select": "all-correct", **keys})
    for entry in found.attacks:
        if not parse(entry.attack).bounded:
            raise ValueError(
                f"{entry.attack!r} has no radius to stay in, and transfer is measured at a given eps; name another"
            )
    return found


def _print(outcomes: list[transfer_report.Outcome], count: int) -> None:
    steps = max(outcome.steps for outcome in outcomes)
    wide = len(outcomes[0].fooled) <= WIDE
    header, lines = (transfer_report.table if wide else transfer_report.long_table)(outcomes, steps)
    title = f"success, %, of {count} images that all models classify correctly, T = {steps}"
    console.print(table(header, lines, title=title, words=2 if wide else 4))
    for doubt in transfer_report.doubts(outcomes):
        console.print(doubt, highlight=False, markup=False)
