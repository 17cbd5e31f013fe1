"""Several models attacked as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks import validation

Side = int | tuple[int, int] | None
"""The (height, width) a model wants its images resized to, one number for both; None for as they are."""


class Ensemble(nn.Module):
    """The weighted mean of the logits of several models, a module like any other: sum_k w_k l_k(x) ([MI], Sec. 3.3).

    Args:
        models: callables from images (N, C, H, W) to logits (N, K) over the same K classes.
        weights: one per model, at least 0, not all 0; scaled to sum to 1. Equal by default.
        sizes: what each model's images are resized to first (bilinear).

    Attributes:
        member: of the models the one whose logits alone are given in a context of `only`, None outside.

    Raises:
        ValueError: no models, or weights or sizes that do not fit them.
    """

    def __init__(
        self,
        models: Sequence[Callable[[Tensor], Tensor]],
        *,
        weights: Sequence[float] | None = None,
        sizes: Sequence[Side] | None = None,
    ) -> None:
        super().__init__()
        shares = [1.0] * len(models) if weights is None else list(weights)
        if not models:
            raise ValueError("an ensemble needs at least one model; models is empty")
        for name, values in (("weights", shares), ("sizes", sizes)):
            if values is not None and len(values) != len(models):
                raise ValueError(f"there are {len(models)} models but {len(values)} {name}; give one for each")
        for share in shares:
            validation.number("weights", share, low=0)
        if not sum(shares):
            raise ValueError(f"weights={shares!r} are all 0; at least one must be positive")
        modules = [model for model in models if isinstance(model, nn.Module)]
        places = iter(range(len(modules)))
        self._members = tuple(next(places) if isinstance(model, nn.Module) else model for model in models)
        self._sizes = tuple(sizes) if sizes is not None else (None,) * len(models)
        self._shares = tuple(share / sum(shares) for share in shares)
        self.member: int | None = None
        self.models = nn.ModuleList(modules)

    def __len__(self) -> int:
        return len(self._members)

    @contextmanager
    def only(self, member: int) -> Iterator[None]:
        """A context in which the logits are those of one of the models alone, counted from 0, without its weight."""
        before, self.member = self.member, member
        try:
            yield
        finally:
            self.member = before

    def forward(self, x: Tensor) -> Tensor:
        """The averaged logits (N, K) of images x (N, C, H, W)."""
        if self.member is not None:
            return self._scores(self.member, x)
        total: Tensor | None = None
        for member, share in enumerate(self._shares):
            scores = self._scores(member, x) * share
            if total is not None and total.shape != scores.shape:
                raise ValueError(f"the models' logits differ in shape: {tuple(total.shape)} and {tuple(scores.shape)}")
            total = scores if total is None else total + scores
        assert total is not None
        return total

    def _scores(self, member: int, x: Tensor) -> Tensor:
        """The logits (N, K) of one of the models."""
        model, size = self._members[member], self._sizes[member]
        called = self.models[model] if isinstance(model, int) else model
        scores: Tensor = called(x if size is None else resized(x, size))
        return scores


def ensembles(module: nn.Module | None) -> Iterator[Ensemble]:
    """The ensembles among the parts of a module, the outermost first."""
    return (part for part in (() if module is None else module.modules()) if isinstance(part, Ensemble))


def resized(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Images x (N, C, H, W) at another size, bilinear."""
    sides = (size, size) if isinstance(size, int) else size
    return x if x.shape[2:] == torch.Size(sides) else F.interpolate(x, size=sides, mode="bilinear", align_corners=False)
