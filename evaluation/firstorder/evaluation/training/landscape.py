"""The loss around an example (ENGM, Fig. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import PGD, validation
from firstorder.attacks.models import preserved


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss at x + a d + b r: d the perturbation of PGD-20, r noise orthogonal to it and as long, both clipped.

    Attributes:
        offsets: the values of a and of b, (P,).
        loss: of every example at every pair (a, b), (N, P, P).
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
    """The loss of `model` around examples x (N, ...) with labels y (N,), for a and b in [-2, 2].

    Args:
        model: left as it was.
        eps: the radius of the perturbations, in the maximum norm.
        bounds: of the examples.
        points: P.
        generator: of r.
    """
    validation.count("points", points, low=2)
    low, high = bounds
    offsets = torch.linspace(-2, 2, points, device=x.device, dtype=x.dtype)
    along = (PGD(eps=eps, alpha=eps / 10, steps=20, random_start=False)(model, x, y, bounds=bounds) - x).detach()
    across = orthogonal(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype), along)
    loss = torch.empty(len(x), points, points, dtype=x.dtype, device=x.device)
    with preserved(model), torch.no_grad():
        for i, j in product(range(points), repeat=2):
            moved = (x + offsets[i] * along + offsets[j] * across).clamp(low, high)
            loss[:, i, j] = F.cross_entropy(model(moved), y, reduction="none")
    return Landscape(offsets, loss)


def orthogonal(noise: Tensor, along: Tensor) -> Tensor:
    """What is left of `noise` (N, ...) without its part along `along` (N, ...), at the length of that."""
    n, d = noise.flatten(1), along.flatten(1)
    length = d.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, d / length, 0.0)
    rest = n - (n * unit).sum(1, keepdim=True) * unit
    found: Tensor = rest / rest.norm(dim=1, keepdim=True) * length
    return found.reshape(along.shape)
