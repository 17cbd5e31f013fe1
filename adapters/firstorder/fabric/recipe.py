"""What is trained, and how: everything that determines the result of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from firstorder.attacks import Attack, validation
from firstorder.attacks.base import Bounds
from firstorder.training import GradientMethod, Objective, gradient_method

Schedule = Callable[[float], float]
"""From the share of training that is done, in [0, 1), to a factor on the learning rate."""

Augment = Callable[[Tensor, Generator], Tensor]
"""From examples (N, ...) and a generator on their device to changed examples."""


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


def one_cycle(progress: float) -> float:
    """From 1/25 to 1 in the first 0.3 of training and to 0 after it, along cosines (Smith and Topin 2018)."""
    if progress < 0.3:
        return 1 - (1 - 1 / 25) * cosine(progress / 0.3)
    return cosine((progress - 0.3) / 0.7)


def drops(*shares: float, factor: float = 0.1) -> Schedule:
    """Times `factor` whenever another of `shares` of the training is done."""
    for share in shares:
        validation.number("share", share, low=0, high=1)
    return lambda progress: factor ** sum(progress >= share for share in shares)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe of adversarial training.

    Args:
        objective: makes the adversarial examples and their losses.
        method: makes the gradient method from the model: ENGM, or partial(ENGM, alpha=1.0); or its name.
        optimizer: makes the optimizer from the parameters: partial(torch.optim.SGD, lr=0.1).
        judge: the attack whose accuracy on the validation examples says which epoch is best, [ENGM]: PGD of 20 steps
            of eps / 10 with the margin loss.
        epochs: passes over the examples.
        batch_size: examples a step, over all processes and accumulated backwards.
        accumulate: backwards a step; each has batch_size / (processes * accumulate) examples.
        schedule: of the learning rate.
        ramp: share of the training over which the attack's budget grows to its full size.
        prepare: whether the inner attack takes its gradients from a faster copy of the model in evaluation mode
            (`firstorder.attacks.prepare`), which gets the weights anew before every attack.
        augment: changes the examples of every step, before the attack.
        bounds: of the examples.
        seed: of the order, the attacks, the augmentation, and dropout.
        diagnose: how many training examples have their gradients' statistics measured after every epoch.
        validate: every how many epochs the validation examples are attacked; the last epoch always is.
        save: every how many steps the state is saved, beside the end of every epoch.
    """

    objective: Objective
    method: Callable[[nn.Module], GradientMethod] | str
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    judge: Attack
    epochs: int
    batch_size: int
    accumulate: int = 1
    schedule: Schedule = constant
    ramp: float = 0.0
    prepare: bool = False
    augment: Augment | None = None
    bounds: Bounds = (0.0, 1.0)
    seed: int = 0
    diagnose: int = 0
    validate: int = 1
    save: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "validate"):
            validation.count(name, getattr(self, name))
        if self.save is not None:
            validation.count("save", self.save)
        for name in ("seed", "diagnose"):
            validation.count(name, getattr(self, name), low=0)
        validation.number("ramp", self.ramp, low=0, high=1)
        gradient_method(self.method)
        self.objective.scaled(1.0)

    def budget(self, progress: float) -> float:
        """The factor on the attack's budget, in (0, 1], when the share `progress` in (0, 1] of training is reached."""
        return min(1.0, progress / self.ramp) if self.ramp else 1.0
