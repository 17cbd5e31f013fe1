"""The components of sign, quantised and raw gradients of a model ([QG], Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from firstorder.attacks import Quantised, TorchModel
from firstorder.evaluation.names import data as images
from firstorder.evaluation.names import models as networks
from firstorder.evaluation.reporting.paper_tables import Row, Table
from firstorder.evaluation.studies.measurements import Measured


def cut(gradients: Tensor, levels: int, limit: float) -> Tensor:
    """Gradients (N, D) quantised to `levels`, their components cut at what a step can use: at +-limit."""
    direction, _ = Quantised(levels=levels)(gradients, None, torch.empty_like(gradients))
    return direction.clamp_(-limit, limit)


def raw(gradients: Tensor, levels: int, limit: float) -> Tensor:
    """Gradients (N, D), each with a largest component of `levels`, cut likewise."""
    top = gradients.abs().amax(1, keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
    return (levels * gradients / top).clamp_(-limit, limit)


def measured(
    *,
    model: str,
    data: str,
    count: int | None = None,
    eps: float = 0.3,
    alpha: float = 0.01,
    levels: Sequence[int] = (100, 500, 1000),
    batch_size: int = 100,
) -> Measured:
    """What share of an image's components are +-1, and how much they are like the raw gradient's, by b.

    Args:
        model: its name.
        data: images, by their name.
        count: how many.
        eps, alpha: components are cut at +-eps / alpha, beyond which a step leaves the ball.
        levels: values of b, from small to large.
        batch_size: images at a time.
    """
    found = images.load(data, count=count)
    network = TorchModel(networks.ready(networks.load(model)))
    with network.preserved():
        parts = [
            network.gradient(x, y, None).gradient.flatten(1)
            for x, y in zip(found.x.split(batch_size), found.y.split(batch_size), strict=True)
        ]
    gradients = torch.cat(parts).double()
    gradients = gradients[(gradients != 0).any(1)]  # nothing is known where the loss is flat
    limit = eps / alpha
    shown = {"sign": cut(gradients, 1, limit)} | {f"b = {b}": cut(gradients, b, limit) for b in levels}
    shown["raw"] = raw(gradients, levels[-1], limit)
    rows = [row for name, values in shown.items() if name != "raw" for row in _rows(name, values, shown["raw"])]
    title = f"{model}, {len(gradients)} images of {found.name}"
    return Measured([Table(title, "%", tuple(rows), binary=False)], {"histograms": picture(shown, limit)})


def _rows(name: str, values: Tensor, like: Tensor) -> list[Row]:
    """Of components (N, D): the share of +-1 among those that are not 0, and of the most frequent other size; the
    correlation of their sizes with those of `like`, in percent.
    """
    sizes = values.abs().round().long()
    counts = torch.stack([torch.bincount(one, minlength=int(sizes.max()) + 1) for one in sizes]).double()
    shares = 100 * counts[:, 1:] / counts[:, 1:].sum(1, keepdim=True)
    other = shares[:, 1:].amax(1) if shares.shape[1] > 1 else torch.zeros(len(shares))
    return [
        Row(f"{name}, at ±1", shares[:, 0].numpy()),
        Row(f"{name}, most frequent other size", other.numpy()),
        Row(f"{name}, like the raw", 100 * _correlation(values.abs(), like.abs()).numpy()),
    ]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's (N,) of rows (N, D); 0 where one is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(1) / scale.clamp_min(1e-300), 0.0)


def picture(shown: dict[str, Tensor], limit: float) -> Figure:
    """A histogram of the components that are not 0, a panel for each rule."""
    figure = Figure(figsize=(3.2 * len(shown), 3.0), layout="constrained")
    panels: Any = figure.subplots(1, len(shown), sharey=True)
    bins = np.linspace(-limit - 0.5, limit + 0.5, 2 * int(limit) + 2)
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        axes.hist(values[values != 0].numpy(), bins=bins, color="#3b6fb6")
        axes.set(yscale="log", xlabel="component")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("how often")
    return figure
