"""The diagnostics of [ENGM] from the logs of one run or several: a page and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from firstorder.evaluation.names import documents
from firstorder.evaluation.reporting import document, drawing
from firstorder.evaluation.reporting.document import Drawing
from firstorder.evaluation.reporting.drawing import NARROW, WIDTH
from firstorder.evaluation.reporting.figures import COLORS
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import RESULT, Outcome, arrays, load
from firstorder.fabric.logs import EPOCHS, GRADIENTS

PAGE = "report.html"
IMAGES = 4
"""Images whose landscape is drawn."""

CAPTIONS = {
    "curves": (
        "Learning curves",
        "The gap between the dotted line (training) and the solid one (validation) is overfitting. Natural training "
        "has its dotted line among the natural accuracies.",
    ),
    "gradients": (
        "Gradients of the examples",
        "Mean norm μ and variance σ² of the gradients of the loss of single training examples by the parameters, in "
        "evaluation mode, and the mean weight that the method gave them in training.",
    ),
    "correlation": (
        "Gradients by the input and by the parameters",
        "N-ENGM and A-ENGM estimate the norm on the vertical axis from that on the horizontal one.",
    ),
    "landscape": (
        "Loss landscape",
        "Loss around single test images (×), along the perturbation of PGD-20 and along noise orthogonal to it, in "
        "units of the length of the perturbation; one scale for each image.",
    ),
}
"""What the figures show, by their names."""

LineStyle = Literal["-", ":"]


@dataclass(frozen=True, eq=False)
class Log:
    """What a run's folder holds.

    Attributes:
        name: of the folder.
        configuration: of the run.
        epochs: a row per epoch.
        gradients: a row per measured example and epoch; empty where none were measured.
        landscape: `offsets` (P,), `best` and `last` (N, P, P); empty before the run's end.
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
    values, lines = documents.read(folder / configurations.FILE)
    return Log(
        name=folder.resolve().name,
        configuration=configure(values, source=str(folder / configurations.FILE), lines=lines),
        epochs=epochs,
        gradients=_table(folder / GRADIENTS),
        landscape=arrays(folder),
        outcome=load(folder) if (folder / RESULT).exists() else None,
    )


def write(logs: Sequence[Log], out: Path) -> list[Path]:
    """Write the page and its pictures into `out` and return their paths, the page first."""
    if not logs:
        raise ValueError("there is no run to report; name at least one folder")
    charts: dict[str, Callable[[float], Figure]] = {"curves": lambda width: curves(logs, width=width)}
    if any("mu" in log.epochs for log in logs):
        charts["gradients"] = lambda width: gradients(logs, width=width)
    if any(not log.gradients.empty for log in logs):
        charts["correlation"] = lambda width: correlation(logs, width=width)
    if any(log.landscape for log in logs):
        charts["landscape"] = lambda width: landscapes(logs, width=width)
    parts = []
    with drawing.style():
        for name, draw in charts.items():
            title, caption = CAPTIONS[name]
            svg, width = drawing.both(draw, out, name)
            shown = Drawing(name=name, svg=svg, width=width, subject="training", title=title, caption=caption)
            parts.append(document.Part(anchor=name, title=title, drawings=[shown]))
    runs = document.Part(anchor="runs", title="Runs", tables=[_summary(logs)])
    folded = [(log.name, "".join(f"{k}: {v}\n" for k, v in log.configuration.model_dump().items())) for log in logs]
    document.write(
        out / PAGE,
        over="firstorder · adversarial training",
        title=f"{len(logs)} training runs" if len(logs) > 1 else logs[0].name,
        name=f"Adversarial training: {', '.join(log.name for log in logs)}",
        lead=_lead(logs),
        parts=[runs, *parts, document.Part(anchor="configurations", title="Configurations", folded=folded)],
    )
    return [out / PAGE, *(out / f"{name}.{kind}" for name in charts for kind in ("png", "svg"))]


def _lead(logs: Sequence[Log]) -> str:
    first = logs[0].configuration
    differ = " (the first run's; the runs differ)" if len({log.configuration.eps for log in logs}) > 1 else ""
    return (
        f"Robust accuracy is that under PGD of {first.judge_steps} steps of ε / 10 with the margin loss, "
        f"ε = {first.eps:.4g}{differ}; ranges are 95 % intervals "
        "(Wilson). Overfitting is the loss of robust accuracy from the best to the last epoch, relative to the best."
    )


def _summary(logs: Sequence[Log]) -> document.Table:
    """A line for every run."""
    header = ("run", "objective", "method", "epochs", "best epoch", "natural, best", "robust, best", "natural, last",
              "robust, last", "overfitting", "images")  # fmt: skip
    rows = []
    for log in logs:
        at, own, done = best(log), log.configuration, log.outcome
        line = [log.name, own.objective, own.method, f"{len(log.epochs)} of {own.epochs}"]
        line.append(f"{int(at['epoch'])}" if at is not None else "–")
        if done is not None:
            shares = (done.best.natural, done.best.robust, done.last.natural, done.last.robust)
            line += [*(_percent(share, done.count) for share in shares), f"{100 * done.overfitting:.2f} %"]
            line.append(f"{done.count} {done.images}")
        else:
            found = ("–", "–") if at is None else (
                _percent(at["validation_natural"], own.validation), _percent(at["validation_robust"], own.validation)
            )  # fmt: skip
            line += [*found, "not finished", "", "", f"{own.validation} validation"]
        rows.append(line)
    return document.Table(title="", header=header, rows=rows, words=3)


def _percent(share: float, count: int) -> str:
    low, high = wilson(float(share), count)
    return f"{100 * share:.2f} % ({100 * low:.1f} – {100 * high:.1f})"


def best(log: Log) -> pd.Series[Any] | None:
    """The row of the epoch with the highest robust accuracy on the validation images; None before any is evaluated."""
    evaluated = log.epochs["validation_robust"].dropna()
    if evaluated.empty:
        return None
    row: pd.Series[Any] = log.epochs.loc[evaluated.idxmax()]
    return row


def curves(logs: Sequence[Log], *, width: float = WIDTH) -> Figure:
    """Robust accuracy on training and validation images, natural accuracy, and the loss, by epoch."""
    figure, (robust, natural, loss) = _panels(3, width)
    for color, log in _colored(logs):
        table = log.epochs
        evaluated = table.dropna(subset="validation_robust")
        trained = natural if log.configuration.objective == "natural" else robust
        trained.plot(table["epoch"], 100 * table["robust"], color=color, linestyle=":")
        robust.plot(evaluated["epoch"], 100 * evaluated["validation_robust"], color=color)
        at = best(log)
        if at is not None:
            robust.plot(at["epoch"], 100 * at["validation_robust"], color=color, marker="o")
        natural.plot(evaluated["epoch"], 100 * evaluated["validation_natural"], color=color)
        loss.plot(table["epoch"], table["loss"], color=color)
    _finish(robust, "robust accuracy (● best epoch)", "accuracy, %")
    _finish(natural, "natural accuracy", "accuracy, %")
    _finish(loss, "training loss", "loss")
    _legend(figure, logs, {"training": ":", "validation": "-"})
    return figure


def gradients(logs: Sequence[Log], *, width: float = WIDTH) -> Figure:
    """mu and sigma^2 of the per-example gradients (Fig. 2), and the weights that the method gave, by epoch."""
    figure, (mean, variance, weight) = _panels(3, width)
    for color, log in _colored(logs):
        table = log.epochs
        if "mu" in table:
            mean.plot(table["epoch"], table["mu"], color=color)
            variance.plot(table["epoch"], table["sigma2"], color=color)
        weight.plot(table["epoch"], table["weight"], color=color)
    for axes in (mean, variance):
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(labelOnlyBase=False))  # without formulas
    _finish(mean, "μ, the mean norm of gradients", "μ")
    _finish(variance, "σ², the variance of the gradients", "σ²")
    _finish(weight, "mean weight of an example", "w")
    _legend(figure, logs)
    return figure


def correlation(logs: Sequence[Log], *, width: float = WIDTH) -> Figure:
    """The norms of the gradients by the input and by the parameters (Fig. 3): last epoch, and Pearson's by epoch."""
    measured = [log for log in logs if not log.gradients.empty]
    figure, (scatter, pearson) = _panels(2, width)
    for color, log in _colored(logs):
        if log not in measured:
            continue
        last = log.gradients[log.gradients["step"] == log.gradients["step"].max()]
        scatter.scatter(last["input_norm"], last["norm"], s=9, alpha=0.6, color=color, linewidths=0)
        pearson.plot(log.epochs["epoch"], log.epochs["correlation"], color=color)
    scatter.set(xlabel="‖∇ₓ L‖", ylabel="‖∇θ L‖")
    scatter.set_title("every example's gradients, last epoch", fontsize=9)
    scatter.spines[["top", "right"]].set_visible(False)
    _finish(pearson, "their correlation", "Pearson's r")
    _legend(figure, logs)
    return figure


def landscapes(logs: Sequence[Log], *, width: float = WIDTH) -> Figure:
    """The loss along the perturbation of PGD-20 and noise orthogonal to it (Fig. 4): a row for each run's best and last
    weights, a column for each of the first images, on one scale for a column. Narrow, the first image alone.
    """
    rows = [(log, which) for log in logs if log.landscape for which in ("best", "last")]
    count = min(1 if width <= NARROW else IMAGES, *(len(log.landscape[which]) for log, which in rows))
    size = (NARROW, 3.2 * len(rows)) if width <= NARROW else (2.6 * count + 0.8, 2.6 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(len(rows), count, squeeze=False)
    for i in range(count):
        top = max(float(log.landscape[which][i].max()) for log, which in rows)
        for axes, (log, which) in zip(grid[:, i], rows, strict=True):
            offsets = log.landscape["offsets"]
            levels = np.linspace(0, max(top, 1e-6), 25)
            image = axes.contourf(offsets, offsets, log.landscape[which][i], levels=levels, cmap="viridis")
            axes.plot(0, 0, marker="x", color="white")
            axes.set(xlabel="orthogonal noise", ylabel="perturbation")
            axes.set_title(f"{_label(log)}: {which} weights", fontsize=9)
        figure.colorbar(image, ax=grid[:, i], location="bottom", shrink=0.9, label="loss")
    return figure


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, or one below the other where it is narrow."""
    narrow = width <= NARROW
    figure = Figure(figsize=(NARROW, 3.3 * count) if narrow else (4.2 * count, 4.2), layout="constrained")
    grid: Any = figure.subplots(count if narrow else 1, 1 if narrow else count, squeeze=False)
    return figure, list(grid.flat)


def _colored(logs: Sequence[Log]) -> list[tuple[str, Log]]:
    return [(COLORS[i % len(COLORS)], log) for i, log in enumerate(logs)]


def _label(log: Log) -> str:
    """The run's name as a legend shows it: a leading underscore would hide it."""
    return f" {log.name}" if log.name.startswith("_") else log.name


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    least = {"accuracy, %": 20.0, "w": 0.5, "Pearson's r": 0.5}.get(label, 0.0)  # less would magnify chance
    if high - low < least:
        floor = max((low + high - least) / 2, 0.0) if label != "Pearson's r" else (low + high - least) / 2
        axes.set_ylim(floor, floor + least)


def _legend(figure: Figure, logs: Sequence[Log], styles: Mapping[str, LineStyle] = MappingProxyType({})) -> None:
    """Name the colours of the runs below all panels, where no line runs, and the styles of lines."""
    lines = {_label(log): Line2D([], [], color=color) for color, log in _colored(logs)}
    lines |= {name: Line2D([], [], color="gray", linestyle=style) for name, style in styles.items()}
    columns = 2 if figure.get_figwidth() <= NARROW else 6
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() and path.stat().st_size else pd.DataFrame()
