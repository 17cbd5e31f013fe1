"""The command line: `firstorder attacks`, `demo`, `curve`, `leaderboard` and `bench`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from firstorder.attacks import Attack, registry
from firstorder.evaluation import curve as curves
from firstorder.evaluation import packaged, report
from firstorder.evaluation.benchmark import per_step
from firstorder.evaluation.demo import SCENARIOS, Outcome, Scenario, bounded_attacks, radius, run
from firstorder.evaluation.figures import norm_curves

app = typer.Typer(
    help="Sharper first-order adversarial attacks: list them, see them at work, time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

HOSTS = ("torch", "torchattacks", "art")
"""Where a registered attack can be used, each named like the module it needs."""


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show informational messages.")] = False,
) -> None:
    """Set up logging for all commands."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )


@app.command()
def attacks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """List the registered attacks: name, class, paper, norms, hosts and defaults."""
    known = registry()
    hosts = [host for host in HOSTS if find_spec(host) is not None]
    if as_json:
        rows = [
            {
                "name": name,
                "class": cls.__name__,
                "paper": cls.paper,
                "norms": cls.norms,
                "hosts": hosts,
                "defaults": _defaults(cls),
                "distribution": known.sources[name],
            }
            for name, cls in known.attacks.items()
        ]
        typer.echo(json.dumps({"attacks": rows, "failures": dict(known.failures)}, indent=2, default=repr))
        return
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("name", "class", "norms"):
        table.add_column(column, no_wrap=True)
    table.add_column("paper, defaults, hosts")
    for name, cls in known.attacks.items():
        defaults = " ".join(f"{key}={value}" for key, value in _defaults(cls).items() if value not in (None, False))
        source = "" if known.sources[name] == "firstorder" else f" (from {known.sources[name]})"
        table.add_row(name, cls.__name__, " ".join(cls.norms), escape(f"{cls.paper}{source}"))
        table.add_row("", "", "", escape(defaults), style="dim")
        table.add_row("", "", "", escape(" ".join(hosts)), style="dim")
    console.print(table)
    for name, reason in known.failures.items():
        console.print(f"[red]{escape(name)}[/red] is not available: {escape(reason)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the figures and results.json.")] = Path("runs/demo"),
) -> None:
    """Attack the packaged MNIST and CIFAR-10 models with every bounded attack at equal budgets."""
    outcomes = []
    for scenario in SCENARIOS:
        outcomes.append(_with_progress(scenario))
        console.print(_table(outcomes[-1]))
        console.print()
    for path in report.write(outcomes, out):
        console.print(f"wrote {path}", highlight=False)


@app.command()
def bench(
    family: Annotated[str, typer.Option(help="Attacks to time: bounded or minimum-norm.")] = "bounded",
    model: Annotated[str, typer.Option(help="Packaged model: mnist-cnn or cifar10-resnet18.")] = "mnist-cnn",
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds to take the median of.")] = 31,
    batch_size: Annotated[int, typer.Option(min=1, max=500)] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 1,
) -> None:
    """Time a step of the attacks through every host, as a ratio to the bare forward and backward."""
    with _refusing():
        chosen = packaged.get(model)
        images = chosen.images()
        x, y = images.x[:batch_size], images.y[:batch_size]
        costs = per_step(chosen.model(), x, y, family=family, steps=steps, rounds=rounds, threads=threads)
    table = Table(
        title=f"time per step / bare step\n{model}, batch {len(x)}, {steps} steps, "
        f"{threads} thread{'s' if threads > 1 else ''}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("contender", no_wrap=True)
    for heading in (f"median of {rounds}", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(cost.name, f"{cost.median:.3f}", f"{cost.low:.3f}", f"{cost.high:.3f}")
    console.print(table)


@app.command()
def curve(
    model: Annotated[list[str] | None, typer.Option(help="Packaged models; all by default.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: anu, anu:annealed=false.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Budgets of gradients per image.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per model.")] = 100,
    targeted: Annotated[bool, typer.Option("--targeted", help="Towards a random other class.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the tables.")] = Path("runs/curve"),
) -> None:
    """Robust accuracy against the L2 radius, and the norm reached against the budget, of minimum-norm attacks."""
    if threads is not None:
        torch.set_num_threads(threads)
    runs = []
    with _refusing():
        budgets = sorted(set(steps or (50, 100)))
        plan = [
            (name, packaged.get(name), label, curves.create(label, budget, packaged.get(name).preset))
            for name in model or packaged.MODELS
            for label in attack or ("ddn", "anu")
            for budget in budgets
        ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(plan))
        for name, chosen, label, search in plan:
            bar.update(task, description=f"{name}: {label}, {search.steps} steps")
            images = chosen.images()
            x, y = images.x[:count], images.y[:count]
            y = curves.random_targets(y, len(images.classes)) if targeted else y
            found = curves.norms(search, chosen.model(), x, y, targeted=targeted)
            runs.append(curves.Run(model=name, attack=label, steps=search.steps, norm=found))
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


@app.command()
def leaderboard(
    model: Annotated[list[str] | None, typer.Option(help="Packaged name, robustbench:NAME or module:function.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Registry names, autoattack, firstorder.")] = None,
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
    from firstorder.evaluation import leaderboard as boards  # needs AutoAttack, which the other commands do not

    attacks = attack or ["pqgd", boards.AUTOATTACK]
    rows = []
    with _refusing():
        radius_ = _radius(eps)
        boards.check(attacks, norm)
        entries = [
            boards.entry(spec, data=data, model_dir=model_dir, info_dir=model_info, threat=norm)
            for spec in model or ["cifar10-resnet18"]
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
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
    for heading in header:
        table.add_column(heading)
    for line in lines:
        table.add_row(*[escape(cell) for cell in line])
    console.print(table)
    facts = {"eps": eps, "norm": norm, "seed": seed}
    for path in boards.write(rows, out, facts=facts):
        console.print(f"wrote {path}", highlight=False)


def _radius(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps={text!r} is not a number; write 0.3 or 8/255") from None


@contextmanager
def _refusing() -> Iterator[None]:
    """A user's mistake as one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _with_progress(scenario: Scenario) -> Outcome:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(scenario.name, total=len(bounded_attacks()))
        return run(scenario, progress=lambda name: bar.update(task, description=f"{scenario.name}: {name}", advance=1))


def _table(outcome: Outcome) -> Table:
    scenario = outcome.scenario
    table = Table(
        title=f"{scenario.name}: clean accuracy {100 * outcome.clean_accuracy:.1f} %\n"
        f"{len(outcome.images.y)} images, ε = {radius(scenario.eps)}, {scenario.gradients} gradients per image",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("attack", no_wrap=True)
    for heading in ("steps", "robust accuracy", "mean L∞", "mean L2", "gradients", "time / PGD"):
        table.add_column(heading, justify="right", no_wrap=heading != "robust accuracy")
    for row in outcome.rows:
        table.add_row(
            row.attack,
            str(row.steps),
            f"{100 * row.robust_accuracy:.1f} %",
            f"{row.mean_linf:.4f}",
            f"{row.mean_l2:.3f}",
            f"{row.gradients:g}",
            f"{row.time_relative_to_pgd:.2f}",
        )
    return table


def _defaults(cls: type[Attack]) -> dict[str, object]:
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "memory_budget"}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
