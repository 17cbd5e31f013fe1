"""Which examples a step sees, and its random numbers: functions of the seed and of counters alone.

So a resumed run needs no state of any generator, and two processes that take one part of a batch each draw what one
process draws that takes both parts in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from firstorder.attacks import validation

Pairs = Dataset[Any]
"""Examples x and labels y by index, with a length; a `TensorDataset` is sliced, others are loaded one by one.

A data set whose examples lie in several files can say so, with attributes `groups`, the number of them in each file,
and `window`; see `Order`.
"""


class Purpose(IntEnum):
    """What random numbers are for: the second part of their key."""

    ORDER = 0
    STEP = 1
    JUDGE = 2
    DIAGNOSE = 3
    LAYERS = 4


def number(seed: int, purpose: Purpose, *counters: int) -> int:
    """A seed for one purpose at one point of a run."""
    return int(np.random.SeedSequence([seed, purpose, *counters]).generate_state(1, np.uint64)[0])


def generator(device: torch.device, seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """A generator for one purpose at one point of a run."""
    return torch.Generator(device).manual_seed(number(seed, purpose, *counters))


@contextmanager
def seeded(device: torch.device, seed: int, purpose: Purpose, *counters: int) -> Iterator[None]:
    """A context in which torch's global generators, which dropout uses, start at a seed; restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number(seed, purpose, *counters))
        yield


@dataclass(frozen=True, kw_only=True)
class Order:
    """How a set of examples is cut into steps: a new order every epoch, a last incomplete batch left out.

    Args:
        examples: how many there are.
        batch_size: examples a step.
        parts: equal parts of a batch, one for every process and accumulated backward.
        seed: of the order.
        groups: the numbers of examples that lie together, for data too large to be read in any order. The groups then
            follow one another in a random order, and within it every example is less than `window` places from its own:
            what a shuffle buffer does, without one.
        window: as above.

    Raises:
        ValueError: fewer examples than a batch; a batch that the parts do not divide.
    """

    examples: int
    batch_size: int
    parts: int = 1
    seed: int = 0
    groups: tuple[int, ...] = ()
    window: int = 1

    def __post_init__(self) -> None:
        validation.count("window", self.window)
        if self.groups and sum(self.groups) != self.examples:
            raise ValueError(f"groups hold {sum(self.groups)} examples, not {self.examples}; count all of them")
        validation.count("batch_size", self.batch_size)
        validation.count("parts", self.parts)
        if self.examples < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} exceeds the {self.examples} examples; lower it")
        if self.batch_size % self.parts:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into {self.parts} equal parts (processes x accumulate); "
                f"take a multiple of {self.parts}"
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.examples // self.batch_size

    def indices(self, epoch: int) -> Tensor:
        """The examples of every step and part of an epoch, (steps, parts, batch_size / parts)."""
        source = generator(torch.device("cpu"), self.seed, Purpose.ORDER, epoch)
        chosen = self._near(source) if self.groups else torch.randperm(self.examples, generator=source)
        return chosen[: self.steps * self.batch_size].reshape(self.steps, self.parts, -1)

    def _near(self, source: torch.Generator) -> Tensor:
        """All examples, those of a group near one another."""
        members = torch.arange(self.examples).split(list(self.groups))
        row = torch.cat([members[i] for i in torch.randperm(len(members), generator=source).tolist()])
        shifts = torch.rand(self.examples, generator=source, dtype=torch.float64) * self.window
        return row[(torch.arange(self.examples) + shifts).argsort(stable=True)]


def load(data: Pairs, batches: Sequence[Tensor], *, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples x (n, ...) and labels y (n,) of every batch of indices (n,).

    Args:
        data: the examples.
        batches: their indices.
        workers: processes that load examples; random transforms in them are seeded by torch's DataLoader.
    """
    if isinstance(data, TensorDataset):
        return (data[batch] for batch in batches)
    lists: Any = [batch.tolist() for batch in batches]
    return iter(DataLoader(data, batch_sampler=lists, num_workers=workers))


def size(data: Pairs) -> int:
    """The number of examples.

    Raises:
        ValueError: data without a length.
    """
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"the data, a {type(data).__name__}, have no length; pass a map-style data set") from None
