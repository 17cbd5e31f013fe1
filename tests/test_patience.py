"""Examples that make no progress are given up: as a slow transcription does, and only when asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import BOUNDED
from firstorder.attacks import BIM, MIFGSM, NIFGSM, PGD, VMIFGSM, BoundedAttack, Loss, Margin, Result
from firstorder.attacks.roster import Progress
from firstorder.training import TRADES
from test_prepared import MODES, OPEN, POINTS, SMOOTH, Approximated, N, Noted, aims, broken, never

EPS, ALPHA, STEPS, PATIENCE = 0.15, 0.1, 14, 3
"""Steps so large that the survivors go to and fro."""
PLAIN: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "random_start": False, "early_stop": True}


def slowly(x: Tensor, y: Tensor, free: Tensor, targeted: bool, loss: Loss | None) -> tuple[Tensor, int]:
    """PGD with patience on one example (1, d): where it ends, and after how many gradients."""
    a, best, stalled = x.clone(), float("inf"), 0
    for t in range(1, STEPS + 1):
        point = a.clone().requires_grad_(True)
        logits = SMOOTH(point)
        value = F.cross_entropy(logits, y) if loss is None else loss(logits, y).sum()
        (gradient,) = torch.autograd.grad(-value if targeted else value, point)
        scores = logits.detach()[0].tolist()
        own = scores.pop(int(y))
        distance = max(scores) - own if targeted else own - max(scores)
        if distance < 0:
            return a, t
        if distance < best - 1e-9:
            best, stalled = distance, 0
        else:
            stalled += 1
            if stalled == PATIENCE:
                return a, t
        a = (a + ALPHA * (gradient * free).sign()).clamp(x - EPS, x + EPS)
    return a, STEPS


def options(targeted: bool, index: slice = slice(None)) -> dict[str, Any]:
    return {"targeted": targeted, "mask": OPEN[index], "bounds": None}


@MODES
@pytest.mark.parametrize("loss", [None, Margin()], ids=["cross-entropy", "margin"])
def test_as_one_example_after_the_other(loss: Loss | None, targeted: bool) -> None:
    attack = PGD(**PLAIN, loss=loss, patience=PATIENCE)
    y = aims(targeted)
    result = attack.run(SMOOTH, POINTS, y, **options(targeted))
    for i in range(N):
        one = slice(i, i + 1)
        a, gradients = slowly(POINTS[one], y[one], OPEN[one], targeted, loss)
        assert torch.allclose(result.adversarial[one], a, rtol=0, atol=1e-9)
        assert int(result.gradients[i]) == gradients
    given_up = ~result.success & (result.gradients < STEPS)
    assert 2 < int(given_up.sum()) < N - 2
    assert torch.equal(result.success, broken(result.adversarial, targeted))


ATTACKS: dict[str, BoundedAttack] = {
    "pgd": PGD(**PLAIN),
    "pgd, random start": PGD(**{**PLAIN, "random_start": True}),
    "pgd, L2": PGD(**{**PLAIN, "norm": "L2", "eps": 0.3, "alpha": 0.3}),
    "mi-fgsm": MIFGSM(eps=EPS, alpha=ALPHA, steps=STEPS, early_stop=True),
    "vmi-fgsm": VMIFGSM(eps=EPS, alpha=ALPHA, steps=STEPS, N=2, early_stop=True),
}


@MODES
@pytest.mark.parametrize("name", ATTACKS)
def test_nobody_is_given_up_before_the_others_without_it(name: str, targeted: bool) -> None:
    """What is broken in time is broken alike; the path of an example does not depend on patience until it ends."""
    attack = ATTACKS[name]
    results = [
        dataclasses.replace(attack, patience=patience).run(SMOOTH, POINTS, aims(targeted), **options(targeted))
        for patience in (None, 1, 2, STEPS)
    ]
    full, least, more, never_up = results
    assert torch.equal(never_up.adversarial, full.adversarial)
    assert torch.equal(never_up.gradients, full.gradients)
    assert int(least.gradients.sum()) < int(more.gradients.sum()) < int(full.gradients.sum())
    for result in (least, more):
        assert not bool((result.success & ~full.success).any())
        assert (result.gradients <= full.gradients).all()
        kept = result.success
        assert torch.equal(result.adversarial[kept], full.adversarial[kept])
        assert torch.equal(result.gradients[kept], full.gradients[kept])
        assert torch.equal(result.success, broken(result.adversarial, targeted))


def test_singletons() -> None:
    attack = PGD(**PLAIN, patience=2)
    whole = attack.run(SMOOTH, POINTS, aims(False), **options(False))
    for i in range(N):
        one = slice(i, i + 1)
        alone = attack.run(SMOOTH, POINTS[one], aims(False)[one], **options(False, one))
        assert torch.allclose(alone.adversarial, whole.adversarial[one], rtol=0, atol=1e-12)
        assert torch.equal(alone.gradients, whole.gradients[one])


def test_restarts_begin_anew() -> None:
    """An example given up in one run is attacked again in the next, from the next of the same draws."""
    words = {**PLAIN, "random_start": True, "patience": 2}
    single, several = PGD(**words), PGD(**words, restarts=3)
    generator = torch.Generator().manual_seed(1)
    runs: list[Result] = [
        single.run(SMOOTH, POINTS, aims(False), generator=generator, **options(False)) for _ in range(3)
    ]
    merged = several.run(SMOOTH, POINTS, aims(False), generator=torch.Generator().manual_seed(1), **options(False))
    expected = torch.zeros(N, dtype=torch.long)
    robust = torch.ones(N, dtype=torch.bool)
    for run in runs:
        assert run.success is not None
        expected += run.gradients * robust
        robust &= ~run.success
    assert torch.equal(merged.success, ~robust)
    assert torch.equal(merged.gradients, expected)
    assert (runs[0].gradients[~runs[0].success] < STEPS).any()


def late(x: Tensor) -> Tensor:
    """A copy that takes odd examples for broken once they have moved."""
    moved = (x - POINTS[x[:, 0].round().long()]).abs().amax(1) > 0
    return 1e3 * (moved & (x[:, 0].round() % 2 == 1))


@MODES
def test_disputed_examples_are_not_measured_by_the_copy(targeted: bool) -> None:
    """The copy's verdicts on examples that it takes for broken are forgotten: the exact model goes on from there."""
    attack = PGD(**PLAIN, patience=4)
    y = aims(targeted)
    arbiter = Noted(SMOOTH)
    model = Approximated(Noted(SMOOTH, shift=late, targeted=targeted), arbiter)
    result = attack.run(model, POINTS, y, **options(targeted))
    alone = attack.run(SMOOTH, POINTS, y, **options(targeted))
    odd = torch.arange(N) % 2 == 1
    assert torch.equal(result.adversarial[~odd], alone.adversarial[~odd])
    assert torch.equal(result.gradients[~odd], alone.gradients[~odd])
    robust = odd & ~alone.success
    assert robust.any()
    # the second iterate is disputed, so that the count begins with the third: at least the four after that
    assert int(result.gradients[odd & ~result.success].min()) >= 3 + 4
    assert torch.equal(result.success, broken(result.adversarial, targeted))
    assert arbiter.asked


def test_a_copy_that_never_sees_success() -> None:
    """It gives examples up by its own losses, and the model itself has the last word."""
    model = Approximated(Noted(SMOOTH, shift=never), Noted(SMOOTH))
    result = PGD(**PLAIN, patience=2).run(model, POINTS, aims(False), **options(False))
    assert torch.equal(result.success, broken(result.adversarial, False))
    assert result.success.any()


def test_progress() -> None:
    best, stalled = torch.full((5,), 1.0), torch.tensor([0, 2, 3, 4, 5])
    distance, least = torch.tensor([1.5, 0.5, 1.0, 1.5, 0.9]), torch.tensor([0.0, 0.2, 0.0, 0.0, 0.2])
    after = Progress(best, stalled).after(distance, least, torch.tensor([False, False, False, True, False]))
    assert after.best.tolist() == [1.0, 0.5, 1.0, torch.inf, 1.0]
    assert after.stalled.tolist() == [1, 0, 4, 0, 6]


def test_a_cycle_is_no_progress_whatever_the_rounding() -> None:
    """A line along which the attack goes to and fro: logits that differ by rounding alone."""
    jitter = iter(range(1, 100))

    class Line(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = 5 - (x[:, 0] - 0.5).abs() - next(jitter) * 1e-7
            return torch.stack([score, torch.zeros_like(score)], 1)

    attack = BIM(eps=0.3, alpha=0.2, steps=50, early_stop=True, patience=4)
    result = attack.run(Line(), torch.tensor([[0.4]]), torch.tensor([0]), bounds=None)
    assert int(result.gradients) < 12
    assert not result.success.any()


def test_refused() -> None:
    with pytest.raises(ValueError, match="patience=3 gives examples up, as early_stop does; set early_stop=True"):
        PGD(patience=3)
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"patience={value} must be an integer of at least 1"):
            PGD(early_stop=True, patience=value)
    with pytest.raises(ValueError, match="never evaluates the model at the iterate"):
        NIFGSM(early_stop=True, patience=3)
    with pytest.raises(ValueError, match="set early_stop=False"):
        TRADES(attack=PGD(early_stop=True, patience=3))
    assert BIM().patience is None


@pytest.mark.parametrize("name", [case.name for case in BOUNDED])
def test_every_host_knows_the_word(name: str) -> None:
    import firstorder.art
    import firstorder.torchattacks
    from firstorder.attacks import get

    for host in (firstorder.art, firstorder.torchattacks):
        parameters = host.host_class(get(name)).__signature__.parameters
        assert parameters["patience"].default is None
        assert parameters["patience"].kind is parameters["patience"].KEYWORD_ONLY
