"""Some examples of a run as a figure, for texts and pages without a script."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from firstorder.attacks import UNDECIDED
from firstorder.evaluation.reporting.figures import Picture, picture_chart
from firstorder.evaluation.reporting.gallery import two_digits
from firstorder.evaluation.reporting.summary import Score
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, last
from firstorder.evaluation.runs.store import Run

PICTURED = ["target", "attack", "linf", "l2", "example", "label", "clean_label", "adversarial_label", "adversarial"]


def stills(
    run: Run, score: Score, *, most: int = 4, attacks: int = 3, width: float | None = None
) -> tuple[Figure, float] | None:
    """At most `most` pictured examples under the strongest attacks on a model at a radius.

    Those that most of these attacks broke come first, and those that are misclassified as they are last.

    Args:
        run: finished or not.
        score: of the model at the radius.
        most, attacks: how many are shown.
        width: of the figure, in inches; by default as wide as its columns are.

    Returns:
        the figure, and by how much differences are magnified; None where no picture is kept.
    """
    shape = tuple(run.facts["data"]["shape"])
    kept = _kept(run, score) if len(shape) == 3 and shape[0] in (1, 3) else pd.DataFrame()
    if kept.empty:
        return None
    strongest = [result.attack for result in score.attacks if (kept["attack"] == result.attack).any()][:attacks]
    shown = kept[kept["attack"].isin(strongest)]
    ranked = shown.groupby("example").agg(right=("right", "first"), broken=("broken", "sum"), count=("attack", "size"))
    order = ["right", "broken", "count", "example"]
    chosen = ranked.reset_index().sort_values(order, ascending=[False, False, False, True])["example"][:most]
    shown = shown[shown["example"].isin(chosen)]
    strongest = [attack for attack in strongest if (shown["attack"] == attack).any()]
    classes, grid = run.facts["data"]["classes"], list[list[Picture | None]]()
    for example in sorted(chosen):
        original = run.examples(int(example), int(example) + 1)[0].numpy()
        own = {row.attack: row for row in shown[shown["example"] == example].itertuples()}
        grid.append([_picture(own[a], original, classes) if a in own else None for a in strongest])
    largest = max(float(np.abs(p.image - p.original).max()) for line in grid for p in line if p is not None)
    factor = two_digits(0.5 / largest) if largest else 1.0
    return picture_chart(grid, factor, width=width), factor


def _kept(run: Run, score: Score) -> pd.DataFrame:
    """The rows with a picture, of the model at the radius, one for every example and attack."""
    parts = []
    own = tuple(cell for cell in last(run.cells) if cell.model == score.model and cell.eps in (score.eps, None))
    for table in replace(run, cells=own).tables(PICTURED):
        part = table.filter(table["adversarial"].is_valid()).to_pandas()
        parts.append(part[part["target"] == score.model])
    kept = pd.concat(parts).drop_duplicates(["example", "attack"])
    within = kept[run.facts["specification"]["norm"].lower()] <= score.eps * (1 + RELATIVE) + ABSOLUTE
    broken = within & (kept["label"] != kept["adversarial_label"])
    return kept.assign(right=kept["label"] == kept["clean_label"], broken=broken)


def _picture(row: Any, original: np.ndarray[Any, Any], classes: list[str]) -> Picture:
    image = np.frombuffer(row.adversarial, dtype="<f4").reshape(original.shape)
    labels = (_class(label, classes) for label in (row.label, row.clean_label, row.adversarial_label))
    return Picture(row.attack, original, image, *labels)


def _class(label: int, classes: list[str]) -> str:
    if label == UNDECIDED:
        return "NaN"
    return classes[label] if label < len(classes) else str(label)
