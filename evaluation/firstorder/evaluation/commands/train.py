"""`firstorder train`: adversarial training from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from firstorder.evaluation.commands.shared import console, refusing
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import Outcome, run
from firstorder.fabric import make
from firstorder.fabric.checkpoint import STATE


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the keys below; options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, with its keys.")] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu ...; auto takes a GPU where there is one.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes per node.")] = 1,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes; they must all see the folder.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write event files.")] = True,
    **options: Any,
) -> None:
    """Train a network on adversarial examples; a killed run goes on with --resume."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if threads is not None:
        torch.set_num_threads(threads)
    with refusing():
        chosen = _configuration(out, config, given, resume=resume)
        fabric = make(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=chosen.precision)
        fabric.launch()
        with _bar(chosen.epochs, quiet=not fabric.is_global_zero) as report:
            outcome = run(chosen, out, fabric, resume=resume, tensorboard=tensorboard, progress=report)
    if fabric.is_global_zero:
        _print(outcome, out)


def _configuration(out: Path, config: Path | None, given: Mapping[str, Any], *, resume: bool) -> Configuration:
    own = out / configurations.FILE
    if resume:
        if not own.exists():
            raise ValueError(f"{out} holds no run to resume ({configurations.FILE} is missing); leave out --resume")
        if config is not None or given:
            raise ValueError(f"--resume takes every key from {own}; leave out {', '.join(given) or '--config'}")
        config = own
    elif (out / STATE).exists():
        raise ValueError(f"{out} holds a run already; add --resume, or name another folder")
    values, lines = ({}, {}) if config is None else configurations.read(config)
    return configure(
        {**values, **given},
        source="" if config is None else str(config),
        lines={key: at for key, at in lines.items() if key not in given},
    )


@contextmanager
def _bar(epochs: int, *, quiet: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """The function that reports progress: as a bar, and as a line for every epoch."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task("training", total=None)

        def report(row: Mapping[str, float]) -> None:
            bars.update(task, completed=row["step"], total=row["steps"])
            if "epoch" in row and not quiet:
                told = f"epoch {row['epoch']:.0f} of {epochs}: {_told(row)}"
                bars.console.print(told, highlight=False, soft_wrap=True)

        yield report


def _told(row: Mapping[str, float]) -> str:
    told = f"loss {row['loss']:.4f}, training {100 * row['robust']:.1f} % robust"
    natural, robust = row["validation_natural"], row["validation_robust"]
    return told if isnan(robust) else f"{told}, validation {100 * natural:.1f} % natural, {100 * robust:.1f} % robust"


def _print(outcome: Outcome, out: Path) -> None:
    for name, found in (("best", outcome.best), ("last", outcome.last)):
        epoch = f" (epoch {outcome.best_epoch})" if name == "best" else ""
        console.print(
            f"{name}{epoch}: {100 * found.natural:.2f} % natural, {100 * found.robust:.2f} % robust "
            f"on {outcome.count} {outcome.images} images",
            highlight=False,
        )
    console.print(f"overfitting: {100 * outcome.overfitting:.1f} %", highlight=False)
    console.print(f"wrote {out}", highlight=False, markup=False)


def _options() -> list[inspect.Parameter]:
    """One option for every key of the configuration."""
    found = []
    for name, field in Configuration.model_fields.items():
        annotation: Any = field.annotation
        if get_origin(annotation) is tuple:
            kind: Any = list[float]
        elif name == "eps":
            kind = str
        elif get_origin(annotation) is Literal:
            kind = annotation
        else:
            kind = next((part for part in get_args(annotation) if part is not type(None)), annotation)
        default = field.get_default()
        shown = False if field.is_required() or default is None else _shown(default)
        help_text = f"{field.description} Required." if field.is_required() else field.description
        option = typer.Option(help=help_text, show_default=shown, rich_help_panel="Keys of the configuration")
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    return found


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)


def _with_options(command: Callable[..., None]) -> None:
    """Give the command the options that its keyword arguments stand for."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + _options()
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


_with_options(train)
