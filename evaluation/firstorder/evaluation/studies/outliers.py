"""ENGM and momentum SGD on convex problems whose gradients have heavy tails ([ENGM], Theorem 2).

Least squares, L_i(theta) = (x_i theta - y_i)^2 / 2 with y_i = x_i theta* + z_i, over pairs of examples with z_i and
-z_i, so that theta* is the minimum of the mean loss and of what ENGM limits it to. Two ways to raise the variance:

- "outliers": one noise in ten is s times as large as the others, which are standard normal;
- "scaled": all of the noise is s times as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from firstorder.evaluation.reporting.paper_tables import Row, Table
from firstorder.evaluation.studies.measurements import Measured
from firstorder.training import ENGM, MSGD, GradientMethod

DIMENSION, PAIRS, BATCH = 20, 500, 10
LR, MOMENTUM = 0.02, 0.9
SHARE = 0.1
"""Of outliers."""
PROBLEMS = ("outliers", "scaled")


def examples(problem: str, size: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x (2 PAIRS, DIMENSION), y (2 PAIRS, 1), and theta* (1, DIMENSION)."""
    best, x, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, DIMENSION), (PAIRS, DIMENSION), (PAIRS, 1))
    )
    large = torch.arange(PAIRS)[:, None] < SHARE * PAIRS if problem == "outliers" else torch.ones(PAIRS, 1).bool()
    noise = torch.where(large, size * noise, noise)
    y = x @ best.T
    return torch.cat([x, x]), torch.cat([y + noise, y - noise]), best


def gaps(problem: str, method: str, size: float, *, alpha: float, steps: int, seed: int) -> Tensor:
    """A(theta) - A(theta*) (steps,), A the mean loss, along the steps of a method from theta = 0.

    Args:
        problem: of `PROBLEMS`.
        method: MSGD or ENGM.
        size: s, of the noise.
        alpha: of ENGM.
        steps: their number.
        seed: of the examples and of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y, best = examples(problem, size, generator)
    model = nn.Linear(DIMENSION, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    rule: GradientMethod = MSGD(model) if method == "MSGD" else ENGM(model, alpha=alpha)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    square = x.T @ x / len(x)
    found = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        losses = (model(x[chosen]) - y[chosen]).square().flatten() / 2
        optimizer.zero_grad()
        rule.backward(losses)
        optimizer.step()
        away = model.weight.detach() - best
        found[t] = (away @ square @ away.T).item() / 2
    return found


def measured(
    *,
    sizes: Sequence[float] = (1, 10, 100),
    alphas: Sequence[float] = (3, 1),
    steps: int = 1000,
    seeds: Sequence[int] = tuple(range(5)),
) -> Measured:
    """log10 of the mean gap over the last half of the steps, by method and size of the noise, a value for each seed."""
    tables, traces = [], {}
    for problem in PROBLEMS:
        rows = []
        for size in sizes:
            for name, alpha in (("MSGD", math.inf), *((f"ENGM α = {alpha:g}", alpha) for alpha in alphas)):
                runs = torch.stack(
                    [gaps(problem, name.partition(" ")[0], size, alpha=alpha, steps=steps, seed=seed) for seed in seeds]
                )
                rows.append(Row(f"{name}, s = {size:g}", runs[:, steps // 2 :].mean(1).log10().numpy()))
                traces[problem, name, size] = runs.mean(0).numpy()
        title = f"least squares, {problem}, {len(seeds)} seeds, {steps} steps"
        tables.append(Table(title, "log10 of A − A*", tuple(rows), binary=False))
    return Measured(tables, {"gaps": picture(traces)})


def picture(traces: dict[tuple[str, str, float], np.ndarray[Any, Any]]) -> Figure:
    """The mean gap by step, a panel for each problem."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    panels: Any = figure.subplots(1, len(PROBLEMS), sharey=True)
    sizes = list(dict.fromkeys(size for *_, size in traces))
    names = list(dict.fromkeys(name for _, name, _ in traces))
    for axes, problem in zip(panels, PROBLEMS, strict=True):
        for (own, name, size), gap in traces.items():
            if own == problem:
                style = ("-", "--", ":")[sizes.index(size) % 3]
                color = ("#c2571a", "#3b6fb6", "#1b7f3b")[names.index(name) % 3]
                axes.plot(1 + np.arange(len(gap)), gap, color=color, linestyle=style, linewidth=1.0,
                          label=f"{name}, s = {size:g}")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="steps")
        axes.set_title(problem, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("A − A*, mean of the seeds")
    panels[-1].legend(frameon=False, fontsize=7)
    return figure
