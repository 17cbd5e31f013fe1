"""What an attack achieves on a batch of data, and at what price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from firstorder.attacks import Attack, predicted


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """An attack on N examples.

    Attributes:
        adversarial: the perturbed examples, shape (N, ...).
        correct: whether each is still classified correctly, shape (N,).
        doubtful: which of these met NaN or infinite logits or gradients, shape (N,).
        linf, l2: size of each perturbation, shape (N,).
        gradients: gradients spent on each example, shape (N,).
    """

    adversarial: Tensor
    correct: Tensor
    doubtful: Tensor
    linf: Tensor
    l2: Tensor
    gradients: Tensor


def measure(
    attack: Attack, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int = 0, batch_size: int = 100
) -> Measurement:
    """Run `attack` on x (N, ...) with labels y (N,), untargeted, batch by batch, and measure it."""
    generator = torch.Generator(x.device).manual_seed(seed)
    results = [
        attack.run(model, *batch, generator=generator)
        for batch in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    adversarial = torch.cat([result.adversarial for result in results])
    broken = [result.success for result in results if result.success is not None]
    delta = (adversarial - x).flatten(1)
    return Measurement(
        adversarial=adversarial,
        correct=~torch.cat(broken),
        doubtful=torch.cat([result.doubtful for result in results if result.doubtful is not None]),
        linf=delta.abs().amax(1),
        l2=delta.norm(dim=1),
        gradients=torch.cat([result.gradients for result in results]),
    )


def predictions(model: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 100) -> Tensor:
    """Predicted classes (N,) of x (N, ...), `UNDECIDED` where the logits are NaN or infinite."""
    with torch.no_grad():
        return torch.cat([predicted(model(part)) for part in x.split(batch_size)])
