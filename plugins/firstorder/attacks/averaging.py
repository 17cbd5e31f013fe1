"""The gradient of the loss of the mean logits of copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firstorder.attacks.losses import MeanLogits

if TYPE_CHECKING:
    from firstorder.attacks.core import Problem


def together(problem: Problem, points: Tensor, mean: int, rows: int) -> Tensor:
    """The gradients (k * N, ...) of the loss of mean logits, as many examples at once as memory has room for.

    Args:
        problem: of N examples.
        points: (k * N, ...), groups of `mean` copies of `rows` points.
        mean: how many copies have one loss.
        rows: points in each of them, a multiple of N.
    """
    n = len(problem.labels)
    stacks = points.unflatten(0, (-1, mean, rows // n, n)).movedim(1, 0)
    limit, copies = problem.limit(points), len(points) // n
    gradient = torch.empty_like(stacks)
    for index in torch.arange(n, device=points.device).split(n if limit is None else max(limit // copies, 1)):
        here, part = problem if len(index) == n else problem.take(index), stacks[:, :, :, index]
        labels = torch.cat([here.labels if here.rows is None else here.rows] * copies)
        loss = MeanLogits(loss=problem.loss, copies=mean, examples=len(labels) // mean)
        found = here.model.gradient(part.flatten(0, 3), labels, loss, logits=False).gradient
        gradient[:, :, :, index] = found.view_as(part)
    return gradient.movedim(0, 1).reshape(points.shape)
