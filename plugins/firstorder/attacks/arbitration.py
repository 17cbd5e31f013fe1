"""Who decides where a model's gradients and logits are approximations of an exact model's, as a prepared copy's are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firstorder.attacks.losses import Loss
from firstorder.attacks.models import Evaluation, Model, Wrapper

Adversarial = Callable[[Tensor, Tensor], Tensor]
"""From logits (M, K) of the examples at an index (M,) to which of them are broken, (M,)."""


class Arbitrated(Wrapper):
    """A model whose disputed examples get their gradients and logits from the exact model.

    Points (k * N, ...) hold k copies of the batch of N, copy after copy.

    Args:
        model: the approximate one.
        disputed: which examples (N,) it took for broken and the exact model did not.
    """

    def __init__(self, model: Model, disputed: Tensor) -> None:
        super().__init__(model)
        self.disputed = disputed

    def gradient(self, x: Tensor, labels: Tensor, loss: Loss | None, *, logits: bool = True) -> Evaluation:
        rows = self.disputed.repeat(len(x) // len(self.disputed))
        gradient, scores, losses = torch.empty_like(x), None, None
        for model, chosen in ((self._model.exact, rows), (self._model, ~rows)):
            index = chosen.nonzero()[:, 0]
            if not len(index):
                continue
            found = model.gradient(x[index], labels[index], loss, logits=logits)
            gradient[index] = found.gradient
            if found.logits is not None:
                scores = found.logits.new_empty(len(x), found.logits.shape[1]) if scores is None else scores
                scores[index] = found.logits.to(scores.dtype)
            if found.losses is not None:
                losses = found.losses.new_empty(len(x)) if losses is None else losses
                losses[index] = found.losses.to(losses.dtype)
        return Evaluation(gradient, scores, losses)

    def take(self, index: Tensor) -> Model:
        return Arbitrated(self._model.take(index), self.disputed[index])

    def confirm(self, points: Tensor, broken: Tensor, adversarial: Adversarial) -> tuple[Tensor, Model]:
        """As the function `confirm`."""
        index = asked(self, broken).nonzero()[:, 0]
        confirmed = broken.clone()
        if len(index):
            confirmed[index] = adversarial(self._model.exact.logits(points[index]), index)
        return confirmed, Arbitrated(self._model, self.disputed | (broken & ~confirmed))


def confirm(model: Model, points: Tensor, broken: Tensor, adversarial: Adversarial) -> tuple[Tensor, Model]:
    """Which of the `broken` (N,) at points (N, ...) the exact model breaks; the model to go on with."""
    if isinstance(model, Arbitrated):
        return model.confirm(points, broken, adversarial)
    if model.exact is model:
        return broken, model
    return Arbitrated(model, torch.zeros_like(broken)).confirm(points, broken, adversarial)


def asked(model: Model, broken: Tensor) -> Tensor:
    """Of which of the `broken` (N,) `confirm` asks the exact model, in a forward of its own."""
    if isinstance(model, Arbitrated):
        return broken & ~model.disputed
    return torch.zeros_like(broken) if model.exact is model else broken
