"""`firstorder train-cost`: what a step of adversarial training costs beyond the mean gradient's."""

from __future__ import annotations

from typing import Annotated

import typer

from firstorder.evaluation.bench.training import coupled_weights, prices
from firstorder.evaluation.reporting.terminal import console, refusing, table


def train_cost(
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the inner PGD.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds to take the median of.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 2,
) -> None:
    """Time and memory of an epoch, against the plain step.

    Of adversarial training with ENGM, N-ENGM and A-ENGM, on a ResNet-18.
    """
    with refusing():
        found = prices(batch_size=batch_size, steps=steps, rounds=rounds, threads=threads)
        weights = coupled_weights(batch_size=min(batch_size, 16))
    title = (
        f"a training step / MSGD's\nResNet-18, CIFAR-10 shapes, batch {batch_size}, PGD-{steps}, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
    header = ("method", f"time, median of {rounds}", "lowest", "highest", "peak memory")
    rows = [
        (p.time.name, f"{p.time.median:.3f}", f"{p.time.low:.3f}", f"{p.time.high:.3f}", f"{p.memory:.2f}")
        for p in found
    ]
    console.print(table(header, rows, title=title))
    gap = (weights["ignore"] - weights["exact"]).abs() / weights["exact"]
    console.print(
        f"weights through BatchNorm in training mode, coupling ignored / exact: relative difference "
        f"{100 * float(gap.mean()):.1f} % on average, {100 * float(gap.max()):.1f} % at most"
    )
