"""Functions whose values are the usual ones and whose gradients are not: what surrogates put into a module's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Branch:
    """One forward through a residual branch, which is differentiated twice.

    Attributes:
        point: the block's input (N, ...), from which the branch's graph begins.
        linear: whether gradients now pass ReLUs unchanged.
    """

    def __init__(self, z: Tensor) -> None:
        self.apart = torch.is_grad_enabled() and z.requires_grad
        self.point = z.detach().requires_grad_() if self.apart else z
        self.linear = False


def branch(z: Tensor) -> Branch:
    """A forward from z (N, ...)."""
    return Branch(z)


def point(record: Branch) -> Tensor:
    """Where the branch begins."""
    return record.point


def scaled_gradient(x: Tensor, gamma: float) -> Tensor:
    """x itself, whose gradient counts `gamma` times."""
    found: Tensor = _Scaled.apply(x, gamma)  # type: ignore[no-untyped-call]
    return found


def linear_relu(x: Tensor, record: Branch | None) -> Tensor:
    """max(x, 0), whose gradient is passed on where `record` says so, and always without one."""
    found: Tensor = _LinearReLU.apply(x, record)  # type: ignore[no-untyped-call]
    return found


def normalised(z: Tensor, y: Tensor, record: Branch) -> Tensor:
    """The branch's output y at z, with the linear gradient by z at the length of the other."""
    if not record.apart:
        return y
    found: Tensor = _Normalised.apply(z, _Held(y, record))  # type: ignore[no-untyped-call]
    return found


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float) -> Tensor:
        ctx.gamma = gamma
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.gamma, None


class _LinearReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Branch | None) -> Tensor:
        ctx.record = record
        y = torch.relu(x)
        if record is not None:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.record is None or ctx.record.linear:
            return grads[0], None
        (y,) = ctx.saved_tensors
        return grads[0] * (y > 0), None


class _Held:
    """The graph of a branch from its own beginning to y, out of sight of the graph around it."""

    def __init__(self, y: Tensor, record: Branch) -> None:
        self.y, self.record = y, record

    def gradient(self, above: Tensor) -> Tensor:
        """The linear gradient (N, ...), every example's as long as the usual one."""
        usual, linear = (self._asked(above, linear) for linear in (False, True))
        lengths = [part.flatten(1).norm(dim=1) for part in (usual, linear)]
        ratio = torch.where(lengths[1] > 0, lengths[0] / lengths[1], lengths[1])
        return linear * ratio.reshape(-1, *(1,) * (linear.ndim - 1))

    def _asked(self, above: Tensor, linear: bool) -> Tensor:
        self.record.linear = linear
        (found,) = torch.autograd.grad(self.y, self.record.point, above, retain_graph=True)
        return found


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, held: _Held) -> Tensor:
        ctx.held = held
        return held.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.held.gradient(grads[0]), None
