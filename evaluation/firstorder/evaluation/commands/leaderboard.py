"""`firstorder leaderboard`: runs at one radius, ranked in RobustBench's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from firstorder.evaluation.commands.evaluate import computed_by_data, failures
from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting import leaderboard as boards
from firstorder.evaluation.reporting.terminal import console, refusing, table, wrote
from firstorder.evaluation.runs.computing import Engine

ZOO = "robustbench:"


def leaderboard(
    model: Annotated[list[str] | None, typer.Option(help="Packaged name, robustbench:NAME or module:function.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: pqgd:steps=20, autoattack, firstorder.")] = None,
    eps: Annotated[str, typer.Option(help="Radius, as 0.3 or 8/255.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    steps: Annotated[int, typer.Option(min=1, help="Of attacks that do not name their own.")] = 40,
    data: Annotated[
        str | None, typer.Option(help="Images by name; by default a packaged model's own, cifar10 for others.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0,
    model_dir: Annotated[Path, typer.Option(help="RobustBench's checkpoints.")] = Path("models"),
    model_info: Annotated[Path | None, typer.Option(help="RobustBench's model_info folder.")] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Look at every model for what makes its figure untrustworthy.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, and a run per data set.")] = Path("runs/leaderboard"),
) -> None:
    """Rank models by robust accuracy in RobustBench's columns.

    Called again, it goes on where it was interrupted.
    """
    with refusing():
        size = radius(eps, name="eps")
        names = model or ["cifar10-resnet18"]
        info = {name.removeprefix(ZOO): _info(name, model_info, norm) for name in names if name.startswith(ZOO)}
        runs = computed_by_data(
            names,
            data,
            out,
            Engine(jobs=jobs, threads=threads),
            default="cifar10",
            entries={f"{ZOO}{name}": _entry(name, own, size) for name, own in info.items()},
            attacks=attack or ["pqgd", boards.AUTOATTACK],
            steps=steps,
            eps=size,
            norm=norm,
            count=count,
            batch_size=batch_size,
            seeds=seed,
            pictures=0,
            diagnose=diagnose,
            zoo={"folder": str(model_dir)},
        )
    rows = [row for run in runs for row in boards.rows(run, info)]
    if rows:
        _print(rows)
        wrote(boards.write(rows, out, facts={"eps": eps, "norm": norm, "seed": seed, "steps": steps}))
    if sum(map(failures, runs)):
        raise typer.Exit(1)


def _info(name: str, folder: Path | None, threat: str) -> dict[str, Any]:
    """RobustBench's model_info, FOLDER/cifar10/THREAT/NAME.json; empty where there is none."""
    path = None if folder is None else folder / "cifar10" / threat / f"{name.removeprefix(ZOO)}.json"
    return boards.known_of(path) if path is not None and path.is_file() else {}


def _entry(name: str, info: dict[str, Any], eps: float) -> dict[str, Any]:
    """A model of the zoo; AutoAttack's figure is reported where it is at the same radius."""
    figure = info.get("autoattack_acc") if boards.same_radius(info, eps) else None
    return {"model": f"{ZOO}{name}", "name": name, "reported": None if figure in (None, "") else float(figure)}


def _print(rows: list[boards.Row]) -> None:
    header, lines = boards.table(rows)
    nothing = {"unverified": "0", "doubtful": "0"}  # and empty cells: a terminal is narrow
    filled = [any(line[i] not in {"", nothing.get(name)} for line in lines) for i, name in enumerate(header)]
    shown = [i for i, name in enumerate(header) if filled[i] and name != boards.DISTRUST]  # that is below, in full
    console.print(table([header[i] for i in shown], [[line[i] for i in shown] for line in lines], words=2))
    for row in boards.rank(rows):
        if row.distrust:
            said = f"{row.model}: {boards.DISTRUST}: {row.distrust}"
            console.print(said, style="red", highlight=False, markup=False)
