"""`firstorder leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting.terminal import bars, console, refusing, telling


def leaderboard(
    model: Annotated[list[str] | None, typer.Option(help="Packaged name, robustbench:NAME or module:function.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: pqgd:steps=20, autoattack, firstorder.")] = None,
    eps: Annotated[str, typer.Option(help="Radius, as 0.3 or 8/255.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    data: Annotated[str, typer.Option(help="The packaged model whose images judge other models.")] = "cifar10-resnet18",
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    seed: int = 0,
    model_dir: Annotated[Path, typer.Option(help="RobustBench's checkpoints.")] = Path("models"),
    model_info: Annotated[Path | None, typer.Option(help="RobustBench's model_info folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and states.")] = Path("runs/leaderboard"),
) -> None:
    """Rank models by robust accuracy in RobustBench's columns. Called again, it goes on where it was interrupted."""
    from firstorder.evaluation.reporting import leaderboard as boards  # needs AutoAttack, as no other command does

    attacks = attack or ["pqgd", boards.AUTOATTACK]
    rows = []
    with refusing(), telling():
        radius_ = radius(eps, "eps")
        boards.check(attacks, norm)
        entries = [
            boards.entry(spec, data=data, model_dir=model_dir, info_dir=model_info, threat=norm)
            for spec in model or ["cifar10-resnet18"]
        ]
        with bars() as bar:
            task = bar.add_task("", total=len(entries) * len(attacks))
            for one in entries:
                rows.append(
                    boards.judge(
                        one,
                        attacks,
                        eps=radius_,
                        norm=norm,
                        count=count,
                        seed=seed,
                        batch_size=batch_size,
                        states=out / "states",
                        progress=lambda name, one=one: bar.update(  # type: ignore[misc]
                            task, description=escape(f"{one.name}: {name}"), advance=1
                        ),
                    )
                )
    header, lines = boards.table(rows)
    table = Table(box=SIMPLE_HEAD)
    shown = [i for i, heading in enumerate(header) if heading != "doubtful" or any(row.doubtful for row in rows)]
    for i in shown:
        table.add_column(header[i])
    for line in lines:
        table.add_row(*[escape(line[i]) for i in shown])
    console.print(table)
    facts = {"eps": eps, "norm": norm, "seed": seed}
    for path in boards.write(rows, out, facts=facts):
        console.print(f"wrote {path}", highlight=False)
