"""Step sizes of hosts that give them relative to the radius."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.projections import Size


def relative_step(name: str, share: Any, eps: Size) -> Size | None:
    """The step size that is a share of the radius.

    Args:
        name: the host's name for the share, for messages.
        share: a number greater than 0.
        eps: the radius, a number or a tensor; what is no radius is left for the attack to refuse.

    Returns:
        share * eps. Where eps is 0 nothing moves: None then, within a tensor any positive number.

    Raises:
        ValueError: the share is no such number.
    """
    validation.number(name, share, low=0, above=True)
    if isinstance(eps, Tensor):
        return torch.where(eps > 0, share * eps, 1.0)
    return share * eps if isinstance(eps, Real) and eps > 0 else None
