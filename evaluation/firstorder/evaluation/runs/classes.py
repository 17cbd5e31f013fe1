"""What models make of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import UNDECIDED, CrossEntropy, predicted


class Seen(NamedTuple):
    """What a network makes of N examples.

    Attributes:
        labels: the predicted classes (N,), `UNDECIDED` where logits are no numbers.
        confidence: their softmax probabilities (N,) in [0, 1]; NaN where logits are no numbers.
        margin: the logit of the true class minus the largest other one (N,); NaN likewise.
        loss: the cross-entropy (N,).
    """

    labels: Tensor
    confidence: Tensor
    margin: Tensor
    loss: Tensor


def classes(network: nn.Module, x: Tensor, y: Tensor, size: int) -> Seen:
    """What a network makes of examples x (N, ...) with labels y (N,), in batches of `size`; numbers in float64."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(size)])
    labels, logits = predicted(logits), logits.double()
    true = logits.gather(1, y[:, None])
    margin = (true - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]
    confidence = logits.softmax(1).amax(1)
    known = labels != UNDECIDED
    nan = torch.full_like(confidence, torch.nan)
    return Seen(labels, torch.where(known, confidence, nan), torch.where(known, margin, nan), CrossEntropy()(logits, y))


def clean(name: str, network: nn.Module, x: Tensor, y: Tensor, size: int) -> Seen:
    """What a network makes of examples as they are.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    seen = classes(network, x, y, size)
    undecided = int((seen.labels == UNDECIDED).sum())
    if undecided:
        raise ValueError(
            f"the logits of {name} are NaN or infinite for {undecided} of {len(x)} clean examples; check its weights"
        )
    return seen


def exhausted(error: Exception) -> bool:
    """Whether memory ran out, on the processor or on a GPU."""
    message = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in message
        or "can't allocate memory" in message
    )
