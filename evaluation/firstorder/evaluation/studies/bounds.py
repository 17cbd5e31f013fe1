"""The bound of clipped NGM's convergence along the measured gap ([NGM], Theorem 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from firstorder.evaluation.reporting.paper_tables import Row, Table
from firstorder.evaluation.studies.convergence import (
    ALPHA,
    BETA1,
    EPS,
    GAMMA,
    INSTANCES,
    LAM,
    SIDE,
    Problem,
    Trace,
    bound,
    contenders,
    follow,
    separable,
    valley,
)
from firstorder.evaluation.studies.measurements import Measured


def printed(problem: Problem, steps: Tensor) -> Tensor:
    """The bound that the theorem states, for the sum normaliser, at every T of `steps` (S,).

        G D^2 / (2 alpha gamma (1 - beta1) sqrt(T)) + G D^2 / (2 alpha gamma (1 - beta1) (1 - lambda)^2 T)
            + 2 alpha gamma G / ((1 - beta1) sqrt(T))

    with D the ball's diameter and G >= ||grad f||_1.
    """
    square = (2 * EPS) ** 2 * SIDE**2
    steepest = float(problem.weights @ problem.axes.abs().sum(1))
    rate = steps.double().reciprocal()
    first = square / (2 * ALPHA * GAMMA) * (rate.sqrt() + rate / (1 - LAM) ** 2)
    return steepest / (1 - BETA1) * (first + 2 * ALPHA * GAMMA * rate.sqrt())


def measured(*, steps: int = 10_000, seeds: Sequence[int] = tuple(range(5))) -> Measured:
    """The gap of clipped NGM's average, times sqrt(T), and both bounds, at the powers of ten of T; a value for each
    seed of the problem.
    """
    tables, shown = [], {}
    for make in (separable, valley):
        problems = [make(seed=seed) for seed in seeds]
        found = [follow(contenders(one, steps)["clipped NGM, sum"], one, "clipped NGM, sum")[1] for one in problems]
        marks, rows = found[0].steps, []
        for t in (10**k for k in range(1, math.floor(math.log10(steps)) + 1)):
            (at,) = (marks == t).nonzero().flatten().tolist()
            for name, values in (
                ("gap", [trace.gap for trace in found]),
                ("gap times √T", [trace.gap * marks.sqrt() for trace in found]),
                ("tight bound", [bound(one, marks) for one in problems]),
                ("printed bound", [printed(one, marks) for one in problems]),
            ):
                rows.append(Row(f"{name}, T = {t}", torch.stack(values)[:, at].numpy()))
        title = f"{problems[0].name}, {len(seeds)} seeds of {INSTANCES} instances"
        tables.append(Table(title, "f − f*", tuple(rows), binary=False))
        shown[problems[0].name] = found[0], bound(problems[0], marks), printed(problems[0], marks)
    return Measured(tables, {"bounds": _bounds(shown)})


def _bounds(shown: Mapping[str, tuple[Trace, Tensor, Tensor]]) -> Figure:
    """The gap of the average and the bounds against T, a panel for each problem."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    panels: Any = figure.subplots(1, len(shown), sharey=True)
    for axes, (name, (trace, tight, stated)) in zip(panels, shown.items(), strict=True):
        for values, label, color in (
            (stated, "the printed bound", "#c2571a"),
            (tight, "the bound that its argument gives here", "#8a8f98"),
            (trace.gap, "clipped NGM, average of the iterates", "#3b6fb6"),
        ):
            axes.plot(trace.steps, values, color=color, label=label)
        axes.set(xscale="log", yscale="log", xlabel="number of iterates T")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("f − f*")
    panels[0].legend(frameon=False, fontsize=8)
    return figure
