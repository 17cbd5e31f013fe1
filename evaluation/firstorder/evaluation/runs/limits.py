"""What others know of examples: proven robust, or broken, within a radius."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.runs.cells import RELATIVE

COLUMNS = ("example", "eps", "proven", "broken")
"""Of the file."""


class Limit(NamedTuple):
    """That an example is proven robust within a radius, or broken there, or neither."""

    example: int
    eps: float
    proven: bool
    broken: bool


@dataclass(frozen=True)
class Limits:
    """Those of the examples of a run, by their place in it."""

    rows: tuple[Limit, ...]

    @classmethod
    def of(cls, values: Sequence[Sequence[Any]]) -> Limits:
        """The limits of plain values."""
        return cls(tuple(Limit(*row) for row in values))

    def plain(self) -> list[list[Any]]:
        """The limits in plain values."""
        return [list(row) for row in self.rows]

    def proven(self, eps: float) -> list[int]:
        """The examples that are proven robust within a radius: at this or a larger one."""
        return [row.example for row in self.rows if row.proven and row.eps >= eps * (1 - RELATIVE)]

    def broken(self, eps: float) -> list[int]:
        """The examples that are broken within a radius: at this or a smaller one."""
        return [row.example for row in self.rows if row.broken and row.eps <= eps * (1 + RELATIVE)]


def read(path: str, *, skip: int, count: int) -> Limits:
    """The limits in a CSV file, of `count` images after the first `skip`.

    Args:
        path: with the columns example (the image's place in the data, from 0), eps (as 0.1 or 8/255), proven and
            broken (0 or 1).
        skip, count: which images a run has.

    Raises:
        ValueError: a file that cannot be read, that lacks a column or has other values, that contradicts itself, or of
            none of these images.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"limits={path}: no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
            rows = [(reader.line_num, _limit(path, reader.line_num, row)) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"limits={path} cannot be read: {error}; name a CSV file") from None
    _agree(path, rows)
    chosen = (row for _, row in rows if skip <= row.example < skip + count)
    found = tuple(row._replace(example=row.example - skip) for row in chosen)
    if not found:
        raise ValueError(f"limits={path} is about none of the images {skip} to {skip + count - 1}; name another file")
    return Limits(found)


def _limit(path: str, line: int, row: dict[str, Any]) -> Limit:
    try:
        flags = [{"0": False, "1": True}[row[name]] for name in ("proven", "broken")]
        found = Limit(int(row["example"]), float(radius(row["eps"])), *flags)
        if found.example < 0:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"limits={path}, line {line}: {dict(row)} is no limit; write a whole number from 0, a radius, and 0 or 1"
        ) from None
    if found.proven and found.broken:
        raise ValueError(f"limits={path}, line {line}: both proven and broken; leave out one of them")
    return found


def _agree(path: str, rows: Sequence[tuple[int, Limit]]) -> None:
    """Refuse rows, each with its line, that have an example both proven at a radius and broken within it."""
    proven: dict[int, tuple[int, Limit]] = {}
    for line, row in rows:
        if row.proven and (row.example not in proven or row.eps > proven[row.example][1].eps):
            proven[row.example] = line, row
    for line, row in rows:
        if not row.broken or row.example not in proven:
            continue
        other, known = proven[row.example]
        if row.eps * (1 - RELATIVE) <= known.eps * (1 + RELATIVE):
            raise ValueError(
                f"limits={path}: example {row.example} is proven at {known.eps:g} in line {other} and broken at "
                f"{row.eps:g} in line {line}; leave out one of them"
            )
