"""The loss around an example (ENGM, Fig. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.models import preserved


@dataclass(frozen=True, eq=False)
class Landscape:
    """The mean loss at x + a sign(grad_x L) + b r, r of random signs, clipped to the bounds.

    Attributes:
        offsets: the values of a and of b, (P,).
        loss: at every pair (a, b), (P, P).
    """

    offsets: Tensor
    loss: Tensor


def landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    points: int = 21,
    generator: torch.Generator | None = None,
) -> Landscape:
    """The loss of `model` around examples x (N, ...) with labels y (N,), for a and b in [-2 eps, 2 eps].

    Args:
        model: left as it was.
        eps: the unit of the axes.
        bounds: of the examples.
        points: P.
        generator: of r.
    """
    validation.count("points", points, low=2)
    low, high = bounds
    offsets = torch.linspace(-2 * eps, 2 * eps, points, device=x.device, dtype=x.dtype)
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1
    loss = torch.empty(points, points, dtype=x.dtype, device=x.device)
    with preserved(model):
        inputs = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs), y, reduction="sum"), inputs)
        with torch.no_grad():
            for i, j in product(range(points), repeat=2):
                moved = x + offsets[i] * gradient.sign() + offsets[j] * signs
                loss[i, j] = F.cross_entropy(model(moved.clamp(low, high)), y)
    return Landscape(offsets, loss)
