"""Whether what an attack made is within its ball, and the 8-bit picture that can be kept of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE

LEVELS = 255
"""The largest value of a pixel of 8 bits."""

ROUNDING = 1e-3
"""How near a pixel in units of 1/255 must be to a whole number to be taken for it."""


def inside(adversarial: Tensor, x: Tensor, eps: float | None, norm: Literal["Linf", "L2"]) -> Tensor:
    """Which examples (N, ...) are within [0, 1] and within eps of x (N, ...), up to rounding, (N,).

    Args:
        adversarial: what an attack made.
        x: the examples as they are.
        eps: the radius; None for none.
        norm: of the ball.
    """
    flat = adversarial.flatten(1)
    found = (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
    if eps is not None:
        delta = (adversarial - x).flatten(1).double()
        found &= _near(delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1), eps)
    return found


def eight_bit(adversarial: Tensor, x: Tensor, eps: float | None, norm: Literal["Linf", "L2"]) -> Tensor:
    """The examples (N, ...) with pixels k/255, as a file of 8 bits holds them.

    A pixel is rounded to the nearest k/255. What would leave the ball by that is rounded towards x: in Linf a pixel, in
    L2 all pixels of an example. Examples x of 8 bits themselves are never left by more than before; of others the ball
    may hold no picture of 8 bits at all, which `inside` says.
    """
    scaled, original = LEVELS * adversarial.double(), LEVELS * x.double()
    nearest = scaled.round()
    if eps is None:
        return (nearest / LEVELS).to(x)
    towards = torch.where(scaled > original, (scaled + ROUNDING).floor(), (scaled - ROUNDING).ceil())
    sizes = (nearest - original).abs() / LEVELS
    if norm == "L2":
        sizes = sizes.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return (torch.where(_near(sizes, eps), nearest, towards) / LEVELS).to(x)


def _near(size: Tensor, eps: float) -> Tensor:
    return size <= eps * (1 + RELATIVE) + ABSOLUTE
