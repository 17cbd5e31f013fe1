"""ResNet-18 trained against PGD-10 by MSGD and by ENGM, as many epochs as a time allows.

python tests/cuda/robust_training.py --data cifar10:DIR --seconds 235 --out runs/cuda

Both get as many epochs, from the same first weights. training.csv has a row for every epoch as it ends; training.md
has what their best and last weights are worth on images that they have not seen.
"""

# ruff: noqa: T201 - a script prints

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from firstorder.attacks import PGD, Margin
from firstorder.evaluation.names import data
from firstorder.evaluation.names.networks import ResNet18, SmallCNN
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.fabric import Recipe, Robustness, Trainer, evaluate, make, one_cycle
from firstorder.fabric.checkpoint import BEST, load_weights
from firstorder.files import write_text
from firstorder.training import Vanilla

CUDA = torch.cuda.is_available()
EPS = 8 / 255
BATCH = 128
METHODS = ("msgd", "engm")
TRIED = 24
"""Steps that say how long a step takes."""
HELD = 1000
"""Images to choose the best epoch by; of those to judge at most twice as many are used."""
SHARE = 0.85
"""Of the time, for the steps; the rest is for validation and the verdict."""

Progress = Callable[[Mapping[str, float]], None]


class LateError(Exception):
    """The time is up."""


def recipe(method: str, epochs: int) -> Recipe:
    inner = PGD(eps=EPS, alpha=EPS / 4, steps=10, random_start=True)
    judge = PGD(eps=EPS, alpha=EPS / 10, steps=20, loss=Margin(), random_start=True, early_stop=True)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Recipe(
        objective=Vanilla(attack=inner), method=method, optimizer=optimizer, judge=judge, epochs=epochs,
        batch_size=BATCH, schedule=one_cycle,
    )  # fmt: skip


def split(spec: str) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Images to train on, to choose an epoch by, and to judge by."""
    images = data.load(spec, train=True)
    held = min(HELD, len(images.x) // 10)
    own = spec.partition(":")[0] in data.TORCHVISION and ":" in spec  # these layouts have test images
    others = data.load(spec, count=2 * held) if own else None
    rest = len(images.x) - held - (0 if own else 2 * held)
    train, validation = slice(0, rest), slice(rest, rest + held)
    test = (others.x, others.y) if others is not None else (images.x[rest + held :], images.y[rest + held :])
    return (*(TensorDataset(images.x[part], images.y[part]) for part in (train, validation)), TensorDataset(*test))


class Comparison:
    """The runs of all methods.

    Args:
        spec: of the images.
        seconds: that all of it may take.
        out: folder of the tables.
    """

    def __init__(self, spec: str, seconds: float, out: Path) -> None:
        self.end, self.out = time.monotonic() + seconds, out
        self.train, self.validation, self.test = split(spec)
        if len(self.train) < 4 * BATCH:
            raise SystemExit(f"{spec} leaves {len(self.train)} images to train on; name at least {8 * BATCH}")
        self.fabric = make(accelerator="gpu" if CUDA else "cpu", precision="bf16-mixed" if CUDA else "32-true")
        self.rows: list[tuple[Any, ...]] = []
        self.verdicts: list[tuple[str, ...]] = []

    def network(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = ResNet18() if self.train.tensors[0].shape[1] == 3 else SmallCNN()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def pace(self, method: str, scratch: Path) -> float:
        """Seconds of a step."""
        count, times = min(TRIED * BATCH, len(self.train)), []

        def progress(row: Mapping[str, float]) -> None:
            if CUDA:
                torch.cuda.synchronize()
            times.append(time.monotonic())

        few = TensorDataset(*(part[:count] for part in self.train.tensors))
        held = TensorDataset(*(part[:16] for part in self.validation.tensors))
        trainer = Trainer(self.fabric, recipe(method, 1), scratch / f"pace-{method}", tensorboard=False)
        trainer.fit(self.network(), few, held, progress=progress)
        steps = [after - before for before, after in pairwise(times[:-1])]  # the last is the epoch's
        return statistics.median(steps[len(steps) // 4 :])

    def run(self, scratch: Path) -> None:
        paces = {method: self.pace(method, scratch) for method in METHODS}
        fit = int(SHARE * (self.end - time.monotonic()) / sum(paces.values()))  # steps of each
        steps = len(self.train) // BATCH
        epochs = max(fit // steps, 1)
        if fit < steps:
            self.train = TensorDataset(*(part[: max(fit, 1) * BATCH] for part in self.train.tensors))
        each = ", ".join(f"{method} {1e3 * pace:.1f} ms a step" for method, pace in paces.items())
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        self.title = f"{name}, torch {torch.__version__}, {len(self.train)} images, {epochs} epochs: {each}"
        self.write()
        for method in METHODS:
            self.fit(method, epochs, scratch / method)

    def fit(self, method: str, epochs: int, folder: Path) -> None:
        began = time.monotonic()

        def progress(row: Mapping[str, float]) -> None:
            if "epoch" in row:
                natural, robust = row["validation_natural"], row["validation_robust"]
                values = (row["loss"], row["robust"], natural, robust, time.monotonic() - began)
                self.rows.append((method, int(row["epoch"]), *(round(value, 4) for value in values)))
                self.write()
                print(self.rows[-1], flush=True)
            if time.monotonic() > self.end:
                raise LateError

        model = self.network()
        trainer = Trainer(self.fabric, recipe(method, epochs), folder, tensorboard=False)
        try:
            best = trainer.fit(model, self.train, self.validation, progress=progress)
        except LateError:
            self.verdicts.append((method, f"cut after {len([r for r in self.rows if r[0] == method])} epochs", "", ""))
            self.write()
            return
        found = {"last": self.measured(model)}
        model.load_state_dict(load_weights(folder / BEST))
        found[f"best, epoch {best.epoch}"] = self.measured(model)
        for label, worth in found.items():
            self.verdicts.append((method, label, f"{100 * worth.natural:.1f}", f"{100 * worth.robust:.1f}"))
        self.write()

    def measured(self, model: torch.nn.Module) -> Robustness:
        return evaluate(self.fabric, model, self.test, recipe("msgd", 1).judge)

    def write(self) -> None:
        columns = ("method", "epoch", "loss", "training_robust", "natural", "robust", "seconds")
        write_text(self.out / "training.csv", csv_text(columns, self.rows))
        header = ("method", "weights", f"natural, % of {len(self.test)}", "robust, %")
        table = markdown(header, self.verdicts, words=2) if self.verdicts else "no run has ended"
        write_text(self.out / "training.md", f"{self.title}\n\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=235)
    parser.add_argument("--out", type=Path, default=Path("runs/cuda"))
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as scratch:
        Comparison(given.data, given.seconds, given.out).run(Path(scratch))


if __name__ == "__main__":
    main()
