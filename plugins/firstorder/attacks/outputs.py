"""What models return: logits unwrapped where that is unambiguous, and modules for where it is not.

    PGD(eps=8 / 255)(Select(model, 0), x, y)     the model returns a tuple, its logits first
    PGD(eps=8 / 255)(TwoLogits(model), x, y)     the model has a single output, a logit

Both are modules, so they work in every host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Any]


class Select(nn.Module):
    """A model of which one of several outputs is the logits.

    Args:
        model: from images (N, ...) to a tuple, a list or a mapping.
        key: the position or the key of the logits (N, K).
    """

    def __init__(self, model: Forward, key: int | str = 0) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, K) of images x (N, ...)."""
        logits: Tensor = self.model(x)[self.key]
        return logits


class TwoLogits(nn.Module):
    """A binary classifier with a single output, as a classifier of the classes 0 and 1.

    The logits are (0, z), whose softmax is (1 - sigmoid(z), sigmoid(z)).

    Args:
        model: from images (N, ...) to one output per image, (N, 1) or (N,).
        sigmoid: whether the output is a probability, sigmoid(z), of which z is computed again; else it is z itself.
            Where the sigmoid has saturated the gradient vanishes: take z where the model can give it.
    """

    def __init__(self, model: Forward, *, sigmoid: bool = False) -> None:
        super().__init__()
        self.model, self.sigmoid = model, sigmoid

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, 2) of images x (N, ...)."""
        z = logits_of(self.model(x)).reshape(len(x), 1)
        return torch.cat([torch.zeros_like(z), torch.logit(z) if self.sigmoid else z], 1)


def logits_of(output: Any) -> Tensor:
    """The tensor in a model's output: itself, its attribute `logits` or its entry "logits".

    Raises:
        ValueError: none of these; the message names the wrapper that helps in every host.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    what = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        what, example = f"{what} with the keys {', '.join(map(repr, output))}", repr(next(iter(output), "logits"))
    else:
        example = "0"
    raise ValueError(
        f"the model returned {what}, not a tensor of logits; wrap it in an nn.Module whose forward returns the logits "
        f"alone, as firstorder.attacks.Select(model, {example}) does with entry {example}, and attack that"
    )


def require_logits(scores: Tensor, n: int) -> None:
    """Require logits (n, K) with K of at least 2, without looking at their values."""
    if (scores.ndim == 1 and len(scores) == n) or (scores.ndim == 2 and scores.shape == (n, 1)):
        raise ValueError(
            f"the model returned shape {tuple(scores.shape)}: it has one output, one class only, and an attack needs "
            "logits for at least two; for a logit z take firstorder.attacks.TwoLogits(model), an nn.Module that "
            "returns torch.cat([torch.zeros_like(z), z], 1), for a probability TwoLogits(model, sigmoid=True)"
        )
    if scores.ndim != 2 or len(scores) != n:
        raise ValueError(f"the model returned shape {tuple(scores.shape)} for {n} images; logits are (N, classes)")
    if scores.shape[1] < 2:
        raise ValueError("the model has no class; an attack needs logits for at least two")
    if not scores.is_floating_point():
        raise ValueError(f"the model's logits are {scores.dtype}; return floating-point ones")


def probabilities(scores: Tensor) -> Tensor:
    """Whether all rows of scores (N, K) are probabilities, a scalar of bool."""
    wide = scores.float()
    sums = (wide.sum(1) - 1).abs() <= (1e-3 if scores.dtype.itemsize >= 4 else 1e-2)
    return (sums & (wide >= 0).all(1)).all()
