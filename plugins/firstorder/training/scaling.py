"""A limit that was chosen for one network, for another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

from torch import nn

from firstorder.attacks import validation
from firstorder.training.method import GradientMethod
from firstorder.training.registry import gradient_method, takes_alpha


def for_size(
    method: str | Callable[..., GradientMethod],
    parameters: float,
    *,
    alpha: float | Literal["auto"] | None = None,
) -> Callable[[nn.Module], GradientMethod]:
    """What makes `method` with its alpha times the square root of (the model's parameters / `parameters`).

    The norm of a gradient grows with the square root of the number of its entries; so [ENGM] takes 5 for ResNet-18
    with 11.1 million parameters and 10.4 for WRN-34-10 with 48.2 million.

    Args:
        method: a gradient method that has an alpha, or its name.
        parameters: of the network that alpha was chosen for, above 0.
        alpha: what was chosen; the method's own by default.

    Raises:
        ValueError: a method without alpha, or with alpha="auto"; a number of parameters that is none.
    """
    made = gradient_method(method)
    if not takes_alpha(made):
        raise ValueError(f"method={method!r} has no alpha to scale; leave out the number of parameters")
    validation.number("parameters", parameters, low=1)
    chosen = inspect.signature(made).parameters["alpha"].default if alpha is None else alpha
    if chosen == "auto":
        raise ValueError('alpha="auto" is measured on this network; leave out the number of parameters')

    def scaled(model: nn.Module) -> GradientMethod:
        own = sum(parameter.numel() for parameter in model.parameters())
        return made(model, alpha=chosen * (own / parameters) ** 0.5)

    return scaled
