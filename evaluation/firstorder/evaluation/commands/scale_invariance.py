"""`firstorder scale-invariance`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.names import data as datasets
from firstorder.evaluation.names import models, packaged
from firstorder.evaluation.reporting.terminal import bars, console, refusing, table, wrote
from firstorder.evaluation.studies import scale_invariance as scales

MODELS = ("mnist-cnn", "cifar10-resnet18")


def scale_invariance(
    model: Annotated[list[str] | None, typer.Option(help="Models by name.")] = None,
    data: Annotated[
        str | None, typer.Option(help="mnist, cifar10, an .npz file or a folder; a packaged model brings its own.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per model.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("runs/scale-invariance"),
) -> None:
    """A model's loss against the scale of its input.

    From 0.1 to 2.0: what scale copies rest on.
    """
    names = model or list(MODELS)
    curves = []
    with refusing():
        makers = {name: models.finder(name) for name in names}
        own = {name: entry for name, entry in packaged.MODELS.items() if entry.data}
        if data is None and (strangers := [name for name in names if name not in own]):
            raise ValueError(f"{', '.join(strangers)} brings no images; name some with --data")
        with bars() as bar:
            task = bar.add_task("", total=len(names))
            for name, make in makers.items():
                bar.update(task, description=name)
                images = datasets.load(data, count=count) if data else own[name].images()
                curves.append(scales.curve(name, models.ready(make()), images.x[:count], images.y[:count]))
                bar.update(task, advance=1)
    shown = [i for i, scale in enumerate(scales.SCALES) if scale in (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)]
    header = ("model", *(f"{scales.SCALES[i]:g}" for i in shown))
    rows = [(curve.model, *(f"{curve.loss[i]:.3f}" for i in shown)) for curve in curves]
    console.print(table(header, rows, title="mean cross-entropy at scale s"))
    wrote([*scales.write(curves, out), scales.picture(curves, out / "scale_invariance.png")])
