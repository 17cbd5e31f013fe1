"""The command line, `firstorder COMMAND`."""

from __future__ import annotations

import inspect
import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from firstorder.attacks import Registry, registry, rules
from firstorder.attacks.distribution import DISTRIBUTION
from firstorder.evaluation.commands.bench import bench
from firstorder.evaluation.commands.curve import curve
from firstorder.evaluation.commands.demo import SCENARIOS, Outcome, Scenario, bounded_attacks, radius, run
from firstorder.evaluation.commands.evaluate import evaluate
from firstorder.evaluation.commands.leaderboard import leaderboard
from firstorder.evaluation.commands.report import report as report_of_run
from firstorder.evaluation.commands.scale_invariance import scale_invariance
from firstorder.evaluation.commands.train import train
from firstorder.evaluation.commands.train_cost import train_cost
from firstorder.evaluation.commands.train_report import train_report
from firstorder.evaluation.commands.train_study import train_study
from firstorder.evaluation.commands.transfer import transfer
from firstorder.evaluation.reporting import demo_page as report
from firstorder.evaluation.reporting.terminal import bars, console
from firstorder.training import registry as methods

app = typer.Typer(
    help="Sharper first-order adversarial attacks: list them, see them at work, time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
COMMANDS = (
    bench,
    curve,
    evaluate,
    leaderboard,
    report_of_run,
    scale_invariance,
    train,
    train_cost,
    train_report,
    train_study,
    transfer,
)
for command in COMMANDS:
    app.command()(command)

HOSTS = ("torch", "torchattacks", "art")
"""Where a registered attack can be used, each named like the module it needs."""

LEFT_OUT = ("memory_budget", "model")
"""What is no hyper-parameter among the arguments of a class."""


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
    """List what is registered: attacks with paper, norms, hosts and defaults; update rules; gradient methods."""
    known = registry()
    others: dict[str, Registry[Any]] = {"rules": rules(), "methods": methods()}
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
        listed = {
            "attacks": rows,
            **{key: _rows(group) for key, group in others.items()},
            "failures": dict(known.failures),
            **{f"{key} failures": dict(group.failures) for key, group in others.items()},
        }
        typer.echo(json.dumps(listed, indent=2, default=repr))
        return
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("name", "class", "norms"):
        table.add_column(column, no_wrap=True)
    table.add_column("paper, defaults, hosts")
    for name, cls in known.attacks.items():
        defaults = " ".join(f"{key}={value}" for key, value in _defaults(cls).items() if value not in (None, False))
        table.add_row(name, cls.__name__, " ".join(cls.norms), escape(f"{cls.paper}{_origin(known, name)}"))
        table.add_row("", "", "", escape(defaults), style="dim")
        table.add_row("", "", "", escape(" ".join(hosts)), style="dim")
    console.print(table)
    for heading, group in (
        ("update rules, as in pgd+NAME", others["rules"]),
        ("gradient methods, as in train --method NAME", others["methods"]),
    ):
        small = Table(box=None, header_style="bold", padding=(0, 1), title=heading, title_justify="left")
        for column in ("name", "class", "defaults"):
            small.add_column(column, no_wrap=column != "defaults")
        for row in _rows(group):
            defaults = " ".join(f"{key}={value}" for key, value in row["defaults"].items())
            small.add_row(row["name"], row["class"], escape(f"{defaults}{_origin(group, row['name'])}"))
        console.print()
        console.print(small)
    for group in (known, *others.values()):
        for name, reason in group.failures.items():
            console.print(f"the {group.noun} [red]{escape(name)}[/red] is not available: {escape(reason)}")


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


def _with_progress(scenario: Scenario) -> Outcome:
    with bars() as bar:
        task = bar.add_task(scenario.name, total=len(bounded_attacks()))
        return run(scenario, progress=lambda name: bar.update(task, description=f"{scenario.name}: {name}", advance=1))


def _table(outcome: Outcome) -> Table:
    scenario = outcome.scenario
    table = Table(
        title=f"{scenario.name}: clean accuracy {100 * outcome.clean_accuracy:.1f} %\n"
        f"{len(outcome.images.y)} images, ε = {radius(scenario.eps)}, {scenario.gradients} gradients per image",
        title_justify="left",
        caption=f"left out, as one step takes more: {', '.join(outcome.left_out)}" if outcome.left_out else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("attack", no_wrap=True)
    for heading in ("steps", "robust accuracy", "mean L∞", "mean L2", "gradients"):
        table.add_column(heading, justify="right", no_wrap=heading != "robust accuracy")
    for row in outcome.rows:
        table.add_row(
            row.attack.replace(",", ",\n"),
            str(row.steps),
            f"{100 * row.robust_accuracy:.1f} %",
            f"{row.mean_linf:.4f}",
            f"{row.mean_l2:.3f}",
            f"{row.gradients:g}",
        )
    return table


def _rows(group: Registry[Any]) -> list[dict[str, Any]]:
    """The entries of a group that is not the attacks'."""
    return [
        {"name": name, "class": cls.__name__, "defaults": _defaults(cls), "distribution": group.sources[name]}
        for name, cls in group.classes.items()
    ]


def _origin(group: Registry[Any], name: str) -> str:
    return "" if group.sources[name] == DISTRIBUTION else f" (from {group.sources[name]})"


def _defaults(cls: type) -> dict[str, object]:
    """What a class is made from, with the defaults."""
    values = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in LEFT_OUT}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
