"""PGD, PQGD, DAA-BLOB and BLOB_QG on adversarially trained models ([QG] Tables 2 and 4), on whole data sets.

    python -m firstorder.evaluation.studies.interaction --data DIR [--count 1000] [--seeds 5]

DIR is the root of torchvision's MNIST and FashionMNIST layouts. Both signs of the kernel's gradient are reported:
"-" is what the code of [DAA] does, and the default; "+" is [QG]'s Eq. 8.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST, FashionMNIST

from firstorder.attacks import BLOBQG, DAABLOB, PGD, PQGD, IterativeAttack
from firstorder.evaluation.names import packaged
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.reporting.terminal import bars, console, table, wrote
from firstorder.evaluation.runs.measure import predictions
from firstorder.evaluation.studies.population import attack_data
from firstorder.files import write_text

SETS = {"MNIST": (MNIST, packaged.mnist_cnn, 0.3), "Fashion-MNIST": (FashionMNIST, packaged.fashion_cnn, 0.2)}
"""Data set, model and radius by name."""


def contenders(eps: float, alpha: float, steps: int) -> dict[str, IterativeAttack]:
    """The attacks by the name they have in the table."""
    words = {"eps": eps, "alpha": alpha, "steps": steps}
    return {
        "PGD": PGD(**words),  # type: ignore[arg-type]
        "PQGD": PQGD(**words),  # type: ignore[arg-type]
        "BLOB -": DAABLOB(**words),  # type: ignore[arg-type]
        "BLOB_QG -": BLOBQG(**words),  # type: ignore[arg-type]
        "BLOB +": DAABLOB(**words, kernel_gradient="add"),  # type: ignore[arg-type]
        "BLOB_QG +": BLOBQG(**words, kernel_gradient="add"),  # type: ignore[arg-type]
    }


def images(cls: type[MNIST], root: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first test images (count, 1, 28, 28) in [0, 1] and their labels (count,)."""
    test = cls(root=root, train=False, download=False)
    return test.data[:count, None].float() / 255, test.targets[:count]


def main(
    data: Annotated[Path, typer.Option(help="Root of torchvision's MNIST and FashionMNIST layouts.")],
    dataset: Annotated[list[str] | None, typer.Option(help="MNIST, Fashion-MNIST; both by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of test images.")] = 1000,
    alpha: float = 0.01,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own starts and batches.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="The population.")] = 200,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table as CSV.")] = Path("runs/interaction"),
) -> None:
    """Print the accuracy under every attack: mean and spread of the runs, and all runs merged."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = dataset or list(SETS)
    unknown = set(chosen) - set(SETS)
    if unknown:
        raise typer.BadParameter(f"{unknown.pop()!r} is unknown; choose {' or '.join(SETS)}", param_hint="--dataset")
    lines, found = [], []
    with bars() as bar:
        total = len(chosen) * 6 * seeds * count * -(-steps // 10)
        task = bar.add_task("", total=total)
        for name in chosen:
            cls, load, eps = SETS[name]
            x, y = images(cls, data, count)
            model = load()
            clean = float((predictions(model, x) == y).double().mean())
            lines.append([name, "clean", f"{100 * clean:.2f}", "", "", ""])
            for label, attack in contenders(eps, alpha, steps).items():
                bar.update(task, description=f"{name}: {label}")
                merged = attack_data(
                    attack,
                    model,
                    TensorDataset(x, y),
                    batch_size=batch_size,
                    restarts=seeds,
                    progress=lambda n: bar.update(task, advance=n),
                )
                runs = [100 * float((~run).double().mean()) for run in merged.success]
                numbers = (statistics.mean(runs), min(runs), max(runs), 100 * merged.worst)
                lines.append([name, label, *[f"{number:.2f}" for number in numbers]])
                found += [(name, label, r, run / 100) for r, run in enumerate(runs)]
    path = out / "interaction.csv"
    write_text(path, csv_text(("data", "attack", "run", "accuracy"), found))
    header = ("data", "attack", "mean", "lowest", "highest", "worst (merged)")
    console.print(table(header, lines, title=f"accuracy, %: {count} images, {steps} steps, {seeds} runs", words=2))
    wrote([path])


if __name__ == "__main__":
    typer.run(main)
