"""What a model is asked while an attack runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks.outputs import logits_of


class Counts:
    """What a model is asked while x (N, ...) are attacked: forwards and gradients, and on which examples it said NaN.

    AutoAttack's attacks take the class of NaN logits for 0 without a word, so that an example of class 0 counts as
    robust.
    """

    def __init__(self, x: Tensor) -> None:
        self.forwards, self.gradients = 0, 0
        self.doubtful = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._x, self._before = x.flatten(1).float(), x.flatten(1).float()

    def look(self, points: Tensor, logits: Tensor) -> None:
        """Look at the logits (M, K) of points (M, ...): each is of the example that is nearest to it, or to where it
        was before it became NaN itself.
        """
        flat, undecided = points.flatten(1).float(), ~logits.isfinite().all(1)
        if bool(undecided.any()):
            if flat.shape == self._before.shape:
                flat = torch.where(flat.isfinite().all(1, keepdim=True), flat, self._before)
            found = flat[undecided & flat.isfinite().all(1)]
            self.doubtful[torch.cdist(found, self._x).argmin(1)] = True
        self._before = flat


@contextmanager
def counting(module: nn.Module | None, x: Tensor, *, look: bool) -> Iterator[Counts]:
    """What a module is asked in an attack on x (N, ...), by hooks that are gone afterwards; nothing of a function.

    Args:
        look: also at the logits; for attacks that hand the model points like x and do not look themselves.
    """
    counts = Counts(x)
    if module is None:
        yield counts
        return

    def backward(gradient: Tensor) -> None:
        counts.gradients += len(gradient)

    def forward(module: nn.Module, inputs: Any, output: Any) -> None:
        logits = logits_of(output)
        counts.forwards += len(logits)
        if look:
            counts.look(inputs[0].detach(), logits.detach())
        if logits.requires_grad:
            logits.register_hook(backward)

    handle = module.register_forward_hook(forward)
    try:
        yield counts
    finally:
        handle.remove()
