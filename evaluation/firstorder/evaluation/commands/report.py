"""`firstorder report`: the report of a run of `firstorder evaluate`, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.reporting import comparison_page, leaderboard
from firstorder.evaluation.reporting.comparison import matches
from firstorder.evaluation.reporting.page import write
from firstorder.evaluation.reporting.terminal import refusing, say, wrote
from firstorder.evaluation.runs.store import Run, read

COMPARISON = Path("runs/comparison")


def report(
    run: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help=f"Folder of the report; RUN by default, of several {COMPARISON}.")
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(help="A=B: a model or attack that the first run calls A is compared with B of the others."),
    ] = None,
    model_info: Annotated[Path, typer.Option(help="RobustBench's model_info folder.")] = Path("model_info"),
) -> None:
    """Write the report of a run: a page that opens from disk, its text, and its figures; or compare runs.

    Of several runs: what they found on the same images, with paired differences, and what changed in the protocol.
    """
    with refusing():
        if len(run) > 1:
            runs = _named(run)
            wrote(comparison_page.write(runs, out or COMPARISON, matches(match or [], runs)))
            return
        if match:
            raise ValueError("--match is for several runs; name another one")
        found = _read(run[0])
        page, text, *others = write(found, out or run[0], info=leaderboard.model_info(found.facts, model_info))
    wrote((page, text))
    for folder in dict.fromkeys(path.parent for path in others):
        count = sum(path.parent == folder for path in others)
        say(f"wrote {count} files in {folder}")


def _read(folder: Path) -> Run:
    """The run in a folder, with a line on every damaged cell."""
    found = read(folder)
    for cell in found.damaged():
        line = f"damaged: {found.store.path(cell.key)}; firstorder evaluate --out {folder} computes it anew"
        say(line)
    return found


def _named(folders: list[Path]) -> dict[str, Run]:
    """The runs by the names of their folders, or by the paths where these are not distinct."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError("a run is named twice; name another one")
    return {name: _read(folder) for name, folder in zip(names, folders, strict=True)}
