"""Gradient methods that treat all examples alike: what ENGM is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firstorder.training.backward import check
from firstorder.training.method import (
    GradientMethod,
    Inputs,
    Scaler,
    Weighting,
    accumulate,
    averaged,
    factor,
    limit,
    plain,
)


class MSGD(GradientMethod):
    """w_i = 1: the mean gradient."""

    paper = "Madry et al. 2018"

    def backward(self, losses: Tensor, inputs: Inputs = None, *, scaler: Scaler | None = None) -> Weighting:
        return plain(losses, scaler)

    def weights(self, losses: Tensor, inputs: Inputs = None) -> Tensor:
        check(losses, ())
        return torch.ones_like(losses.detach())


class Global(GradientMethod):
    """One weight for the whole batch, from the norm of its mean gradient (over all processes)."""

    def backward(self, losses: Tensor, inputs: Inputs = None, *, scaler: Scaler | None = None) -> Weighting:
        scale = factor(scaler, losses)
        parameters, gradients = self._mean(losses, scale, retain=False)
        weight = self.factor(_norm(gradients) / scale)
        accumulate(parameters, [None if g is None else g * weight.to(g.dtype) for g in gradients])
        return Weighting(weight.to(losses.dtype).expand(len(losses)))

    def weights(self, losses: Tensor, inputs: Inputs = None) -> Tensor:
        _, gradients = self._mean(losses, 1.0, retain=True)
        return self.factor(_norm(gradients)).to(losses.dtype).expand(len(losses))

    @abstractmethod
    def factor(self, norm: Tensor) -> Tensor:
        """The weight, from the norm of the mean gradient."""

    def _mean(
        self, losses: Tensor, scale: float, *, retain: bool
    ) -> tuple[list[nn.Parameter], tuple[Tensor | None, ...]]:
        check(losses, ())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.mean() * scale, parameters, retain_graph=retain, allow_unused=True)
        averaged(self.model, gradients)
        return parameters, gradients


class MGNC(Global):
    """Clip the norm of the mean gradient (gradient norm clipping, Zhang et al. 2020), for every batch by itself.

    Args:
        clip: the largest norm of the mean gradient.
    """

    paper = "Zhang et al. 2020; ENGM, Sec. 3.1"

    def __init__(self, model: nn.Module, *, clip: float = 25.0) -> None:
        super().__init__(model)
        self.clip = limit(clip, "clip")

    def factor(self, norm: Tensor) -> Tensor:
        return (self.clip / norm).clamp_max(1.0)


class SNGM(Global):
    """The mean gradient at norm one (Zhao et al. 2020); v = beta v + g / ||g|| is then SGD's momentum."""

    paper = "Zhao et al. 2020; ENGM, Eq. 4"

    def factor(self, norm: Tensor) -> Tensor:
        return torch.where(norm > 0, 1 / norm, 1.0)


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = [g.square().sum(dtype=torch.float64) for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt()
