"""Classifiers of MNIST images whose robust accuracy would mislead, each in one way, and honest ones to make them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

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


# Those below were written when every threshold was fixed.


def steep(x: Tensor) -> Tensor:
    """Contrast so high that most pixels are black or white, with no gradient."""
    return (20 * (x - 0.5)).clamp(0, 1)


def rippled(x: Tensor) -> Tensor:
    """Waves shorter than any step."""
    return x + 0.05 * torch.sin(2000 * x)


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity, with a hook on its gradient."""

    def before(x: Tensor) -> Tensor:
        same = x * 1
        if same.requires_grad:
            same.register_hook(hook)
        return same

    return before


def one_channel(x: Tensor) -> Tensor:
    """The first channel in coarse 8 x 8 cosines, as JPEG keeps it, without a gradient."""
    k = torch.arange(8, device=x.device, dtype=x.dtype)
    cosines = torch.cos(torch.pi * (2 * k + 1) * k[:, None] / 16) / 2
    cosines[0] /= 2**0.5
    blocks = x[:, :1].unfold(2, 8, 8).unfold(3, 8, 8)
    kept = cosines.T @ ((cosines @ blocks @ cosines.T * 8).round() / 8) @ cosines
    return torch.cat([kept.permute(0, 1, 2, 4, 3, 5).reshape(x[:, :1].shape).clamp(0, 1), x[:, 1:]], 1)


class OneOfTwo(nn.Module):
    """At every forward one of two networks, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([packaged.mnist_cnn(), packaged.mnist_cnn_natural()])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.networks[int(torch.rand(()) < 0.5)](x)
        return logits


def adapting() -> nn.Module:
    """BatchNorm in training mode in an otherwise evaluated model."""
    model = Around(nn.Sequential(nn.BatchNorm2d(1, affine=False), packaged.mnist_cnn()))
    model.network[0].train()  # type: ignore[index]
    return model


def training() -> nn.Module:
    """As it is made, in training mode; for the command line."""
    return packaged.mnist_cnn().train()


def soft() -> nn.Module:
    """Probabilities in the place of logits."""
    return robust(after=lambda z: z.softmax(1))


def resized(x: Tensor) -> Tensor:
    """Scaled down to a random side, and back."""
    side = int(torch.randint(24, 29, ()))
    return interpolate(interpolate(x, (side, side)), x.shape[2:])
