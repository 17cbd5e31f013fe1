"""Classifiers of MNIST images whose robust accuracy would mislead, each in one way, and honest ones to make them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.evaluation.names import packaged


class Around(nn.Module):
    """A network with something before it and after it, in evaluation mode."""

    def __init__(
        self,
        network: nn.Module,
        *,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class _Passed(torch.autograd.Function):
    """Rounding to k levels, with the identity's gradient times a factor."""

    @staticmethod
    def forward(context: Any, x: Tensor, k: int, factor: float) -> Tensor:  # type: ignore[override]
        context.factor = factor
        return (x * k).round() / k

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return context.factor * gradient, None, None


def passed(k: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: _Passed.apply(x, k, factor)  # type: ignore[no-any-return,no-untyped-call]


def robust(**around: Callable[[Tensor], Tensor]) -> nn.Module:
    return Around(packaged.mnist_cnn(), **around)


def natural(**around: Callable[[Tensor], Tensor]) -> nn.Module:
    return Around(packaged.mnist_cnn_natural(), **around)


def dropping() -> nn.Module:
    """Dropout in training mode, the rest in evaluation mode."""
    model = Around(nn.Sequential(nn.Dropout(0.3), packaged.mnist_cnn()))
    model.network[0].train()  # type: ignore[index]
    return model


def stubborn() -> nn.Module:
    """Dropout that evaluation mode does not switch off."""

    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Stubborn:
            super().train(True)
            return self

    return Around(nn.Sequential(Stubborn(0.3), packaged.mnist_cnn()))


def stored_only(x: Tensor) -> Tensor:
    """NaN for images that are not of 8 bits."""
    off = ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(1)
    return torch.where(off.reshape(-1, 1, 1, 1), torch.nan, x)


def mixing() -> nn.Module:
    """BatchNorm without statistics of its own: examples influence each other in evaluation mode, too."""
    return Around(packaged.mnist_cnn(), after=nn.BatchNorm1d(10, track_running_stats=False, affine=False))


def noisy(sigma: float) -> nn.Module:
    return robust(before=lambda x: x + sigma * torch.randn_like(x))


def wants_bytes() -> nn.Module:
    """For images in 0..255."""
    return robust(before=lambda x: x / 255)


def training() -> nn.Module:
    """As it is made, in training mode; for the command line."""
    return packaged.mnist_cnn().train()
