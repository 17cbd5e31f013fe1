"""Classifiers of images (N, 1, 4, 4) for `module:function` in the tests of `firstorder evaluate` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 9
"""How many examples a greedy model takes at a time within the memory that its test leaves it; a plan looks at eight."""
BYTES = 2**26


class Greedy(nn.Module):
    """Logits w x, for which every example takes 64 MiB of the device's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        taken = torch.empty(len(x), BYTES, dtype=torch.uint8, device=x.device)
        logits: Tensor = x.flatten(1) @ self.weight + 0 * taken[:, :1].sum()
        return logits


def greedy() -> nn.Module:
    return Greedy().eval()
