"""Sign steps against clipped NGM on convex problems of known optimum ([NGM], Theorem 3.4).

    python -m firstorder.evaluation.studies.convergence [--out runs/convergence] [--steps 10000]

The theorem: for convex f the average of the iterates a_1..a_T of clipped NGM, whose gradients are divided
by ||g||_1 and whose steps are alpha / sqrt(t), has f(mean a_t) - f* = O(1 / sqrt(T)). An attack ascends J, so
J = -f makes it minimise f over the ball. Both problems are ill-conditioned sums of kinks,

    f(a) = sum_k w_k |(A (a - c))_k|,    w_k from 1 down to 1/100,

and differ in the orthogonal A:

- "separable", A = I: the sign tells every pixel its way, the easiest case for sign steps, and still they
  stall. A constant step alpha crosses the kink at c_k again and again: I-FGSM ends in a cycle of two points
  of the grid x + alpha Z around c_k, so its iterates stay at alpha / 2 sum w_k in the mean, and the
  cycle's midpoint, to which their average tends, is not c_k either. In MI-FGSM with mu = 1 the gradients
  of the way to c_k have to be cancelled beyond it: it swings about c_k undamped. Where c_k lies
  outside the ball the optimum is on a face, which sign steps reach exactly. All that is missing is a
  decreasing step, and sign steps of alpha / sqrt(t) do converge here.
- "valley", A turns pairs of pixels by 45 degrees, one weight of a pair 10 times the other: the gradient's
  sign sees the steep side alone and, inside the ball, never moves along the valley's floor (Karimireddy
  et al. 2019, arXiv 1901.09847, Sec. 3), so decreasing steps stall too. MI-FGSM does move, and swings.

Every problem is a batch of instances with c at random; gaps are means over them. Step sizes are the papers':
eps / 10 for signs (alpha = eps / T at T = 10), [NGM]'s length for clipped NGM. With the theory's
normaliser, the sum, dense gradients are too short for the clip to act; with the default one, the mean,
it acts from the first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from firstorder.attacks import BIM, MIFGSM, NGM, ClippedNGM, IterativeAttack, Sign
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.files import replacing, write_text

logger = logging.getLogger(__name__)

EPS = 16 / 255
"""Radius of the ball."""
SIDE = 8
"""Images are (1, SIDE, SIDE)."""
INSTANCES = 8
"""Instances per problem, at most SIDE**2."""
ALPHA = 18 * math.sqrt(SIDE**2 / 268_203)
"""[NGM]'s alpha = 18 at this eps, an L2 length, scaled to d = SIDE**2."""
BETA1, LAM, GAMMA = 0.9, 0.99, 0.8
"""[NGM]'s beta1, lambda and gamma."""
PER_DECADE = 20
"""Values of T per decade at which the gap is taken."""
DECADES = 1.5
"""The last decades of T to which slopes are fitted."""
COLORS = {
    "I-FGSM": "#8a8f98",
    "MI-FGSM": "#7b4fa3",
    "I-FGSM, α/√t": "#c2571a",
    "clipped NGM, sum": "#3b6fb6",
    "clipped NGM, mean": "#1b7f3b",
}
"""The methods and their lines' colours."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """N instances of f_i(a) = sum_k w_k |(A (a - c_i))_k| over the ball of radius EPS around grey images.

    Called, it is the linear model a -> A a, whose logits the loss of instance i, its label, compares with A c_i.

    Attributes:
        axes: A, orthogonal, shape (d, d).
        weights: w, positive, shape (d,).
        centers: the minimisers without constraint, shape (N, d).
        optimum: the minimisers within the ball, shape (N, d).
    """

    name: str
    axes: Tensor
    weights: Tensor
    centers: Tensor
    optimum: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        return points.flatten(1) @ self.axes.T

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """J = -f (N,) from the logits (N, d)."""
        return -((logits - self(self.centers)[labels]).abs() @ self.weights)

    def start(self) -> Tensor:
        """The grey images (N, 1, SIDE, SIDE)."""
        return torch.full((len(self.centers), 1, SIDE, SIDE), 0.5, dtype=torch.float64)

    def gap(self, points: Tensor) -> Tensor:
        """f - f*, shape (N,), at one point of the ball per instance (N, ...)."""
        labels = torch.arange(len(points))
        return self.loss(self(self.optimum), labels) - self.loss(self(points), labels)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One method on one problem.

    Attributes:
        average: whether the gap is that of the iterates' average or of the last iterate.
        steps: T, the number of iterates so far, shape (S,).
        gap: f - f*, the mean over the instances, shape (S,).
    """

    problem: str
    name: str
    average: bool
    steps: Tensor
    gap: Tensor

    def slope(self, decades: float = DECADES) -> float:
        """The exponent p of gap = C T^p, by least squares in logarithms over the last `decades` of T."""
        late = self.steps * 10**decades >= self.steps[-1]
        if int(late.sum()) < 2:
            raise ValueError(f"decades={decades:g} leaves one point to fit; take more")
        x, y = self.steps[late].double().log(), self.gap[late].log()
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())


def separable(*, seed: int = 0) -> Problem:
    """A = I, c uniform within 1.25 EPS of the start: about a fifth of the optimum's pixels are on faces."""
    offset = 1.25 * _offsets(seed)
    return Problem(
        name="separable",
        axes=torch.eye(SIDE**2, dtype=torch.float64),
        weights=_weights(),
        centers=0.5 + offset,
        optimum=0.5 + offset.clamp(-EPS, EPS),
    )


def valley(*, seed: int = 0) -> Problem:
    """A = differences, then sums, of the image's upper and lower half, over sqrt(2); c uniform in the ball."""
    upper, lower = torch.eye(SIDE**2, dtype=torch.float64).chunk(2)
    centers = 0.5 + _offsets(seed)
    return Problem(
        name="valley",
        axes=torch.cat([upper - lower, upper + lower]) / math.sqrt(2),
        weights=_weights(),
        centers=centers,
        optimum=centers,
    )


def contenders(problem: Problem, steps: int) -> dict[str, IterativeAttack]:
    """The methods compared, by the names in `COLORS`."""
    loss, alpha = problem.loss, EPS / 10
    theory = ClippedNGM(
        eps=EPS,
        alpha=ALPHA,
        steps=steps,
        beta1=BETA1,
        lam=LAM,
        gamma=GAMMA,
        scope="example",
        normaliser="sum",
        loss=loss,
    )
    return {
        "I-FGSM": BIM(eps=EPS, alpha=alpha, steps=steps, loss=loss),
        "MI-FGSM": MIFGSM(eps=EPS, alpha=alpha, steps=steps, loss=loss),
        "I-FGSM, α/√t": NGM(eps=EPS, alpha=alpha, steps=steps, beta1=0.0, direction=Sign(), loss=loss),
        "clipped NGM, sum": theory,
        "clipped NGM, mean": replace(theory, normaliser="mean"),
    }


def follow(attack: IterativeAttack, problem: Problem, name: str) -> tuple[Trace, Trace]:
    """The gap of the last iterate and of the iterates' average, along one run of `attack` on `problem`."""
    decades = math.log10(attack.steps)
    marks = {round(10 ** (k / PER_DECADE)) for k in range(math.floor(decades * PER_DECADE) + 1)} | {attack.steps}
    x = problem.start()
    total = torch.zeros_like(x)
    last, average = [], []

    def record(t: int, gradient: Tensor, iterate: Tensor) -> None:
        total.add_(iterate)
        if t in marks:
            last.append(problem.gap(iterate).mean())
            average.append(problem.gap(total / t).mean())

    attack(problem, x, torch.arange(len(x)), hook=record)
    steps = torch.tensor(sorted(marks))
    return (
        Trace(problem=problem.name, name=name, average=False, steps=steps, gap=torch.stack(last)),
        Trace(problem=problem.name, name=name, average=True, steps=steps, gap=torch.stack(average)),
    )


def traces(problem: Problem, *, steps: int = 10_000) -> list[Trace]:
    """Every contender's traces on `problem`. A run does not depend on its length, so one shows all T up to `steps`."""
    return [trace for name, attack in contenders(problem, steps).items() for trace in follow(attack, problem, name)]


def bound(problem: Problem, steps: Tensor) -> Tensor:
    """What the theorem's argument bounds the average's gap by, for the sum normaliser, at every T of `steps` (S,).

        G ((D^2 / (2 alpha gamma) + alpha) / sqrt(T) + 2 D beta1 / ((1 - lambda) T))

    with D the largest L2 distance from the optimum in the ball and G >= ||grad f||_1. With u_t = g_t / ||g_t||_1
    and eta_t = alpha d_t / sqrt(t), which never increases and is at least alpha gamma / sqrt(t) (Lemma 3.1), the
    projected step gives <m_t, a_t - a*> <= (||a_t - a*||^2 - ||a_{t+1} - a*||^2) / (2 eta_t) + eta_t / 2. As
    m_t = u_t + beta_t (m_{t-1} - u_t), <u_t, a_t - a*> exceeds the left side by at most 2 D beta_t, and it is at
    least (f(a_t) - f*) / G: sum over t and divide by T.
    """
    reach = torch.linalg.vector_norm((problem.optimum - 0.5).abs() + EPS, dim=1)
    steepest = float(problem.weights @ problem.axes.abs().sum(1))
    distance, square = float(reach.mean()), float((reach**2).mean())
    rate = steps.double().reciprocal()
    root = rate.sqrt() * (square / (2 * ALPHA * GAMMA) + ALPHA)
    return (root + rate * (2 * distance * BETA1 / (1 - LAM))) * steepest


def picture(found: Sequence[Trace], path: Path) -> Path:
    """The gap against T, a panel per problem, with the line of 1 / sqrt(T) through clipped NGM's first fitted point."""
    names = list(dict.fromkeys(trace.problem for trace in found))
    figure = Figure(figsize=(5.0 * len(names) + 2.4, 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(names), squeeze=False, sharey=True)
    for axes, name in zip(grid[0], names, strict=True):
        for trace in (trace for trace in found if trace.problem == name):
            width = 3.0 if trace.name == "I-FGSM" else 1.7  # Another average may lie on top of it.
            style = {"linewidth": width} if trace.average else {"linewidth": 0.9, "linestyle": ":"}
            axes.plot(trace.steps, trace.gap, color=COLORS[trace.name], **style)
        theory = next(t for t in found if t.problem == name and t.name == "clipped NGM, sum" and t.average)
        late = theory.steps[theory.steps * 10**DECADES >= theory.steps[-1]]
        line = theory.gap[-len(late)] * (late[0] / late.double()).sqrt()
        axes.plot(late, line, color="black", linestyle="--", linewidth=1.0)
        axes.set(xscale="log", yscale="log", xlabel="number of iterates T")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("f − f*, mean of the instances")
    shown = [name for name in COLORS if any(trace.name == name for trace in found)]
    lines = [Line2D([], [], color=COLORS[name], label=name) for name in shown]
    lines += [
        Line2D([], [], color="black", linewidth=1.7, label="average of the iterates"),
        Line2D([], [], color="black", linewidth=0.9, linestyle=":", label="last iterate"),
        Line2D([], [], color="black", linewidth=1.0, linestyle="--", label="1/√T"),
    ]
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def table(found: Sequence[Trace]) -> str:
    """The traces as CSV: problem, method, iterate (last or average), T and gap."""
    rows = (
        (trace.problem, trace.name, "average" if trace.average else "last", step, gap)
        for trace in found
        for step, gap in zip(trace.steps.tolist(), trace.gap.tolist(), strict=True)
    )
    return csv_text(("problem", "method", "iterate", "T", "gap"), rows)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("runs/convergence"),
    steps: Annotated[int, typer.Option(min=100, help="Number of steps T.")] = 10_000,
    seed: int = 0,
) -> None:
    """Run all methods on both problems, write the picture and the table, and report the slopes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = []
    for problem in (separable(seed=seed), valley(seed=seed)):
        for trace in traces(problem, steps=steps):
            found.append(trace)
            words = trace.problem, trace.name, "average" if trace.average else "last"
            logger.info("%-9s  %-17s  %-7s  slope %5.2f  f - f* %.2g", *words, trace.slope(), float(trace.gap[-1]))
    write_text(out / "convergence.csv", table(found))
    logger.info("wrote %s and %s", picture(found, out / "convergence.png"), out / "convergence.csv")


def _weights() -> Tensor:
    return torch.logspace(0, -2, SIDE**2, dtype=torch.float64)


def _offsets(seed: int) -> Tensor:
    """Uniform in [-EPS, EPS], shape (INSTANCES, SIDE**2)."""
    draws = torch.rand(INSTANCES, SIDE**2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return EPS * (2 * draws - 1)


if __name__ == "__main__":
    typer.run(main)
