"""The best iterate, its margin and its logits, and the passes of a run: as a slow transcription finds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from firstorder.attacks import (
    Constant,
    Cosine,
    Draw,
    LinfBall,
    Logit,
    LogitDirection,
    Loss,
    Margin,
    Outcome,
    Parts,
    ProbabilityMargin,
    Problem,
    Sign,
    TargetedMargin,
    ascend,
)
from firstorder.attacks.models import Model, TorchModel
from test_prepared import OPEN, POINTS, SMOOTH, Approximated, N, Noted, aims, never

EPS, ALPHA, STEPS = 0.15, 0.06, 5
"""The last of the iterates is the nearest to success for some examples, not for all."""


def climb(
    model: Model, *, drop: bool = False, targeted: bool = False, index: Tensor | None = None, **more: Any
) -> Outcome:
    index = torch.arange(N) if index is None else index
    x = POINTS[index]
    problem = Problem(
        model=model,
        region=LinfBall.around(x, EPS, torch.tensor(-torch.inf), torch.tensor(torch.inf)),
        labels=aims(targeted)[index],
        targeted=targeted,
        mask=OPEN[index],
        **more,
    )
    parts = Parts(direction=Sign(), schedule=Constant(size=ALPHA))
    draw = Draw(torch.Generator(), len(x))
    return ascend(problem, parts, x.clone(), STEPS, draw=draw, drop=drop, best=True)


def path(i: int, loss: Loss, row: Tensor, targeted: bool) -> list[tuple[float, Tensor, Tensor]]:
    """Distance, iterate and logits of all T + 1 iterates of one example."""
    x, free = POINTS[i : i + 1], OPEN[i : i + 1]
    label, a, found = int(aims(targeted)[i]), POINTS[i : i + 1].clone(), []
    for _ in range(STEPS + 1):
        point = a.clone().requires_grad_(True)
        logits = SMOOTH(point)
        (gradient,) = torch.autograd.grad(loss(logits, row[None]).sum() * (-1 if targeted else 1), point)
        scores = logits.detach()[0]
        others = torch.cat([scores[:label], scores[label + 1 :]]).max()
        found.append((float(others - scores[label]) * (1 if targeted else -1), a, scores))
        a = (a + ALPHA * (gradient * free).sign()).clamp(x - EPS, x + EPS)
    return found


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_as_one_example_after_the_other(drop: bool, targeted: bool) -> None:
    outcome = climb(TorchModel(SMOOTH), drop=drop, targeted=targeted, loss=Margin())
    assert outcome.best is not None
    late = 0
    for i in range(N):
        whole = path(i, Margin(), aims(targeted)[i], targeted)
        first = next((t for t, (distance, _, _) in enumerate(whole) if distance < 0), None)
        ended = STEPS if first is None or not drop else first
        seen = whole[: ended + 1]
        distance, a, logits = min(seen, key=lambda each: each[0])
        late += a is seen[-1][1]
        assert torch.allclose(outcome.best.a[i], a[0], rtol=0, atol=1e-9)
        assert float(outcome.best.distance[i]) == pytest.approx(distance, abs=1e-9)
        assert torch.allclose(outcome.best.logits[i], logits, rtol=0, atol=1e-9)
        assert torch.allclose(outcome.a[i], seen[-1][1][0], rtol=0, atol=1e-9)
        assert int(outcome.gradients[i]) == (min(ended + 1, STEPS) if drop else STEPS)
        assert int(outcome.forwards[i]) == (ended + 1 if drop else STEPS + 1)
        if drop:
            assert bool(outcome.broken[i]) == (first is not None)
    assert 0 < late < N, "the last iterate must not always be the best"


@pytest.mark.parametrize("drop", [False, True])
def test_forwards_are_those_of_the_model(drop: bool) -> None:
    noted = Noted(SMOOTH)
    outcome = climb(noted, drop=drop)
    asked, looked = (
        torch.tensor([i for each in of for i in each]).bincount(minlength=N) for of in (noted.asked, noted.viewed)
    )
    assert torch.equal(outcome.gradients, asked)
    assert torch.equal(outcome.forwards, asked + looked)
    assert looked.max() == 1


def late(x: Tensor) -> Tensor:
    """A copy that takes odd examples for broken once they have moved."""
    moved = (x - POINTS[x[:, 0].round().long()]).abs().amax(1) > 0
    return 1e3 * (moved & (x[:, 0].round() % 2 == 1))


@pytest.mark.parametrize("shift", [None, late, never], ids=["exact", "too early", "never"])
def test_what_a_copy_claims_is_no_best_iterate(shift: Any) -> None:
    arbiter = Noted(SMOOTH)
    copied = Noted(SMOOTH, shift=shift)
    outcome, exact = climb(Approximated(copied, arbiter), drop=True), climb(TorchModel(SMOOTH), drop=True)
    assert outcome.best is not None
    assert exact.best is not None
    passes = torch.tensor([i for each in copied.asked + arbiter.asked + arbiter.viewed for i in each]).bincount(
        minlength=N
    )
    assert torch.equal(outcome.forwards, passes)
    assert torch.equal(outcome.broken, outcome.best.distance < 0)
    with torch.no_grad():
        logits = SMOOTH(outcome.best.a)
    if shift is not never:
        assert torch.equal(outcome.broken, exact.broken)
        assert torch.equal(outcome.broken, logits.argmax(1) != aims(False))
    assert outcome.broken.any()


def test_nothing_is_kept_unless_asked_for() -> None:
    problem = Problem(
        model=(noted := Noted(SMOOTH)),
        region=LinfBall.around(POINTS, EPS, torch.tensor(-torch.inf), torch.tensor(torch.inf)),
        labels=aims(False),
    )
    parts = Parts(direction=Sign(), schedule=Constant(size=ALPHA))
    outcome = ascend(problem, parts, POINTS.clone(), 3, draw=Draw(torch.Generator(), N))
    assert outcome.best is None
    assert not noted.viewed
    assert outcome.forwards.tolist() == outcome.gradients.tolist() == [3] * N


def test_numbers_that_are_none_are_no_best() -> None:
    """NaN from the second forward on: the input stays the best iterate."""
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return SMOOTH(x) + (torch.nan if len(calls) > 1 else 0.0)

    outcome = climb(TorchModel(forward))
    assert outcome.best is not None
    assert torch.equal(outcome.best.a, POINTS)
    assert outcome.best.distance.isfinite().all()
    assert not outcome.broken.any()


def test_towards_another_class_anything_wrong_is_success() -> None:
    """One target class per example, away from the label; the class that breaks it may be a third."""
    with torch.no_grad():
        ranked = SMOOTH(POINTS).argsort(1, descending=True)
    rows = torch.where((torch.arange(N) % 2 == 0)[:, None], ranked[:, [0, 1]], ranked[:, [0, 2]])
    loss = TargetedMargin()
    outcome = climb(TorchModel(SMOOTH), drop=True, loss=loss, rows=rows)
    assert outcome.best is not None
    for i in range(N):
        whole = path(i, loss, rows[i], False)
        first = next((t for t, (distance, _, _) in enumerate(whole) if distance < 0), STEPS)
        assert torch.allclose(outcome.a[i], whole[first][1][0], rtol=0, atol=1e-9)
    classes = outcome.best.logits.argmax(1)
    assert (outcome.broken & (classes == rows[:, 1])).any()
    assert (outcome.broken & (classes != rows[:, 1])).any()
    half = torch.arange(0, N, 2)
    part = climb(TorchModel(SMOOTH), drop=True, loss=loss, rows=rows[half], index=half)
    assert torch.allclose(part.a, outcome.a[half], rtol=0, atol=1e-9)


def test_losses() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [0.5, 0.0, 2.0]])
    y, target = torch.tensor([1, 0]), torch.tensor([2, 1])
    pairs = torch.stack([y, target], 1)
    assert TargetedMargin()(logits, pairs).tolist() == [-5.0, -0.5]
    weights = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]], dtype=torch.float64)
    assert LogitDirection()(logits, weights).tolist() == [-3.0, 2.0]
    for i, values in enumerate(logits.tolist()):
        exp = [math.exp(v) for v in values]
        p = [e / sum(exp) for e in exp]
        expected = max(v for k, v in enumerate(p) if k != int(y[i])) - p[int(y[i])]
        assert float(ProbabilityMargin()(logits, y)[i]) == pytest.approx(expected, abs=1e-6)
    assert Logit()(logits, y).tolist() == [-3.0, -0.5]
    for loss in (TargetedMargin(), ProbabilityMargin(), Logit()):
        assert not loss.soft


def test_cosine_takes_a_size_per_example() -> None:
    size = torch.tensor([1.0, 2.0])
    found = Cosine(size=size)(2, 4)
    assert torch.allclose(found, size * (1 + math.cos(math.pi / 4)) / 2)
    assert Cosine(size=2.0)(1, 4) == 2.0
