"""`firstorder attacks`."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from firstorder.attacks import Registry, registry, rules
from firstorder.attacks.distribution import DISTRIBUTION
from firstorder.evaluation.reporting.terminal import console, refusing
from firstorder.training import registry as methods

HOSTS = {"torch": "torch", "torchattacks": "torchattacks", "art": "art", "foolbox": "foolbox", "advlib": "torch"}
"""Where a registered attack can be used, and the module that it needs."""

LEFT_OUT = ("memory_budget", "model")
"""What is no hyper-parameter among the arguments of a class."""

attacks = typer.Typer(invoke_without_command=True, add_completion=False)


@attacks.callback()
def listed(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List what is registered: attacks, update rules, gradient methods; show one of them.

    Attacks come with their paper, norms, hosts and defaults.
    """
    if context.invoked_subcommand is None:
        (_print_json if as_json else _print_tables)()


@attacks.command()
def show(name: Annotated[str, typer.Argument(help="Of an attack, an update rule or a gradient method.")]) -> None:
    """Show one of them: what it does, its paper, its arguments and their defaults."""
    with refusing():
        groups: tuple[Registry[Any], ...] = (registry(), rules(), methods())
        found = next((group for group in groups if name in group.classes), None)
        if found is None:
            known = ", ".join(known for group in groups for known in group.classes)
            raise ValueError(f"nothing is registered as {name!r}; the names are {known}")
    cls = found.classes[name]
    title = f"{found.noun} [bold]{escape(name)}[/bold]: {escape(f'{cls.__module__}.{cls.__qualname__}')}"
    console.print(title + escape(_origin(found, name)), highlight=False)
    if isinstance(cls, type) and hasattr(cls, "norms"):
        console.print(escape(f"{cls.paper}; norms {', '.join(cls.norms)}; in {', '.join(_hosts())}"), highlight=False)
    console.print()
    console.print(escape(inspect.getdoc(cls) or ""), highlight=False, soft_wrap=True)
    console.print()
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("argument", no_wrap=True)
    table.add_column("default")
    for argument, value in _defaults(cls).items():
        table.add_row(argument, escape("required" if value is inspect.Parameter.empty else repr(value)))
    console.print(table)


def _print_json() -> None:
    known = registry()
    others: dict[str, Registry[Any]] = {"rules": rules(), "methods": methods()}
    rows = [
        {
            "name": name,
            "class": cls.__name__,
            "paper": cls.paper,
            "norms": cls.norms,
            "hosts": _hosts(),
            "defaults": _defaults(cls),
            "distribution": known.sources[name],
        }
        for name, cls in known.attacks.items()
    ]
    found = {
        "attacks": rows,
        **{key: _rows(group) for key, group in others.items()},
        "failures": dict(known.failures),
        **{f"{key} failures": dict(group.failures) for key, group in others.items()},
    }
    typer.echo(json.dumps(found, indent=2, default=repr))


def _print_tables() -> None:
    known = registry()
    others: tuple[Registry[Any], ...] = (rules(), methods())
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("name", "class", "norms"):
        table.add_column(column, no_wrap=True)
    table.add_column("paper, defaults, hosts")
    for name, cls in known.attacks.items():
        defaults = " ".join(f"{key}={value}" for key, value in _defaults(cls).items() if value not in (None, False))
        table.add_row(escape(name), cls.__name__, " ".join(cls.norms), escape(f"{cls.paper}{_origin(known, name)}"))
        table.add_row("", "", "", escape(defaults), style="dim")
        table.add_row("", "", "", escape(" ".join(_hosts())), style="dim")
    console.print(table)
    headings = ("update rules, as in pgd+NAME", "gradient methods, as in train --method NAME")
    for heading, group in zip(headings, others, strict=True):
        small = Table(box=None, header_style="bold", padding=(0, 1), title=heading, title_justify="left")
        for column in ("name", "class", "defaults"):
            small.add_column(column, no_wrap=column != "defaults")
        for row in _rows(group):
            defaults = " ".join(f"{key}={value}" for key, value in row["defaults"].items())
            small.add_row(escape(row["name"]), row["class"], escape(f"{defaults}{_origin(group, row['name'])}"))
        console.print()
        console.print(small)
    for group in (known, *others):
        for name, reason in group.failures.items():
            console.print(f"the {group.noun} [red]{escape(name)}[/red] is not available: {escape(reason)}")


def _hosts() -> list[str]:
    return [host for host, needed in HOSTS.items() if find_spec(needed) is not None]


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
