"""Distributional attacks on a whole data set, as [DAA] runs them: batches are reshuffled every few steps.

[DAA] Zheng et al. 2018, Distributionally adversarial attack, arXiv 1808.05537: the examples of a batch interact, so it
matters which of them share one. All examples are attacked for some steps in random batches, then batches are drawn
anew, until the budget is spent. Iterates live in a file: memory does not grow with the data set.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from firstorder.attacks import (
    UNDECIDED,
    Constant,
    IterativeAttack,
    Model,
    NoMomentum,
    Parts,
    as_model,
    broken,
    predicted,
    validation,
)
from firstorder.attacks.base import Bounds
from firstorder.attacks.core import Problem, ascend
from firstorder.attacks.inspection import doubt
from firstorder.attacks.losses import named
from firstorder.attacks.oracles import Draw
from firstorder.attacks.projections import BALLS, Region, bound


class Examples(Protocol):
    """A data set with random access, such as torch's: item i is an image and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Restarts of an attack on a data set.

    Attributes:
        success: whether each restart broke each example, shape (R, N).
        doubtful: which of the others met NaN or infinite logits or gradients, shape (R, N).
    """

    success: Tensor
    doubtful: Tensor | None = None

    @property
    def worst(self) -> float:
        """The accuracy over examples that no restart broke."""
        return float((~self.success.any(0)).double().mean())

    @property
    def average(self) -> float:
        """The accuracy under a single run, averaged over the restarts."""
        return float((~self.success).double().mean())


def attack_data(
    attack: IterativeAttack,
    model: Model | Callable[[Tensor], Tensor],
    data: Examples,
    *,
    batch_size: int = 200,
    every: int = 10,
    restarts: int = 1,
    seed: int = 0,
    bounds: Bounds = (0.0, 1.0),
    progress: Callable[[int], None] = lambda count: None,
) -> Merged:
    """Attack all of `data`, untargeted, in batches that are reshuffled every `every` steps.

    Args:
        attack: one without memory from step to step (no momentum, constant steps), such as DAABLOB, BLOBQG
            and PGD; its own `restarts` must be 1.
        model: as attacks take it.
        data: images (...) within `bounds`, floating point, with integer labels.
        batch_size: the population, [DAA] has 100 to 200.
        every: steps between two shuffles.
        restarts: independent runs over the data set.
        seed: of shuffles and starts; restart r has seed + r.
        progress: called with the number of examples that went through `every` more steps.

    Raises:
        ValueError: an attack that carries something from step to step, or a bad count.

    Warns:
        RobustnessWarning: examples met NaN or infinite logits or gradients.
    """
    for name, value in (("batch_size", batch_size), ("every", every), ("restarts", restarts), ("examples", len(data))):
        validation.count(name, value)
    first, _ = _stack(data, [0])
    parts = attack.parts(first.numel())
    steady = isinstance(parts.momentum, NoMomentum) and isinstance(parts.schedule, Constant)
    if not steady or _kept(parts.direction.init(first)) or _kept(parts.oracle.init(first)):
        raise ValueError(
            f"{type(attack).__name__} carries its momentum, schedule or state from step to step, which reshuffled "
            "batches would cut off; take an attack without, such as DAABLOB"
        )
    if attack.restarts > 1 or attack.early_stop:
        raise ValueError("restarts and early_stop belong to a single batch; leave them off, and take restarts= here")
    parts.oracle.check(first)
    interface = as_model(model)
    with interface.preserved(), torch.no_grad():
        runs = [
            _run(attack, parts, interface, data, batch_size, every, seed + r, bounds, progress) for r in range(restarts)
        ]
    classes, labels = (torch.stack(kind) for kind in zip(*runs, strict=True))
    success, doubtful = broken(classes, labels), classes == UNDECIDED
    if bool(doubtful.any()):
        doubt(
            f"{int(doubtful.any(0).sum())} of {len(data)} examples met NaN or infinite logits or gradients; they do "
            "not count as broken"
        )
    return Merged(success=success, doubtful=doubtful)


def _run(
    attack: IterativeAttack,
    parts: Parts,
    interface: Model,
    data: Examples,
    batch_size: int,
    every: int,
    seed: int,
    bounds: Bounds,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """One run over the data set: what the model takes the examples for in the end, and their labels, (N,) each."""
    shuffle = torch.Generator().manual_seed(seed)
    image, _ = _stack(data, [0])
    generator = torch.Generator(image.device).manual_seed(seed)
    classes, labels = (torch.zeros(len(data), dtype=torch.long) for _ in range(2))

    def problem(x: Tensor, y: Tensor) -> Problem:
        low, high = (bound(limit, x) for limit in (bounds if bounds is not None else (-torch.inf, torch.inf)))
        validation.images(x, low, high)
        region: Region = BALLS[attack.norm].around(x, attack.eps, low, high)
        loss, budget = named(attack.loss), attack.memory_budget
        return Problem(model=interface, region=region, labels=y, loss=loss, memory_budget=budget)

    with tempfile.TemporaryDirectory() as folder:
        shape = (len(data), *image.shape[1:])
        iterates = np.memmap(Path(folder) / "iterates", dtype=np.float32, mode="w+", shape=shape)
        for done in range(0, attack.steps, every):
            for chosen in torch.randperm(len(data), generator=shuffle).split(batch_size):
                x, y = _stack(data, chosen.tolist())
                here = problem(x, y)
                if done:
                    a = torch.from_numpy(iterates[chosen.numpy()]).to(x)
                else:
                    a = here.region.sample(generator) if attack.random_start else x.clone()
                steps = min(every, attack.steps - done)
                a = ascend(here, parts, a, steps, draw=Draw(generator, len(x))).a
                iterates[chosen.numpy()] = a.cpu().numpy()
                if done + steps == attack.steps:
                    classes[chosen], labels[chosen] = predicted(interface.logits(a)).cpu(), y.cpu()
                progress(len(x))
        del iterates
    return classes, labels


def _kept(state: object) -> bool:
    """Whether a part's state holds anything."""
    return any(map(_kept, state)) if isinstance(state, tuple) else state is not None


def _stack(data: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images (M, ...) and labels (M,) of the items at `indices`."""
    items = [data[i] for i in indices]
    x = torch.stack([torch.as_tensor(image) for image, _ in items])
    return x, torch.tensor([int(label) for _, label in items], device=x.device)
