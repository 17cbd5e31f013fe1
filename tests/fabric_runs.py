"""Small training runs for the tests of firstorder.fabric, and a script for those of several processes.

python fabric_runs.py FOLDER AT    every run of `TWO`, by two processes, then the full one by the first of them, which
                                   is killed with signal 9 after step AT
"""

from __future__ import annotations

import copy
import csv
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset

from firstorder.attacks import PGD
from firstorder.attacks.losses import Margin
from firstorder.evaluation.names import packaged
from firstorder.fabric import Recipe, Trainer, drops, evaluate, make
from firstorder.training import AENGM, AWP, ENGM, TRADES, Vanilla

STEPS, BATCH, EPOCHS = 5, 16, 3
ATTACK = PGD(eps=0.15, alpha=0.1, steps=2, random_start=True)
FIXED = PGD(eps=0.15, alpha=0.1, steps=2, random_start=False)


State = dict[str, Tensor]


class KilledError(Exception):
    """Raised in place of a kill."""


class Kill:
    """A progress callback that raises after step `at`, or after the epoch that ends there."""

    def __init__(self, at: int, *, epoch: bool = False) -> None:
        self.at, self.epoch = at, epoch

    def __call__(self, row: Mapping[str, float]) -> None:
        if row["step"] == self.at and ("epoch" in row) == self.epoch:
            raise KilledError


def data() -> tuple[TensorDataset, TensorDataset]:
    """84 MNIST images of 7 x 7 to train on, 5 batches of 16 and a rest, and 60 others."""
    images = packaged.mnist()
    x = F.avg_pool2d(images.x, 4)
    return TensorDataset(x[:84], images.y[:84]), TensorDataset(x[84:144], images.y[84:144])


def network(seed: int = 0, *, norm: bool = True) -> nn.Module:
    """A convolutional network with dropout, and BatchNorm if `norm`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def augment(x: Tensor, generator: Generator) -> Tensor:
    """A random brightness of every image."""
    return x * (0.5 + torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) / 2)


def recipe(**changes: Any) -> Recipe:
    """ENGM on the smallest objective."""
    given: dict[str, Any] = {
        "objective": Vanilla(attack=ATTACK),
        "method": partial(ENGM, alpha=2.0),
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "judge": PGD(eps=0.05, alpha=0.02, steps=3, loss=Margin()),
        "epochs": EPOCHS,
        "batch_size": BATCH,
    }
    return Recipe(**{**given, **changes})


def full(**changes: Any) -> Recipe:
    """All that has a state."""
    given: dict[str, Any] = {
        "method": partial(AENGM, alpha=1.0, tau=3),
        "optimizer": partial(torch.optim.Adam, lr=0.02),
        "accumulate": 2,
        "schedule": drops(0.4, 0.7, factor=0.5),
        "ramp": 0.5,
        "augment": augment,
        "diagnose": 8,
        "save": 2,
    }
    return recipe(**{**given, **changes})


def fit(
    folder: Path,
    chosen: Recipe,
    model: nn.Module | None = None,
    *,
    fabric: Fabric | None = None,
    log_every: int = 1,
    tensorboard: bool = False,
    workers: int = 0,
    **options: Any,
) -> nn.Module:
    """Train on `data` and return the model."""
    model = network() if model is None else model
    fabric = fabric or make(accelerator="cpu")
    trainer = Trainer(fabric, chosen, folder, log_every=log_every, tensorboard=tensorboard, workers=workers)
    trainer.fit(model, *(options.pop("data", None) or data()), **options)
    return model


def equal(found: State, expected: State) -> bool:
    """Whether two states agree bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def state(model: nn.Module) -> State:
    """A copy of a model's state."""
    return copy.deepcopy(model.state_dict())


def numbers(path: Path, key: str) -> list[float]:
    """A column of a CSV file."""
    return [float(row[key]) for row in table(path)]


def table(path: Path, *, without: tuple[str, ...] = ("seconds",)) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


CLIPPED = partial(ENGM, alpha=0.4)
TWO: dict[str, Recipe] = {
    "vanilla": recipe(epochs=2, method=CLIPPED),
    "trades": recipe(epochs=2, method=CLIPPED, objective=TRADES(attack=ATTACK), save=2),
    "awp": recipe(epochs=1, method=CLIPPED, objective=AWP(base=Vanilla(attack=FIXED), gamma=0.05)),
    "fixed": recipe(epochs=2, method=CLIPPED, objective=Vanilla(attack=FIXED)),
    "killed": recipe(augment=augment, save=2),
    "norm": recipe(epochs=1),
}
"""Runs by two processes; "killed" ends after step 8, "norm" has BatchNorm."""


def alike(name: str) -> nn.Module:
    """The network of a run of `TWO`; without dropout where the parts of a batch are to make no difference."""
    model = network(norm=name == "norm")
    if name in ("fixed", "awp"):
        model[3] = nn.Identity()
    return model


def two(folder: Path) -> int:
    """The rank of this process."""
    fabric = make(accelerator="cpu", devices=2)
    fabric.launch()
    for name, chosen in TWO.items():
        model = alike(name)
        if fabric.global_rank:
            nn.init.zeros_(model[-1].weight)  # the first weights are those of process 0
        with suppress(KilledError):
            fit(folder / name, chosen, model, fabric=fabric, progress=Kill(8) if name == "killed" else None)
        torch.save(model.state_dict(), folder / name / f"rank{fabric.global_rank}.pt")
    found = evaluate(fabric, model, data()[1], ATTACK, batch_size=7)
    torch.save(vars(found), folder / f"validated{fabric.global_rank}.pt")
    return fabric.global_rank


def kill(folder: Path, at: int) -> None:
    def progress(row: Mapping[str, float]) -> None:
        if row["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(folder, full(), progress=progress, tensorboard=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if two(Path(sys.argv[1])) == 0:
        kill(Path(sys.argv[1]) / "kill", int(sys.argv[2]))
