"""The loss of a model against the scale of its input ([NI] Lin et al. 2020, arXiv 1908.06281, Fig. 1).

[NI] averages gradients over copies x / 2^i because a model's loss hardly changes between them. This
measures how far that holds: the mean cross-entropy and the accuracy at s * x for every scale s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from firstorder.attacks import predicted, preserved
from firstorder.evaluation.reporting.tables import csv_text
from firstorder.files import replacing, write_text

SCALES = tuple(i / 10 for i in range(1, 21))
"""[NI]'s scales, 0.1 to 2.0."""
COLORS = ("#3b6fb6", "#c2571a", "#1b7f3b", "#7b4fa3", "#b3261e", "#8a8f98")
"""The models' lines, solid at first, then dashed and dotted."""
TINY = 1e-6
"""The least loss that the picture's logarithmic axis shows."""


@dataclass(frozen=True, kw_only=True)
class ScaleCurve:
    """One model's loss and accuracy at every scale.

    Attributes:
        model: the model's name.
        scales: factors of the input, shape (S,).
        loss: mean cross-entropy in nats, shape (S,).
        accuracy: share of correct predictions, shape (S,).
    """

    model: str
    scales: Tensor
    loss: Tensor
    accuracy: Tensor


def curve(
    name: str,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    scales: Sequence[float] = SCALES,
    batch_size: int = 50,
) -> ScaleCurve:
    """The curve of `model`, to be called `name`, on images x (N, C, H, W) with labels y (N,).

    s * x is not clipped to the bounds, as in the paper. A module is run in evaluation mode and left as it was.

    Raises:
        ValueError: no image, no scale, or a number of labels other than of images.
    """
    if not len(x) or len(x) != len(y):
        raise ValueError(f"there are {len(x)} images and {len(y)} labels; pass one label per image, one image or more")
    if not len(scales):
        raise ValueError("scales is empty; pass at least one factor of the input")
    loss = torch.zeros(len(scales), dtype=torch.float64)
    correct = torch.zeros(len(scales), dtype=torch.float64)
    with torch.no_grad(), preserved(model) if isinstance(model, nn.Module) else nullcontext():
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            for i, scale in enumerate(scales):
                logits = model(scale * images)
                loss[i] += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
                correct[i] += int((predicted(logits) == labels).sum())
    factors = torch.tensor(scales, dtype=torch.float64)
    return ScaleCurve(model=name, scales=factors, loss=loss / len(x), accuracy=correct / len(x))


def losses(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    scales: Sequence[float] = SCALES,
    batch_size: int = 50,
) -> Tensor:
    """The mean cross-entropy (S,) alone, see `curve`."""
    return curve("", model, x, y, scales=scales, batch_size=batch_size).loss


def write(curves: Sequence[ScaleCurve], out: Path) -> list[Path]:
    """Write scale_invariance.csv with a row per model and scale to `out`; returns the path."""
    rows = (
        (c.model, *row)
        for c in curves
        for row in zip(c.scales.tolist(), c.loss.tolist(), c.accuracy.tolist(), strict=True)
    )
    path = out / "scale_invariance.csv"
    write_text(path, csv_text(("model", "scale", "loss", "accuracy"), rows))
    return [path]


def picture(curves: Sequence[ScaleCurve], path: Path) -> Path:
    """Loss, logarithmic, and accuracy against the scale, a line per model; scale 1 is marked."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for i, c in enumerate(curves):
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": "o", "markersize": 3, "label": c.model}
        style["linestyle"] = ("-", "--", ":")[i // len(COLORS) % 3]
        panels[0].plot(c.scales, c.loss.clamp_min(TINY), **style)
        panels[1].plot(c.scales, 100 * c.accuracy, **style)
    panels[0].set(yscale="log", ylabel="mean cross-entropy, nats")
    panels[1].set(ylim=(0, 102), ylabel="accuracy, %")
    for axes in panels:
        axes.axvline(1.0, color="#8a8f98", linestyle="--", linewidth=1.0, zorder=0)
        axes.set_xlabel("scale of the input")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=panels[0].get_legend_handles_labels()[0], loc="outside right center", frameon=False, fontsize=9
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
