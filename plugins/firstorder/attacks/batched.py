"""Many examples attacked together, a batch at a time through the model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.losses import Loss, MeanLogits
from firstorder.attacks.models import Evaluation, Model, Wrapper, stacked


class Batched(Wrapper):
    """A model that is given at most `size` examples at a time.

    An attack that drops broken examples works with this on as many as memory holds of the images themselves: those
    not yet broken move up, so that every forward but the last of a step is full. Draws do not depend on `size`.

    Args:
        model: whose logits and gradients these are.
        size: the number of examples, or of copies of examples, in a forward.

    Raises:
        ValueError: size < 1.
    """

    def __init__(self, model: Model, size: int) -> None:
        validation.count("size", size)
        super().__init__(model)
        self._size = size

    def logits(self, x: Tensor) -> Tensor:
        return torch.cat([self._model.logits(part) for part in x.split(self._size)])

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        if isinstance(loss, MeanLogits):
            return Evaluation(self._together(x, labels, loss), None)
        batches = zip(x.split(self._size), labels.split(self._size), strict=True)
        found = [self._model.gradient(part, chosen, loss, logits=logits) for part, chosen in batches]
        if len(found) == 1:
            return found[0]
        return stacked(found)

    def _together(self, x: Tensor, labels: Tensor, loss: MeanLogits) -> Tensor:
        """The gradient (k * M, ...), all copies of an example in one forward."""
        gradient = torch.empty_like(x)
        numbers = torch.arange(len(x), device=x.device).unflatten(0, (loss.copies, loss.examples))
        for part in numbers.split(max(self._size // loss.copies, 1), 1):
            index, of = part.flatten(), replace(loss, examples=part.shape[1])
            gradient[index] = self._model.gradient(x[index], labels[index], of, logits=False).gradient
        return gradient
