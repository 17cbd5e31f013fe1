"""A start given by the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import BOUNDED, Case, Net, images, predicted
from firstorder.attacks import ANU, PGD, Attack, Verdict

STARTING = [case for case in BOUNDED if case.cls.starts and "alpha" in case.fields]


@pytest.mark.parametrize("case", STARTING, ids=lambda case: case.name)
def test_no_step_leaves_the_start(case: Case, model: Net) -> None:
    """With steps of no length the result is the start, on the ball, in the bounds, and where the mask is one."""
    x = images()
    start = x + 0.3 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    mask = torch.ones(3, 6, 5)
    mask[:, 2] = 0
    found = case.build(eps=0.06, alpha=1e-30)(model, x, predicted(model, x), start=start, mask=mask)
    expected = torch.where(mask.bool(), start, x).clamp(x - 0.06, x + 0.06).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("early_stop", [False, True])
def test_going_on_is_one_run(early_stop: bool, model: Net) -> None:
    x = images(20)
    y = predicted(model, x)
    whole = PGD(eps=0.04, alpha=0.005, steps=7, random_start=False, early_stop=early_stop)
    first = PGD(eps=0.04, alpha=0.005, steps=4, random_start=True, early_stop=early_stop)
    half = first(model, x, y, start=x)
    kept = half.clone()
    found = PGD(eps=0.04, alpha=0.005, steps=3, early_stop=early_stop)(model, x, y, start=half)
    torch.testing.assert_close(found, whole(model, x, y), rtol=0, atol=1e-6)
    assert torch.equal(half, kept), "the start is the caller's"


def test_refused(model: Net) -> None:
    x, y = images(), torch.arange(6)
    with pytest.raises(ValueError, match=r"start has shape \(5, 3, 6, 5\); pass a tensor of the images' shape"):
        PGD()(model, x, y, start=x[:5])
    with pytest.raises(ValueError, match="start is a list"):
        PGD()(model, x, y, start=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start contains NaN"):
        PGD()(model, x, y, start=x * torch.nan)
    with pytest.raises(ValueError, match="restarts=2 would all begin at the given start; set restarts=1"):
        PGD(restarts=2)(model, x, y, start=x)
    attacks: list[Attack[Any]] = [ANU(), Verdict()]
    for attack in attacks:
        with pytest.raises(ValueError, match="does not begin at a given start; leave start=None"):
            attack(model, x, y, start=x)
