"""`firstorder train`: adversarial training from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from firstorder.evaluation.commands.options import given, with_options
from firstorder.evaluation.names import documents
from firstorder.evaluation.reporting.terminal import console, refusing, say
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import Outcome, run
from firstorder.fabric import make
from firstorder.fabric.checkpoint import STATE
from firstorder.fabric.loggers import logger as named


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the keys below; options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, with its keys.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the function that a file, or the run's folder, names as model.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu ...; auto takes a GPU where there is one.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes per node.")] = 1,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes; they must all see the folder.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read wds: pictures ahead of the training.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    logger: Annotated[
        list[str] | None,
        typer.Option(
            help="csv (always written), tensorboard, wandb or mlflow; may be repeated. [default: tensorboard]",
            show_default=False,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train a network adversarially, resumably.

    A killed run goes on with --resume.
    """
    keys = given(options, Configuration)
    if threads is not None:
        torch.set_num_threads(threads)
    with refusing():
        chosen = _configuration(out, config, keys, resume=resume, trust_code=trust_code)
        names = ["tensorboard"] if logger is None else logger
        loggers = [named(name, out) for name in names if name not in ("csv", "tensorboard")]
        fabric = make(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=chosen.precision, loggers=loggers
        )
        fabric.launch()
        with _bar(chosen.epochs, quiet=not fabric.is_global_zero) as report:
            outcome = run(
                chosen, out, fabric, resume=resume, workers=workers, tensorboard="tensorboard" in names, progress=report
            )
    if fabric.is_global_zero:
        _print(outcome, out)


def _configuration(
    out: Path, config: Path | None, keys: Mapping[str, Any], *, resume: bool, trust_code: bool
) -> Configuration:
    own = out / configurations.FILE
    if resume:
        if not own.exists():
            raise ValueError(f"{out} holds no run to resume ({configurations.FILE} is missing); leave out --resume")
        if config is not None or keys:
            raise ValueError(f"--resume takes every key from {own}; leave out {', '.join(keys) or '--config'}")
        config = own
    elif (out / STATE).exists():
        raise ValueError(f"{out} holds a run already; add --resume, or name another folder")
    values, lines = ({}, {}) if config is None else documents.read(config)
    return configure(
        {**values, **keys},
        source="" if config is None else str(config),
        lines={key: at for key, at in lines.items() if key[0] not in keys},
        trust_code=trust_code or "model" not in values or "model" in keys,
    )


@contextmanager
def _bar(epochs: int, *, quiet: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """The function that reports progress: as a bar, and as a line for every epoch."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task("training", total=None)

        def report(row: Mapping[str, float]) -> None:
            bars.update(task, completed=row["step"], total=row["steps"])
            if "epoch" in row and not quiet:
                line = f"epoch {row['epoch']:.0f} of {epochs}: {_figures(row)}"
                say(line)

        yield report


def _figures(row: Mapping[str, float]) -> str:
    figures = f"loss {row['loss']:.4f}, training {100 * row['robust']:.1f} % robust"
    natural, robust = row["validation_natural"], row["validation_robust"]
    return (
        figures
        if isnan(robust)
        else f"{figures}, validation {100 * natural:.1f} % natural, {100 * robust:.1f} % robust"
    )


def _print(outcome: Outcome, out: Path) -> None:
    for name, found in (("best", outcome.best), ("last", outcome.last)):
        epoch = f" (epoch {outcome.best_epoch})" if name == "best" else ""
        say(
            f"{name}{epoch}: {100 * found.natural:.2f} % natural, {100 * found.robust:.2f} % robust "
            f"on {outcome.count} {outcome.images} images"
        )
    say(f"overfitting: {100 * outcome.overfitting:.1f} %")
    for eps, robust in outcome.radii.items():
        say(f"best, at ε = {eps}: {100 * robust:.2f} % robust")
    say(f"wrote {out}")


with_options(train, Configuration)
