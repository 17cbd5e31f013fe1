"""What models make of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firstorder.attacks import UNDECIDED, CrossEntropy, predicted


def classes(network: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The predicted labels (N,), `UNDECIDED` where logits are no numbers, and the cross-entropy (N,) in float64."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(size)])
    return predicted(logits), CrossEntropy()(logits.double(), y)


def clean(name: str, network: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The predicted labels (N,) of examples as they are.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    labels, _ = classes(network, x, y, size)
    undecided = int((labels == UNDECIDED).sum())
    if undecided:
        raise ValueError(
            f"the logits of {name} are NaN or infinite for {undecided} of {len(x)} clean examples; check its weights"
        )
    return labels


def exhausted(error: Exception) -> bool:
    """Whether memory ran out, on the processor or on a GPU."""
    told = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in told
        or "can't allocate memory" in told
    )
