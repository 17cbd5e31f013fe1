"""A run cut into cells, each with a key made of everything that determines what it finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FORMAT = 5
"""Of the files of cells; a part of every key."""

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""How much larger than the radius rounding may make a perturbation."""


class Cell(NamedTuple):
    """One attack on some of the examples, or what goes on from such cells.

    Attributes:
        key: its name in the store.
        model: that the examples are made on: a model's name in the run, or A+B.
        attack: the attack's name in the run.
        eps: the radius; None for a minimum-norm attack, which serves every radius.
        seed: of its random draws.
        start, stop: the examples, by their place among the run's.
        phase: of an attack that has several, see `verdicts`; empty for the first.
        after: keys of the cells that it goes on from. Its rows are in the place of theirs.
    """

    key: str
    model: str
    attack: str
    eps: float | None
    seed: int
    start: int
    stop: int
    phase: str = ""
    after: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Cell:
        """The cell of plain values, as `plain` and JSON have them."""
        return cls(**{**values, "after": tuple(values.get("after", ()))})

    def plain(self) -> dict[str, Any]:
        """The cell in plain values."""
        return {**self._asdict(), "after": list(self.after)}


def last(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that no other one goes on from: those whose rows are the run's."""
    found = list(cells)
    passed = {key for cell in found for key in cell.after}
    return [cell for cell in found if cell.key not in passed]


def digest(facts: Mapping[str, Any]) -> str:
    """A name for plain values: the same values have the same name, in another process too."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
