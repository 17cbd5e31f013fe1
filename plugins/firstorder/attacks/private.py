"""How the private copies of prepared models are run, and whether they agree with the module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks.ensemble import ensembles
from firstorder.attacks.losses import Loss, Margin
from firstorder.attacks.models import Evaluation, Model, TorchModel, by_input
from firstorder.attacks.outputs import logits_of
from firstorder.attacks.scaling import Scaling

AGREEMENT = {torch.float32: (1e-3, 0.99), torch.float16: (0.02, 0.98), torch.bfloat16: (0.1, 0.9)}
"""Of a prepared part: the largest error of a logit relative to the largest logit, and the smallest cosine between an
example's gradients."""


class Way(NamedTuple):
    """How a copy is run.

    Attributes:
        layout: of its images.
        dtype: of autocast, float32 for none.
        scaling: of its gradients, in float16.
    """

    layout: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    scaling: Scaling | None = None


class Private(TorchModel):
    """A module of one's own, whose state needs no care: from contiguous images to logits and gradients of their dtype.

    Args:
        module: the copy.
        way: how it is run.
        loss: the model's own per-example loss.
    """

    def __init__(self, module: nn.Module, way: Way, loss: Loss | None = None) -> None:
        super().__init__(_forward(module, way), loss=loss)
        self._ensemble, self._scaling = next(ensembles(module), None), way.scaling

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        found = super().gradient(x, labels, loss, logits=logits)
        return found._replace(gradient=found.gradient.contiguous())

    def _by_input(self, losses: Tensor, point: Tensor) -> Tensor:
        if self._scaling is None or not self.inspecting:
            return by_input(losses, point)
        gradient = by_input(losses, point, again=True)
        while self._scaling.again():
            gradient = by_input(losses, point, again=True)
        return gradient


def _forward(module: nn.Module, way: Way) -> Callable[[Tensor], Tensor]:
    def lowered(x: Tensor) -> Tensor:
        points = x.contiguous(memory_format=way.layout)
        low = way.dtype != torch.float32
        with torch.autocast(x.device.type, dtype=way.dtype) if low else nullcontext():
            return logits_of(module(points))

    def forward(x: Tensor) -> Tensor:
        return lowered(x).to(x.dtype) if way.scaling is None else way.scaling.around(lowered, x)

    return forward


def probe(interface: Model, example: Tensor, labels: Tensor) -> Evaluation:
    """Logits and the gradients of the margin, which does not vanish where the model is sure."""
    return interface.gradient(example, labels, Margin())


def agrees(found: Evaluation, expected: Evaluation, dtype: torch.dtype) -> bool:
    """Whether an evaluation may replace another, as far as can be asked of that dtype."""
    assert found.logits is not None
    assert expected.logits is not None
    error, cosine = AGREEMENT[dtype]
    close = (found.logits - expected.logits).abs().max() <= error * expected.logits.abs().max()
    ours, theirs = (part.flatten(1).double() for part in (found.gradient, expected.gradient))
    lengths = ours.norm(dim=1), theirs.norm(dim=1)
    alike = (ours * theirs).sum(1) >= cosine * lengths[0] * lengths[1]
    return bool(close & alike.all() & ((lengths[0] > 0) == (lengths[1] > 0)).all())
