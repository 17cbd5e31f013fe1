"""What an identity says of a value: all of it, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from firstorder.attacks import PGD, Clipped, Margin
from firstorder.autoattack.record import fingerprint
from firstorder.hosts.description import description
from firstorder.training import AWP, TRADES


@dataclass
class Noted:
    """What a field with repr=False holds is no part of what the value is."""

    size: int = 1
    calls: list[int] = field(default_factory=lambda: [1, 2], repr=False)


@pytest.mark.parametrize(
    "value",
    [
        Noted(),
        PGD(eps=0.1, direction=Clipped(), loss=Margin()),
        AWP(base=TRADES(attack=PGD())),
        {"a": [1, (2.5, "x"), (3,), ()], "b": None},
        Path("x"),
    ],
    ids=str,
)
def test_without_tensors_it_is_the_values_own(value: object) -> None:
    assert description(value) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_element_of_a_tensor_counts(dtype: torch.dtype) -> None:
    """Printed, a tensor of over 1000 elements is cut short, and numbers have four decimals."""
    one = torch.full((3, 32, 32), 0.03, dtype=dtype)
    two = one.clone()
    two[1, 16, 16] *= 1.01
    assert repr(PGD(eps=one)) == repr(PGD(eps=two))
    for wrapped in (PGD, lambda eps: TRADES(attack=PGD(eps=eps)), lambda eps: {"pgd": {"alpha": eps}}):
        assert description(wrapped(eps=one)) != description(wrapped(eps=two))
        assert description(wrapped(eps=one)) == description(wrapped(eps=one.clone()))
    assert description(one) != description(one.reshape(3, 1024))
    assert fingerprint([], {"alpha": one}) != fingerprint([], {"alpha": two})


def test_addresses_in_memory_do_not_count() -> None:
    assert "0x" not in description(PGD(loss=lambda z, y: z.sum(1)))
