"""Attacks are values: equal where their parameters are, tensors among them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from cases import CASES, Case
from firstorder.attacks import BIM, DLR, PGD, Attack, Quantised


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_parameters_make_equal_attacks(case: Case) -> None:
    one, other = case.build(), case.build()
    assert one == other
    assert hash(one) == hash(other)
    assert one != case.build(loss=DLR())
    assert one == replace(one)


def test_tensors_are_compared_by_value() -> None:
    one, other = (PGD(eps=torch.tensor([[0.1], [0.2]]), alpha=0.1) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert {one: 1}[other] == 1
    assert one in [BIM(), other]
    for eps in (torch.tensor([[0.1], [0.3]]), torch.tensor([0.1, 0.2]), torch.tensor([[0.1], [0.2]]).double(), 0.1):
        assert one != PGD(eps=eps, alpha=0.1)
        assert PGD(eps=eps, alpha=0.1) != one
    assert one != PGD(eps=one.eps, alpha=torch.tensor(0.1))


def test_other_classes_are_other_attacks() -> None:
    assert PGD(random_start=False, alpha=0.1) != BIM(alpha=0.1)
    assert PGD() != "pgd"
    assert PGD(direction=Quantised(levels=5)) == PGD(direction=Quantised(levels=5))
    assert PGD(direction=Quantised(levels=5)) != PGD(direction=Quantised(levels=6))


def test_an_attack_of_a_stranger() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(PGD):
        scale: torch.Tensor = field(default_factory=lambda: torch.ones(2))
        note: str = field(default="", compare=False)

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Same(PGD):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 7

    assert Mine(note="a") == Mine(note="b")
    assert hash(Mine(note="a")) == hash(Mine())
    assert Mine(scale=torch.zeros(2)) != Mine()
    assert Same() == Mine()
    assert hash(Same()) == 7
    assert isinstance(Mine(), Attack)


def test_what_cannot_be_hashed_says_so() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Listed(PGD):
        values: list[int] = field(default_factory=list)

    assert Listed() == Listed()
    with pytest.raises(TypeError, match="unhashable"):
        hash(Listed())
