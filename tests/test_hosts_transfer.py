"""Batches on their way to a device: in order, the next one sent before the last is handed out, without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from firstorder.hosts import ahead, sent
from pretended import DEVICE, Pretended

CPU = torch.device("cpu")


def numbered(count: int, loaded: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(count):
        loaded.append(number)
        yield torch.full((2, 3), float(number)), torch.tensor([number] * 2)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_batch_in_order_and_the_next_one_under_way(count: int) -> None:
    loaded: list[int] = []
    for number, (x, y) in enumerate(ahead(numbered(count, loaded), CPU)):
        assert torch.equal(x, torch.full((2, 3), float(number)))
        assert y.tolist() == [number] * 2
        assert loaded == list(range(min(number + 2, count))), "one batch ahead, and no more"
    assert len(loaded) == count


def test_on_the_device() -> None:
    with Pretended() as device:
        calls = [tensor.device for batch in ahead(numbered(3, []), device) for tensor in batch]
    assert calls == [DEVICE] * 6


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of tensors, instead of being done."""
    made: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: made.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, device, **options: made.append((device.type, options)) or self)
    return made


def test_a_gpu_is_not_waited_for(copies: list[Any]) -> None:
    sent(torch.zeros(2), torch.device("cuda"))
    assert copies == ["pinned", ("cuda", {"non_blocking": True})]


def test_what_has_no_use_for_it_is_not_pinned(copies: list[Any]) -> None:
    sent(torch.zeros(2), CPU)
    sent(torch.zeros(2, device="meta"), torch.device("cuda"))
    assert copies == [("cpu", {}), ("cuda", {})]
