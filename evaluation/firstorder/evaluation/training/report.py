"""The diagnostics of [ENGM] from the logs of one run or several: a page and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from firstorder.evaluation.names import documents
from firstorder.evaluation.reporting.curve import LINES
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import LANDSCAPE, RESULT, Outcome, load
from firstorder.fabric.logs import EPOCHS, GRADIENTS
from firstorder.files import replacing, write_text

PAGE = "report.html"


@dataclass(frozen=True, eq=False)
class Log:
    """What a run's folder holds.

    Attributes:
        name: of the folder.
        configuration: of the run.
        epochs: a row per epoch.
        gradients: a row per measured example and epoch; empty where none were measured.
        landscape: `offsets` (P,), `best` and `last` (P, P); empty before the run's end.
        outcome: on the test images; None before the run's end.
    """

    name: str
    configuration: Configuration
    epochs: pd.DataFrame
    gradients: pd.DataFrame
    landscape: Mapping[str, np.ndarray[Any, Any]]
    outcome: Outcome | None


def read(folder: Path) -> Log:
    """The logs of a run, which may still be going on.

    Raises:
        ValueError: a folder without a run, or one that has not finished an epoch.
    """
    if not (folder / configurations.FILE).exists():
        raise ValueError(f"{folder} holds no run of training ({configurations.FILE} is missing)")
    epochs = _table(folder / EPOCHS)
    if epochs.empty:
        raise ValueError(f"{folder} has not finished an epoch yet; wait, or go on with firstorder train --resume")
    scape: dict[str, np.ndarray[Any, Any]] = {}
    if (folder / LANDSCAPE).exists():
        with np.load(folder / LANDSCAPE, allow_pickle=False) as arrays:
            scape = {name: arrays[name] for name in arrays.files}
    values, lines = documents.read(folder / configurations.FILE)
    return Log(
        name=folder.resolve().name,
        configuration=configure(values, source=str(folder / configurations.FILE), lines=lines),
        epochs=epochs,
        gradients=_table(folder / GRADIENTS),
        landscape=scape,
        outcome=load(folder) if (folder / RESULT).exists() else None,
    )


def write(logs: Sequence[Log], out: Path) -> list[Path]:
    """Write the page and its pictures into `out` and return their paths, the page first."""
    if not logs:
        raise ValueError("there is no run to report; name at least one folder")
    pictures: dict[str, Figure] = {"curves.png": curves(logs)}
    if any("mu" in log.epochs for log in logs):
        pictures["gradients.png"] = gradients(logs)
    if any(not log.gradients.empty for log in logs):
        pictures["correlation.png"] = correlation(logs)
    if any(log.landscape for log in logs):
        pictures["landscape.png"] = landscapes(logs)
    for name, figure in pictures.items():
        with replacing(out / name) as temporary:
            figure.savefig(temporary, dpi=150)
    environment = Environment(
        loader=PackageLoader("firstorder.evaluation"), undefined=StrictUndefined, trim_blocks=True, autoescape=True
    )
    page = environment.get_template("training.html").render(
        logs=logs,
        pictures={name: 96 * figure.get_figwidth() for name, figure in pictures.items()},
        best=best,
        percent=lambda share: f"{100 * share:.2f}",
    )
    write_text(out / PAGE, page)
    return [out / PAGE, *(out / name for name in pictures)]


def best(log: Log) -> pd.Series[Any] | None:
    """The row of the epoch with the highest robust accuracy on the validation images; None before any is judged."""
    judged = log.epochs["validation_robust"].dropna()
    if judged.empty:
        return None
    row: pd.Series[Any] = log.epochs.loc[judged.idxmax()]
    return row


def curves(logs: Sequence[Log]) -> Figure:
    """Robust accuracy on training and validation images, natural accuracy, and the loss, by epoch."""
    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    robust, natural, loss = _panels(figure, 3)
    for color, log in _colored(logs):
        table = log.epochs
        judged = table.dropna(subset="validation_robust")
        robust.plot(table["epoch"], 100 * table["robust"], color=color, linestyle=":", label=f"{_label(log)}, training")
        robust.plot(
            judged["epoch"], 100 * judged["validation_robust"], color=color, label=f"{_label(log)}, validation"
        )  # fmt: skip
        at = best(log)
        if at is not None:
            robust.plot(at["epoch"], 100 * at["validation_robust"], color=color, marker="o")
        natural.plot(judged["epoch"], 100 * judged["validation_natural"], color=color, label=_label(log))
        loss.plot(table["epoch"], table["loss"], color=color, label=_label(log))
    _finish(robust, "robust accuracy (● best epoch)", "accuracy, %")
    _finish(natural, "natural accuracy, validation", "accuracy, %")
    _finish(loss, "adversarial training loss", "loss")
    return figure


def gradients(logs: Sequence[Log]) -> Figure:
    """mu and sigma^2 of the per-example gradients (Fig. 2), and the weights that the method gave, by epoch."""
    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    mean, variance, weight = _panels(figure, 3)
    for color, log in _colored(logs):
        table = log.epochs
        if "mu" in table:
            mean.plot(table["epoch"], table["mu"], color=color, label=_label(log))
            variance.plot(table["epoch"], table["sigma2"], color=color, label=_label(log))
        weight.plot(table["epoch"], table["weight"], color=color, label=_label(log))
    for axes in (mean, variance):
        axes.set_yscale("log")
    _finish(mean, "μ, the mean norm of an example's gradient", "μ")
    _finish(variance, "σ², the variance of the gradients", "σ²")
    _finish(weight, "mean weight of an example", "w")
    return figure


def correlation(logs: Sequence[Log]) -> Figure:
    """The norms of the gradients by the input and by the parameters (Fig. 3): last epoch, and Pearson's by epoch."""
    measured = [log for log in logs if not log.gradients.empty]
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    scatter, pearson = _panels(figure, 2)
    for color, log in _colored(logs):
        if log not in measured:
            continue
        last = log.gradients[log.gradients["step"] == log.gradients["step"].max()]
        scatter.scatter(last["input_norm"], last["norm"], s=9, alpha=0.6, color=color, label=_label(log), linewidths=0)
        pearson.plot(log.epochs["epoch"], log.epochs["correlation"], color=color, label=_label(log))
    scatter.set(xlabel="‖∇ₓ L‖", ylabel="‖∇θ L‖")
    scatter.set_title("norms of every example's gradients, last epoch", fontsize=10)
    scatter.spines[["top", "right"]].set_visible(False)
    scatter.legend(frameon=False, fontsize=8)
    _finish(pearson, "their correlation", "Pearson's r")
    return figure


def landscapes(logs: Sequence[Log]) -> Figure:
    """The loss along the gradient's sign and along random signs (Fig. 4), best and last weights, on one scale."""
    shown = [log for log in logs if log.landscape]
    top = max(float(log.landscape[which].max()) for log in shown for which in ("best", "last"))
    figure = Figure(figsize=(7.4, 3.5 * len(shown)), layout="constrained")
    grid: Any = figure.subplots(len(shown), 2, squeeze=False)
    for line, log in zip(grid, shown, strict=True):
        for axes, which in zip(line, ("best", "last"), strict=True):
            offsets = log.landscape["offsets"] / log.configuration.eps
            image = axes.contourf(
                offsets, offsets, log.landscape[which], levels=np.linspace(0, top, 25), cmap="viridis"
            )
            axes.set(xlabel="random signs, ε", ylabel="sign of the gradient, ε")
            axes.set_title(f"{_label(log)}: {which} weights", fontsize=10)
    figure.colorbar(image, ax=grid, shrink=0.9, label="loss")
    return figure


def _panels(figure: Figure, count: int) -> list[Axes]:
    grid: Any = figure.subplots(1, count, squeeze=False)
    return list(grid[0])


def _colored(logs: Sequence[Log]) -> list[tuple[str, Log]]:
    return [(LINES[(i + 1) % len(LINES)], log) for i, log in enumerate(logs)]


def _label(log: Log) -> str:
    """The run's name as matplotlib shows it: no formula, and not hidden from the legend."""
    name = log.name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() and path.stat().st_size else pd.DataFrame()
