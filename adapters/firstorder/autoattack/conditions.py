"""What AutoAttack's own attacks take for granted, provided for the time of an evaluation.

They want a device that exists, a model in evaluation mode that answers float32 with float32, and ten classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from firstorder.attacks.inspection import doubt
from firstorder.attacks.modes import preserved, training
from firstorder.attacks.outputs import logits_of


def home(model: Any, device: torch.device | str | None) -> torch.device:
    """The device to attack on: that of the model for None; a GPU, if there is one, for a model without tensors.

    Raises:
        ValueError: a CUDA device where there is none.
    """
    if device is None:
        tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
        first = next(tensors, None)
        return first.device if first is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{wanted}" is not available here; pass device="cpu", or None for the model\'s device')
    return wanted


def evaluated(module: nn.Module | None) -> AbstractContextManager[None]:
    """A context with the module in evaluation mode, after which its modes, buffers and gradients are as before.

    Nothing of it changes for None, a model that is no module.

    Warns:
        RobustnessWarning: it is in training mode, or a part of it is.
    """
    if module is None:
        return nullcontext()
    names = training(module)
    if names:
        some = ", ".join(names[:3]) + (", ..." if names[3:] else "")
        doubt(
            f"The given model is *not* in eval mode ({some}); it is evaluated in evaluation mode and gets its own "
            "back. What shall be random then, as dropout, belongs in its forward"
        )
    return _evaluated(module)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    with preserved(module):
        try:
            for parameter, _ in gradients:
                parameter.grad = None  # FAB's backward would add to it
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def fitted(adversary: Any, classes: int) -> Iterator[None]:
    """A context in which AutoAttack's own attacks fit a model of few classes.

    There are no more targets than other classes. DLR divides a difference of two logits by a range of three of them,
    targeted DLR of four; where the model has fewer, the loss is the difference alone.
    """
    targeted, fab = adversary.apgd_targeted, adversary.fab
    budgets = targeted.n_target_classes, fab.n_target_classes
    logger, replaced = logging.getLogger("auto-attack"), []
    try:
        targeted.n_target_classes, fab.n_target_classes = (min(n, classes - 1) for n in budgets)
        if classes < 3:
            adversary.apgd.dlr_loss = margin
            replaced.append((adversary.apgd, "dlr_loss"))
        if classes < 4:
            targeted.dlr_loss_targeted = lambda scores, y: -difference(scores, y, targeted.y_target)
            replaced.append((targeted, "dlr_loss_targeted"))
            logger.addFilter(_holds)
        yield
    finally:
        targeted.n_target_classes, fab.n_target_classes = budgets
        for attack, name in replaced:
            delattr(attack, name)
        logger.removeFilter(_holds)


def _holds(record: logging.LogRecord) -> bool:
    """Whether a message is true although DLR is replaced."""
    return "it is not possible to use the" not in record.getMessage()


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """The largest other logit minus that of the class y (N,), for scores (N, K), shape (N,)."""
    others = scores.scatter(1, y[:, None], -torch.inf).argmax(1)
    return -difference(scores, y, others)


def difference(scores: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """The logit of the class y (N,) minus that of another, for scores (N, K), shape (N,)."""
    return (scores.gather(1, y[:, None]) - scores.gather(1, others[:, None]))[:, 0]


@contextmanager
def asked_in(adversary: Any, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the model gets images of `dtype`, and AutoAttack's own attacks float32 logits of it."""
    model = adversary.model

    def ask(x: Tensor) -> Tensor:
        return logits_of(model(x.to(dtype))).float()

    users = [(adversary, "model"), (adversary.apgd, "model"), (adversary.apgd_targeted, "model")]
    users += [(adversary.fab, "predict"), (adversary.square, "predict")]
    before = [getattr(user, name) for user, name in users]
    try:
        for user, name in users:
            setattr(user, name, ask)
        yield
    finally:
        for (user, name), value in zip(users, before, strict=True):
            setattr(user, name, value)
