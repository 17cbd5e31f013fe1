"""The theory of clipped NGM on problems of known optimum: rates, the bound, and what breaks them."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner

from firstorder.attacks import EMA, Clipped, ClippedNGM, Constant, InverseSqrt, LinfBall
from firstorder.evaluation.studies.convergence import (
    ALPHA,
    COLORS,
    EPS,
    GAMMA,
    Problem,
    Trace,
    bound,
    contenders,
    follow,
    main,
    separable,
    traces,
    valley,
)

STEPS = 1500
SIGNS = ("I-FGSM", "MI-FGSM")
CLIPPED = ("clipped NGM, sum", "clipped NGM, mean")
Found = dict[tuple[str, bool], Trace]


@pytest.fixture(scope="module", params=[separable, valley])
def found(request: pytest.FixtureRequest) -> tuple[Problem, Found]:
    problem: Problem = request.param()
    return problem, {(trace.name, trace.average): trace for trace in traces(problem, steps=STEPS)}


@pytest.fixture(scope="module")
def longer() -> Found:
    """I-FGSM and the theory's clipped NGM on the problem that is easiest for I-FGSM."""
    problem = separable()
    chosen = {name: contenders(problem, 3 * STEPS)[name] for name in ("I-FGSM", "clipped NGM, sum")}
    return {(t.name, t.average): t for name, attack in chosen.items() for t in follow(attack, problem, name)}


def path(name: str, problem: Problem, steps: int) -> Tensor:
    """The iterates of a contender, (steps, N, d)."""
    iterates = []

    def hook(t: int, gradient: Tensor, iterate: Tensor) -> None:
        iterates.append(iterate.flatten(1).clone())

    x = problem.start()
    contenders(problem, steps)[name](problem, x, torch.arange(len(x)), hook=hook)
    return torch.stack(iterates)


@pytest.mark.parametrize("make", [separable, valley])
def test_the_optimum(make: Callable[[], Problem]) -> None:
    problem = make()
    torch.testing.assert_close(problem.axes @ problem.axes.T, torch.eye(64, dtype=torch.float64))
    assert ((problem.optimum - 0.5).abs() <= EPS + 1e-15).all()
    assert (problem.gap(problem.optimum) == 0).all()
    # f is convex: a point is the minimum over a box if no step within the box goes down.
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0):
        for _ in range(200):
            step = size * EPS * torch.randn(problem.optimum.shape, generator=generator, dtype=torch.float64)
            assert (problem.gap((problem.optimum + step).clamp(0.5 - EPS, 0.5 + EPS)) > 0).all()


def test_rates(found: tuple[Problem, Found]) -> None:
    problem, of = found
    for name in CLIPPED:
        assert of[name, True].slope() < -0.5
        for sign in SIGNS:
            assert of[sign, False].gap[-1] > 2 * of[name, True].gap[-1]
    for sign in SIGNS:
        assert abs(of[sign, False].slope()) < 0.1
    # Decreasing steps are what signs lack on the one problem, not on the other.
    slope = of["I-FGSM, α/√t", False].slope(1.0)
    assert slope < -0.5 if problem.name == "separable" else slope > -0.1


def test_the_gap_between_them_widens(longer: Found) -> None:
    sign, clipped = longer["I-FGSM", False], longer["clipped NGM, sum", True]
    assert abs(sign.slope()) < 0.05
    assert clipped.slope() < -0.6
    assert sign.gap[-1] > 5 * clipped.gap[-1]


def test_the_bound(found: tuple[Problem, Found]) -> None:
    problem, of = found
    trace = of["clipped NGM, sum", True]
    assert (trace.gap <= bound(problem, trace.steps)).all()
    ends = bound(problem, torch.tensor([10**8, 10**10]))
    assert float(ends[1] / ends[0]) == pytest.approx(0.1, rel=0.05)


def test_where_signs_stall(longer: Found) -> None:
    """The cycle of I-FGSM around every c_k inside the ball in closed form."""
    problem, alpha = separable(), EPS / 10
    inside = (problem.centers - 0.5).abs() < EPS
    beyond = (problem.centers - 0.5).remainder(alpha)
    sides = torch.stack([beyond, alpha - beyond])
    low, high, middle = (
        float((problem.weights * inside * value).sum(1).mean())
        for value in (sides.amin(0), sides.amax(0), (alpha / 2 - beyond).abs())
    )
    last, average = longer["I-FGSM", False], longer["I-FGSM", True]
    assert low < float(last.gap[last.steps > 20].min()) <= float(last.gap[last.steps > 20].max()) < high
    assert float(average.gap[-1]) == pytest.approx(middle, rel=0.05)


def violations() -> set[str]:
    """Which of the theory's statements clipped NGM breaks on the separable problem."""
    problem, broken = separable(), set()
    trace = follow(contenders(problem, 1000)["clipped NGM, sum"], problem, "")[1]
    if not (trace.slope(1.0) < -0.4 and bool((trace.gap <= bound(problem, trace.steps)).all())):
        broken.add("rate")
    roots = torch.arange(1, 100).double().sqrt()[:, None]
    unit = float(torch.linalg.vector_norm(problem.weights) / problem.weights.sum())
    for name, longest in (("clipped NGM, sum", unit), ("clipped NGM, mean", GAMMA)):
        a = path(name, problem, 100)
        if bool(((a - 0.5).abs() > EPS + 1e-12).any()):
            broken.add("ball")
        lengths = torch.linalg.vector_norm(a.diff(dim=0), dim=2) * roots / ALPHA
        if bool((lengths > longest * (1 + 1e-9)).any()):  # Lemma 3.1: d_t <= 1 and ||d_t m_t|| <= gamma
            broken.add("clip")
        small = dataclasses.replace(problem, weights=problem.weights / 1000)
        if not torch.allclose(a, path(name, small, 100), rtol=0, atol=1e-9):  # ||g|| is divided out
            broken.add("scale")
    return broken


def test_the_theory_holds() -> None:
    assert violations() == set()


def clip_without_cap(self: Clipped, m: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return m * self.gamma / torch.linalg.vector_norm(m.flatten(1), dim=1).reshape(state.shape), state


@pytest.mark.parametrize(
    ("part", "method", "mutant", "broken"),
    [
        (InverseSqrt, "__call__", lambda self, t, steps: Constant(size=self.size)(t, steps), "rate"),
        (InverseSqrt, "__call__", lambda self, t, steps: self.size / t, "rate"),
        (EMA, "__call__", lambda self, m, g, t: m.mul_(0.9).add_(g, alpha=0.1), "scale"),
        (EMA, "__call__", lambda self, m, g, t: m.sub_(g / g.abs().flatten(1).sum(1)[:, None, None, None]), "rate"),
        (Clipped, "__call__", lambda self, m, state, out: (m, state), "clip"),
        (Clipped, "__call__", clip_without_cap, "clip"),
        (LinfBall, "project_", lambda self, a: a, "ball"),
    ],
    ids=["constant step", "1/t", "no normaliser", "descent", "no clip", "lengthening clip", "no projection"],
)
def test_what_the_theory_needs(
    part: type, method: str, mutant: object, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, method, mutant)
    assert broken in violations()


def test_slopes() -> None:
    steps = torch.tensor([1, 10, 100, 1000, 10_000])
    gap = torch.where(steps < 100, 1.0, 3 * steps.double() ** -0.5)
    trace = Trace(problem="p", name="n", average=True, steps=steps, gap=gap)
    assert trace.slope(2.0) == pytest.approx(-0.5)
    assert trace.slope(4.0) > -0.5
    with pytest.raises(ValueError, match=r"decades=0\.5 leaves one point"):
        trace.slope(0.5)


def test_a_run_does_not_depend_on_its_length() -> None:
    problem = valley(seed=3)
    for name, attack in contenders(problem, 40).items():
        assert isinstance(attack, ClippedNGM) == name.startswith("clipped")
        assert torch.equal(path(name, problem, 40)[:25], path(name, problem, 25))


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--out", str(tmp_path), "--steps", "110"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "convergence.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = [(p, name, i) for p in ("separable", "valley") for name in COLORS for i in ("last", "average")]
    assert list(dict.fromkeys((row["problem"], row["method"], row["iterate"]) for row in rows)) == keys
    assert {row["T"] for row in rows} >= {"1", "100", "110"}
    starts = [float(row["gap"]) for row in rows if row["problem"] == "valley" and row["T"] == "1"]
    problem = valley()
    assert starts == pytest.approx([float(problem.gap(problem.start()).mean())] * len(starts), rel=1e-5)
    assert caplog.text.count("slope") == len(keys)
