"""PGD against PQGD ([QG] Fig. 4): accuracy of the packaged MNIST model under both.

    python -m firstorder.evaluation.studies.quantisation [--data DIR] [--count 1000]

Without --data the packaged 500 images are used; DIR is the root of torchvision's MNIST layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torchvision.datasets import MNIST

from firstorder.attacks import PGD, PQGD, IterativeAttack
from firstorder.evaluation.names import packaged
from firstorder.evaluation.reporting.terminal import console, table
from firstorder.evaluation.runs.measure import measure, predictions


def main(
    data: Annotated[Path | None, typer.Option(help="Root of torchvision's MNIST layout.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of test images.")] = 1000,
    eps: float = 0.3,
    alpha: float = 0.01,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Random starts to average over.")] = 3,
) -> None:
    """Print the accuracy under PGD and under PQGD for several numbers of levels."""
    images = packaged.mnist()
    x, y = images.x, images.y
    if data is not None:
        test = MNIST(root=data, train=False, download=False)
        x, y = test.data[:, None].float() / 255, test.targets
    x, y, model = x[:count], y[:count], packaged.mnist_cnn()
    contenders: dict[str, IterativeAttack] = {"PGD": PGD(eps=eps, alpha=alpha, steps=steps, early_stop=True)}
    for b in (1, 10, 100, 200, 500, 1000):
        contenders[f"PQGD b={b}"] = PQGD(eps=eps, alpha=alpha, steps=steps, b=b, early_stop=True)
    clean = 100 * float((predictions(model, x) == y).float().mean())
    rows = []
    for name, attack in contenders.items():
        values = [100 * float(measure(attack, model, x, y, seed=s).correct.float().mean()) for s in range(seeds)]
        rows.append([name, f"{sum(values) / seeds:.2f}", f"{min(values):.1f}", f"{max(values):.1f}"])
    title = f"{len(x)} MNIST images, clean {clean:.1f} %, ε = {eps:g}, α = {alpha:g}, {steps} steps"
    header = ("attack", f"accuracy %, mean of {seeds} seeds", "lowest", "highest")
    console.print(table(header, rows, title=title))


if __name__ == "__main__":
    typer.run(main)
