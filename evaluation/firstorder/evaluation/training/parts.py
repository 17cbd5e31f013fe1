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
from firstorder.evaluation.names.archives import Shards
from firstorder.evaluation.training.configuration import Configuration
from firstorder.fabric import Recipe, constant, cosine, drops, one_cycle
from firstorder.training import AWP, OBJECTIVES, GradientMethod, Natural, for_size, takes_alpha

SCHEDULES = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}


class Splits(NamedTuple):
    """Images (N, C, H, W) in [0, 1] with labels (N,), and the number of classes."""

    train: TensorDataset | Shards
    validation: TensorDataset
    test: TensorDataset | None
    classes: int


def splits(configuration: Configuration) -> Splits:
    """The images that a configuration names.

    The validation images are the last of the training set. Training images of wds: stay in their files.

    Raises:
        ValueError: data that are not there, or too few.
    """
    source, _, rest = configuration.data.partition(":")
    images: TensorDataset | Shards
    if source == "wds" and rest:
        images = Shards(rest, window=configuration.window)
        y = images.labels
    else:
        found = data.load(configuration.data, train=True)
        images, y = TensorDataset(found.x, found.y), found.y
    total, held = len(y), configuration.validation
    if held >= total:
        raise ValueError(f"validation={held} leaves none of the {total} training images; lower it")
    count = total - held if configuration.examples is None else configuration.examples
    if count > total - held:
        raise ValueError(f"examples={count} exceeds the {total - held} images that validation={held} leaves")
    test, kept = configuration.test, configuration.test_examples
    if test is None and source in data.TORCHVISION and rest:
        test = configuration.data
    tested = None if test is None else data.load(test, count=kept)
    if tested is not None and kept is not None and kept > len(tested.x):
        raise ValueError(f"test_examples={kept} exceeds the {len(tested.x)} test images")
    return Splits(
        _part(images, 0, count),
        _held(images, total - held, total),
        None if tested is None else TensorDataset(tested.x, tested.y),
        1 + int(torch.cat([y] if tested is None else [y, tested.y]).max()),
    )


def _part(images: TensorDataset | Shards, start: int, stop: int) -> TensorDataset | Shards:
    if isinstance(images, Shards):
        return images.part(start, stop)
    x, y = images[start:stop]
    return TensorDataset(x.clone(), y)


def _held(images: TensorDataset | Shards, start: int, stop: int) -> TensorDataset:
    """Images from `start` to `stop` in memory."""
    if isinstance(images, Shards):
        x, y = zip(*(images[i] for i in range(start, stop)), strict=True)
        return TensorDataset(torch.stack(x), torch.stack(y))
    x, y = images[start:stop]
    return TensorDataset(x.clone(), y)


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
