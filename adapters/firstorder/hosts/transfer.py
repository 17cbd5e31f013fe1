"""Batches on their way to a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; the host does not wait for a GPU to be ready for it.

    From ordinary memory a copy begins when the GPU has done all that it was given before, and the host waits so long.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def ahead(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches on the device, in order; each is loaded and on its way before the one before it is handed out."""
    coming: tuple[Tensor, ...] | None = None
    for batch in batches:
        here, coming = coming, tuple(sent(part, device) for part in batch)
        if here is not None:
            yield here
    if coming is not None:
        yield coming
