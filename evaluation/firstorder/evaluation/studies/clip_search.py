"""The clip of clipped NGM ([NGM] Alg. 1): a grid over its scope, alpha and gamma, and other images.

    python -m firstorder.evaluation.studies.clip_search --data DIR [--search 60] [--check 140]

Examples are made on EfficientNet-Lite0 and tried on Lite1 and Lite2 (extra `imagenet`). The grid is searched on the
first images that all three classify correctly; the best of either scope, the text's clip and MI-FGSM are then tried
on the next ones. DIR is a folder of pictures with labels.json. Finished cells are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from firstorder.evaluation import evaluate
from firstorder.evaluation.names import models
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.reporting.terminal import bars, console, table, wrote
from firstorder.evaluation.reporting.transfer_outcomes import average, outcomes
from firstorder.evaluation.runs.computing import Engine
from firstorder.files import replacing, write_text

EPS = 8 / 255
"""Where the differences are not hidden by the ceiling."""
LITE0_LENGTH = 18 * (8 / 16)
"""[NGM]'s alpha at EPS on 299 x 299 x 3 images: the default under the clip of a whole example."""

PAPER = "clipped-ngm"
"""The text's clip, with the alpha that goes with it."""

GRID = {
    "example": ([LITE0_LENGTH * factor for factor in (0.25, 0.5, 1, 2)], (0.4, 0.8, 1.6)),
    "element": ([EPS * factor for factor in (1.5, 4.5, 13.5)], (0.03, 0.1, 0.3)),
}
"""The values of alpha and gamma that are tried, by the clip's scope."""


def label(scope: str, alpha: float, gamma: float) -> str:
    """The attack at a point of the grid, on one line."""
    return f'clipped-ngm:alpha={round(alpha, 6):g},gamma={gamma:g},scope="{scope}"'


def picture(surface: Mapping[tuple[str, float, float], float], path: Path) -> Path:
    """Mean black-box success over the grid, a panel per scope."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(GRID))
    for axes, (scope, (alphas, gammas)) in zip(panels, GRID.items(), strict=True):
        values = [[surface[scope, alpha, gamma] for gamma in gammas] for alpha in alphas]
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        unit = 1.0 if scope == "example" else EPS
        axes.set_yticks(range(len(alphas)), [f"{alpha / unit:g}" + " ε" * (unit == EPS) for alpha in alphas])
        axes.set(xlabel="γ", ylabel="α", title=f"clip per {scope}")
        axes.tick_params(length=0)
    figure.colorbar(image, ax=panels, label="mean black-box success, %")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def main(
    data: Annotated[str, typer.Option(help="Folder of pictures with labels.json.")],
    search: Annotated[int, typer.Option(min=1, help="Images to search the grid on.")] = 60,
    check: Annotated[int, typer.Option(min=1, help="Other images.")] = 140,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the surface and the runs.")] = Path("runs/clip"),
) -> None:
    """Print, draw and write the surface, and what its best points do on other images."""
    points = [(scope, alpha, gamma) for scope, (alphas, gammas) in GRID.items() for alpha in alphas for gamma in gammas]
    rivals = ["mi-fgsm", "ngm", PAPER]
    here = _success(data, 0, search, [*rivals, *(label(*point) for point in points)], out / "searched", threads)
    surface = {point: here[label(*point)] for point in points}
    best = [max((p for p in points if p[0] == scope), key=lambda p: (round(surface[p], 6), p[2])) for scope in GRID]
    rivals += [label(*point) for point in best]
    there = _success(data, search, check, rivals, out / "other", threads)
    tried = [(rival, here[rival], there[rival]) for rival in rivals]
    _show(tried, (search, check))
    rows = ((*point, value) for point, value in surface.items())
    write_text(out / "surface.csv", csv_text(("scope", "alpha", "gamma", "success"), rows))
    wrote([out / "surface.csv", picture(surface, out / "surface.png")])


def _success(
    data: str, skip: int, count: int, attacks: Sequence[str], out: Path, threads: int | None
) -> dict[str, float]:
    """Mean black-box success in percent of every attack, T = 10, on images that all networks classify correctly."""
    specification = {
        "models": list(models.LITE),
        "sources": "efficientnet-lite0",
        "transfer": True,
        "data": data,
        "select": "all-correct",
        "skip": skip,
        "count": count,
        "eps": EPS,
        "attacks": list(dict.fromkeys(attacks)),
        "steps": 10,
        "batch_size": 20,
        "pictures": 0,
        "diagnose": False,
    }
    with bars() as bar:
        task = bar.add_task(out.name, total=None)
        engine = Engine(threads=threads)
        found = evaluate(specification, out, engine=engine, computed=lambda report: bar.update(task, advance=1))
    return {one.attack: 100 * (average(one) or 0.0) for one in outcomes(found.run)}


def _show(tried: Sequence[tuple[str, float, float]], counts: Sequence[int]) -> None:
    header = ("attack", f"searched on {counts[0]}", f"tried on {counts[1]}")
    rows = [(name, f"{here:.1f}", f"{there:.1f}") for name, here, there in tried]
    console.print(table(header, rows, title="mean black-box success, %, ε = 8/255, T = 10"))


if __name__ == "__main__":
    typer.run(main)
