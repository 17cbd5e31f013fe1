"""A verdict over a whole data set: its batches explored, then the closing stages once for all that is left."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstorder.attacks import Batched, Model, Verdict, VerdictResult
from firstorder.files import seals


@dataclass
class Parts:
    """The results of batches, with the state of the generator after each, in memory or in a folder.

    A process that is killed and called again takes those that are there and whole, and computes the others.

    Attributes:
        folder: where they are kept; None for nowhere.
    """

    folder: Path | None = None
    _count: int = field(default=0, init=False)

    def next(self, find: Callable[[], VerdictResult], generator: torch.Generator) -> VerdictResult:
        """What is kept of the next batch, or what `find` finds of it, on the CPU."""
        path = None if self.folder is None else self.folder / f"{self._count:05d}.pt"
        self._count += 1
        if path is not None and path.exists():
            saved = seals.load(path, name=path.stem)
            if saved is not None and saved.keys() == {"generator", *(f.name for f in fields(VerdictResult))}:
                generator.set_state(saved.pop("generator"))
                return VerdictResult(**saved)
            warnings.warn(f"{path} is damaged; what it held is computed anew", stacklevel=2)
        result = moved(find(), torch.device("cpu"))
        if path is not None:
            saved = {f.name: getattr(result, f.name) for f in fields(result)}
            seals.save(path, {**saved, "generator": generator.get_state()}, name=path.stem)
        return result

    def clear(self) -> None:
        """Remove the folder."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Population:
    """A data set under one verdict.

    Attributes:
        attack: the verdict; with `population` the closing stages are run once over all survivors, without it in
            every batch for every survivor.
        model: what is attacked.
        device: where batches are moved to.
        bs: examples per batch.
        parts: where results are kept meanwhile.
    """

    attack: Verdict
    model: Model
    device: torch.device
    bs: int
    parts: Parts

    def run(self, x: Tensor, y: Tensor, generator: torch.Generator) -> VerdictResult:
        """What the verdict finds of x (N, ...) with labels y (N,), on the CPU."""
        attack = self.attack.explore if self.attack.population else self.attack.run
        found = [
            self.parts.next(lambda a=a, b=b: attack(self.model, a, b, generator=generator), generator)  # type: ignore[misc]
            for a, b in self._batches(x, y)
        ]
        result = VerdictResult.joined(found)
        if not self.attack.population:
            return result
        left = (result.stage < 0).nonzero()[:, 0]
        return with_rows(result, left, self._closed(self.attack, x, y, result, left, generator))

    def reopened(self, x: Tensor, y: Tensor, found: VerdictResult, generator: torch.Generator) -> VerdictResult:
        """What the closing stages find of x (N, ...), all attacked to the end, beside what was found."""
        attack, every = replace(self.attack, population=False), torch.arange(len(x))
        results = [
            self.parts.next(lambda at=at: self._closed(attack, x, y, found, at, generator), generator)  # type: ignore[misc]
            for at in every.split(self.bs)
        ]
        return VerdictResult.joined(results)

    def _closed(
        self, attack: Verdict, x: Tensor, y: Tensor, found: VerdictResult, index: Tensor, generator: torch.Generator
    ) -> VerdictResult:
        """The closing stages for the examples at `index`."""
        if not len(index):
            return found.take(index)
        at = index.to(x.device)
        images, labels = x[at].to(self.device), y[at].to(self.device)
        before = moved(found.take(index), self.device)
        model = Batched(self.model, self.bs)
        return moved(attack.close(model, images, labels, before, generator=generator), torch.device("cpu"))

    def _batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(x.split(self.bs), y.split(self.bs), strict=True):
            yield images.to(self.device), labels.to(self.device)


def moved(result: VerdictResult, device: torch.device) -> VerdictResult:
    """The result with its tensors on a device."""
    return _changed(result, lambda name, value: value.to(device))


def with_rows(result: VerdictResult, index: Tensor, other: VerdictResult) -> VerdictResult:
    """`result` with the rows of another one at `index`."""
    return _changed(result, lambda name, value: value.index_copy(0, index, getattr(other, name)))


def spread(result: VerdictResult, index: Tensor, x: Tensor) -> VerdictResult:
    """The result of x[index] as one of all x (N, ...): of the others it says nothing."""
    blank: dict[str, Any] = {
        "adversarial": x,
        "success": False,
        "stage": -1,
        "margin": torch.nan,
        "logits": torch.nan,
        "complete": True,
    }

    def whole(name: str, value: Tensor) -> Tensor:
        fill = blank.get(name, 0)
        base = fill if isinstance(fill, Tensor) else value.new_full((len(x), *value.shape[1:]), fill)
        return base.index_copy(0, index, value)

    return _changed(result, whole)


def _changed(result: VerdictResult, change: Callable[[str, Tensor], Tensor]) -> VerdictResult:
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    changes: dict[str, Any] = {name: change(name, value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(result, **changes)
