"""The parts of a run that a configuration names: data, network, attack, recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset

from firstorder.attacks import PGD, Attack
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.losses import Margin
from firstorder.evaluation.names import attacks as labels
from firstorder.evaluation.names import data, methods, models
from firstorder.evaluation.training.configuration import Configuration
from firstorder.fabric import Recipe, constant, cosine, drops, one_cycle
from firstorder.training import AWP, OBJECTIVES, GradientMethod, Natural, for_size, takes_alpha

SCHEDULES = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}


class Splits(NamedTuple):
    """Images (N, C, H, W) in [0, 1] with labels (N,), and the number of classes."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset | None
    classes: int


def splits(configuration: Configuration) -> Splits:
    """The images that a configuration names.

    The validation images are the last of the training set.

    Raises:
        ValueError: data that are not there, or too few.
    """
    images = data.load(configuration.data, train=True)
    x, y = images.x, images.y
    held = configuration.validation
    if held >= len(x):
        raise ValueError(f"validation={held} leaves none of the {len(x)} training images; lower it")
    count = len(x) - held if configuration.examples is None else configuration.examples
    if count > len(x) - held:
        raise ValueError(f"examples={count} exceeds the {len(x) - held} images that validation={held} leaves")
    test = configuration.test
    if test is None and configuration.data.partition(":")[0] in data.TORCHVISION and ":" in configuration.data:
        test = configuration.data
    tested = None if test is None else data.load(test)
    if tested is not None and (configuration.test_examples or 0) > len(tested.x):
        raise ValueError(f"test_examples={configuration.test_examples} exceeds the {len(tested.x)} test images")
    kept = configuration.test_examples
    return Splits(
        TensorDataset(x[:count].clone(), y[:count]),
        TensorDataset(x[-held:].clone(), y[-held:]),
        None if tested is None else TensorDataset(tested.x[:kept], tested.y[:kept]),
        1 + int(torch.cat([y] if tested is None else [y, tested.y]).max()),
    )


def network(configuration: Configuration, classes: int) -> nn.Module:
    """The network with first weights that the seed determines.

    Raises:
        ValueError: a name that names nothing.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(configuration.seed)
        return models.architecture(configuration.model, classes)()


def inner(configuration: Configuration) -> Attack:
    """The inner attack at the full eps.

    Raises:
        ValueError: an unknown attack or parameter, or one that has no budget.
    """
    line = labels.parse(configuration.attack, without=("eps", "max_norm"), data=configuration.data)
    if not line.bounded and "max_norm" not in {field.name for field in fields(line.cls)}:
        raise ValueError(
            f"the attack {configuration.attack!r} has neither eps nor max_norm and cannot be kept in a ball"
        )
    return line.build(eps=configuration.eps, alpha=configuration.eps / 4, max_norm=configuration.eps)


def evaluation_attack(configuration: Configuration, attack: Attack) -> Attack:
    """PGD with the margin loss and steps of eps / 10, in the norm of the inner attack."""
    norm = attack.norm if isinstance(attack, BoundedAttack) else "L2"
    eps = configuration.eps
    return PGD(
        eps=eps, alpha=eps / 10, steps=configuration.judge_steps, norm=norm, loss=Margin(), random_start=True,
        early_stop=True,
    )  # fmt: skip


def recipe(configuration: Configuration) -> Recipe:
    """The recipe that a configuration describes."""
    c = configuration
    attack = inner(c)
    options = {} if c.objective == "vanilla" else {"beta": c.beta}
    objective = Natural() if c.objective == "natural" else OBJECTIVES[c.objective](attack=attack, **options)
    optimizer = (
        partial(torch.optim.SGD, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        if c.optimizer == "sgd"
        else partial(torch.optim.Adam, lr=c.lr, weight_decay=c.weight_decay)
    )
    return Recipe(
        objective=AWP(base=objective, gamma=c.awp) if c.awp else objective,
        method=_method(c),
        optimizer=optimizer,
        judge=evaluation_attack(c, attack),
        epochs=c.epochs,
        batch_size=c.batch_size,
        accumulate=c.accumulate,
        schedule=drops(*c.drops) if c.schedule == "drops" else SCHEDULES[c.schedule],
        ramp=c.ramp,
        prepare=c.prepare,
        augment=crop_flip if c.augment == "crop-flip" else None,
        seed=c.seed,
        diagnose=c.diagnose,
        validate=c.validate_every,
        save=c.save_every,
    )


def _method(c: Configuration) -> Callable[..., GradientMethod]:
    """The method with its alpha."""
    found = methods.method(c.method)
    if c.alpha is not None:
        if not takes_alpha(found):
            raise ValueError(f"alpha={c.alpha} has no meaning for method={c.method}; leave it out")
        if "alpha" in getattr(found, "keywords", ()):
            raise ValueError(f"alpha={c.alpha} and method={c.method} both say what alpha is; leave out one of them")
        found = partial(found, alpha=c.alpha)
    return found if c.alpha_parameters is None else for_size(found, c.alpha_parameters)


def crop_flip(x: Tensor, generator: Generator, *, padding: int = 4) -> Tensor:
    """Images x (N, C, H, W), each shifted by up to `padding` pixels over black and flipped with probability 1/2."""
    n, _, height, width = x.shape
    top, left = (torch.randint(2 * padding + 1, (2, n), generator=generator, device=x.device)).unbind()
    flip = torch.rand(n, generator=generator, device=x.device) < 0.5
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(x, (padding,) * 4).movedim(1, -1)
    chosen = padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return chosen.movedim(-1, 1).contiguous()
