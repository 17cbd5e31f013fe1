"""Many examples attacked together, a batch at a time through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.attacks.losses import Loss
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
        batches = zip(x.split(self._size), labels.split(self._size), strict=True)
        found = [self._model.gradient(part, chosen, loss, logits=logits) for part, chosen in batches]
        if len(found) == 1:
            return found[0]
        return stacked(found)
