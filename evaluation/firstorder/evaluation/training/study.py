"""Several runs of training side by side: variants of one configuration, with several seeds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firstorder.evaluation.names import documents
from firstorder.evaluation.names.documents import mistakes
from firstorder.evaluation.names.packaged import ASSETS
from firstorder.evaluation.reporting.paper_tables import Row, Table
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import Configuration, configure
from firstorder.evaluation.training.experiment import RESULT, Outcome, contents, load, run, trained_on
from firstorder.evaluation.training.measures import ACCURACIES, Trained, measure
from firstorder.fabric import make
from firstorder.files import replacing, write_text

PACKAGED = ASSETS / "engm_study.yaml"
"""The comparison of [ENGM], Table 2, at a size for two processor cores."""


class Study(BaseModel):
    """A study, as its YAML file says it.

    Attributes:
        seeds: of every variant.
        base: keys of the configuration that all share.
        variants: keys of each variant by its name.
        paper: natural accuracy, robust accuracy at the best and the last epoch, and overfitting, in percent, that a
            paper reports for a variant on its own data and network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[int, ...] = Field((0,), min_length=1)
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    paper: dict[str, tuple[float, float, float, float]] = {}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study."""

    variant: str
    folder: Path
    configuration: Configuration


def read(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        ValueError: a file that holds something else.
    """
    values, lines = documents.read(path)
    try:
        return Study(**values)
    except ValidationError as error:
        raise ValueError(mistakes(error, tuple(Study.model_fields), source=str(path), lines=lines)) from None


def cells(study: Study, out: Path, *, trust_code: bool = True, **base: Any) -> list[Cell]:
    """The runs of a study, each with its folder in `out`.

    Args:
        study: what is compared.
        out: folder of all runs.
        trust_code: as in `configure`.
        base: keys that override the study's.

    Raises:
        ValueError: a configuration that does not fit, or a folder in `out` with a run of another configuration.
    """
    found: list[Cell] = []
    for variant, own in study.variants.items():
        for seed in study.seeds:
            slug = "".join(c if c.isalnum() else "-" for c in variant.lower()).strip("-")
            cell = Cell(
                variant=variant,
                folder=out / f"{slug}-seed{seed}",
                configuration=configure(
                    {**study.base, **own, **base, "seed": seed}, source=variant, trust_code=trust_code
                ),
            )
            taken = next((other.variant for other in found if other.folder == cell.folder), None)
            if taken is not None:
                raise ValueError(
                    f"the variants {taken!r} and {variant!r} would share the folder {cell.folder}; rename one"
                )
            written = cell.folder / configurations.FILE
            if written.exists() and configure(documents.read(written)[0]) != cell.configuration:
                raise ValueError(f"{cell.folder} holds a run of another configuration; name another folder")
            if (cell.folder / RESULT).exists() and not written.exists():
                raise ValueError(
                    f"{cell.folder} holds {RESULT} without {configurations.FILE}; delete it, or name another folder"
                )
            found.append(cell)
    return found


def execute(
    chosen: Sequence[Cell], *, jobs: int = 1, threads: int = 1, progress: Callable[[Cell], None] | None = None
) -> list[tuple[Cell, Outcome]]:
    """Run what is not finished yet, on the processor, and load what is.

    Args:
        chosen: the runs.
        jobs: how many at a time, each in a process of its own.
        threads: for torch, of each.
        progress: called after every run.

    Raises:
        ValueError: a run is finished on other contents of the data that others are to be trained on.
    """
    _require_same_data(chosen)
    outcomes = []
    work = Parallel(n_jobs=jobs, return_as="generator")(delayed(_execute)(cell, threads) for cell in chosen)
    for cell, outcome in zip(chosen, work, strict=True):
        outcomes.append((cell, outcome))
        if progress is not None:
            progress(cell)
    return outcomes


def summary(outcomes: Sequence[tuple[Cell, Outcome]], paper: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """A row per variant, in percent: mean and standard deviation over the seeds, beside the paper's figures."""
    rows = [
        {
            "variant": cell.variant,
            "natural": 100 * outcome.best.natural,
            "best": 100 * outcome.best.robust,
            "last": 100 * outcome.last.robust,
            "overfitting": 100 * outcome.overfitting,
        }
        for cell, outcome in outcomes
    ]
    groups = pd.DataFrame(rows).groupby("variant", sort=False)
    table = pd.concat({"mean": groups.mean(), "deviation": groups.std(ddof=1).fillna(0.0)}, axis=1)
    table.columns = pd.Index([f"{name} {kind}" for kind, name in table.columns])
    for i, name in enumerate(("natural", "best", "last", "overfitting")):
        table[f"{name} paper"] = [paper[variant][i] if variant in paper else None for variant in table.index]
    return table


def table(outcomes: Sequence[tuple[Cell, Outcome]], measures: Sequence[str] = tuple(ACCURACIES)) -> Table:
    """Measures of every variant, a value for each seed: rows "ENGM, last".

    Raises:
        ValueError: a measure that the runs do not have.
    """
    found: dict[str, list[float]] = {}
    for cell, outcome in outcomes:
        for name in measures:
            value = measure(name, Trained(cell.configuration, cell.folder, outcome))
            found.setdefault(f"{cell.variant}, {name}", []).append(value)
    configuration = outcomes[0][0].configuration
    title = f"{configuration.model} on {configuration.data.partition(':')[0]}, {len(next(iter(found.values())))} seeds"
    rows = tuple(Row(name, np.array(values)) for name, values in found.items())
    return Table(title, "accuracy, %" if set(measures) <= set(ACCURACIES) else "value", rows, binary=False)


def write(table: pd.DataFrame, outcomes: Sequence[tuple[Cell, Outcome]], out: Path) -> list[Path]:
    """Write the table (Markdown and CSV) and a picture of it into `out`."""
    rows = ((variant, *row) for variant, row in zip(table.index, table.to_numpy(object), strict=True))
    write_text(out / "study.csv", csv_text(("variant", *table.columns), rows))
    write_text(out / "study.md", markdown(table, outcomes))
    figure = picture(table)
    with replacing(out / "study.png") as temporary:
        figure.savefig(temporary, dpi=150)
    return [out / name for name in ("study.md", "study.csv", "study.png")]


def markdown(table: pd.DataFrame, outcomes: Sequence[tuple[Cell, Outcome]]) -> str:
    """The table as Markdown, with the protocol above it."""
    configuration, outcome = outcomes[0][0].configuration, outcomes[0][1]
    names = ("natural", "best", "last", "overfitting")
    header = "| | natural | robust, best | robust, last | overfitting | paper: natural / best / last / overfitting |"
    lines = [header, "|---|---|---|---|---|---|"]
    for variant, row in table.iterrows():
        ours = [f"{row[f'{name} mean']:.1f} ± {row[f'{name} deviation']:.1f}" for name in names]
        theirs = [row[f"{name} paper"] for name in names]
        paper = "" if pd.isna(theirs[0]) else " / ".join(f"{value:g}" for value in theirs)
        lines.append(f"| {str(variant).replace('|', chr(92) + '|')} | {' | '.join(ours)} | {paper} |")
    runs = len(outcomes) // len(table)
    protocol = (
        f"{configuration.data.partition(':')[0]}, {configuration.model}, eps = {configuration.eps:.4g}, "
        f"{configuration.epochs} epochs; accuracy in percent on {outcome.count} {outcome.images} images, robust under "
        f"PGD-{configuration.judge_steps} with the margin loss; mean and standard deviation of {runs} seeds. The "
        "paper's figures are for its own data and network."
    )
    return f"{protocol}\n\n" + "\n".join(lines) + "\n"


def picture(table: pd.DataFrame) -> Figure:
    """Robust accuracy at the best and the last epoch of every variant."""
    figure = Figure(figsize=(7.6, 1.2 + 0.42 * len(table)), layout="constrained")
    axes = figure.subplots()
    for i, (_, row) in enumerate(table.iterrows()):
        best, last = row["best mean"], row["last mean"]
        axes.plot([last, best], [i, i], color="#8a8f98", linewidth=2, zorder=1)
        for value, name, color in ((best, "best", "#3b6fb6"), (last, "last", "#c2571a")):
            axes.errorbar(
                value, i, xerr=row[f"{name} deviation"], fmt="o", color=color, capsize=3,
                label=f"{name} epoch" if i == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(table)), [str(name) for name in table.index])
    axes.invert_yaxis()
    axes.set_xlabel("robust accuracy, % (mean and standard deviation over seeds)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _require_same_data(chosen: Sequence[Cell]) -> None:
    """Refuse finished runs whose data are others by now, where there is something left to train on them."""
    finished = [cell for cell in chosen if (cell.folder / RESULT).exists()]
    now: dict[tuple[object, ...], dict[str, str]] = {}
    for cell in finished if len(finished) < len(chosen) else ():
        before, own = trained_on(cell.folder), cell.configuration
        key = (own.data, own.test, own.examples, own.test_examples, own.validation, own.window)
        if before and key not in now:
            train, validation, test, _ = parts.splits(own)
            now[key] = contents(train, validation, test)
        other = [name for name in before if before[name] != now[key].get(name)]
        if other:
            raise ValueError(
                f"{cell.folder} is of other {' and '.join(other)} images than are there now; put those back, or name "
                "another folder with --out"
            )


def _execute(cell: Cell, threads: int) -> Outcome:
    if (cell.folder / RESULT).exists():
        return load(cell.folder)
    torch.set_num_threads(threads)
    return run(cell.configuration, cell.folder, make(accelerator="cpu"), resume=True, tensorboard=False)
