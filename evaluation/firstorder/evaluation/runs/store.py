"""The folder of a run: its facts, and a file for every finished cell.

    run.json            what the run is: specification, models, data, attacks, versions, the list of cells
    cells/KEY.parquet   rows of examples, see `columns`
    failures/KEY.json   why a cell failed
    doubts/KEY.json     what looked wrong while a cell was computed, where something did
    data/               the examples

Files are complete or absent, and a cell's name says everything that determines it: processes that share a folder can
at worst do the same work twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from firstorder.evaluation.runs import examples
from firstorder.evaluation.runs.cells import FORMAT, Cell
from firstorder.evaluation.runs.columns import schema
from firstorder.files import replacing, write_text

FACTS = "run.json"


class Failure(NamedTuple):
    """A cell that could not be computed."""

    cell: Cell
    error: str


@dataclass(frozen=True)
class Store:
    """The folder of a run."""

    folder: Path

    @property
    def data(self) -> Path:
        """Where the examples are."""
        return self.folder / "data"

    def path(self, key: str) -> Path:
        """Where the cell called `key` is kept."""
        return self.folder / "cells" / f"{key}.parquet"

    def done(self, key: str) -> bool:
        """Whether the cell is finished."""
        return self.path(key).exists()

    def load(self, key: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of a finished cell; `columns` of `schema()`, by default all."""
        frame: pd.DataFrame = pq.read_table(self.path(key), columns=columns and list(columns)).to_pandas()
        return frame

    def save(self, cell: Cell, table: pa.Table, doubts: Sequence[str] = ()) -> None:
        """Keep a finished cell and what looked wrong in it; what was recorded of its failures is dropped."""
        if doubts:
            write_text(self._doubts(cell.key), json.dumps({"cell": cell._asdict(), "doubts": list(doubts)}, indent=2))
        with replacing(self.path(cell.key)) as temporary:
            pq.write_table(table.cast(schema()), temporary, compression="zstd")
        self._failure(cell.key).unlink(missing_ok=True)

    def fail(self, cell: Cell, error: str) -> None:
        """Record why a cell failed."""
        write_text(self._failure(cell.key), json.dumps({"cell": cell._asdict(), "error": error}, indent=2) + "\n")

    def doubts(self, key: str) -> list[str]:
        """What looked wrong while the cell was computed."""
        try:
            return list(json.loads(self._doubts(key).read_text(encoding="utf-8"))["doubts"])
        except FileNotFoundError:
            return []

    def failure(self, key: str) -> str | None:
        """Why the cell failed when it was last tried; None where it did not."""
        try:
            return str(json.loads(self._failure(key).read_text(encoding="utf-8"))["error"])
        except FileNotFoundError:
            return None

    def write(self, facts: dict[str, Any]) -> None:
        """Keep the facts of the run."""
        write_text(self.folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def _doubts(self, key: str) -> Path:
        return self.folder / "doubts" / f"{key}.json"

    def _failure(self, key: str) -> Path:
        return self.folder / "failures" / f"{key}.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder holds it, finished or not.

    Attributes:
        store: the folder.
        facts: see `plan.facts`.
        cells: every cell of the run.
    """

    store: Store
    facts: dict[str, Any]
    cells: tuple[Cell, ...]

    def done(self) -> list[Cell]:
        """The finished cells."""
        return [cell for cell in self.cells if self.store.done(cell.key)]

    def failures(self) -> list[Failure]:
        """The cells that failed when they were last tried."""
        found = ((cell, self.store.failure(cell.key)) for cell in self.cells if not self.store.done(cell.key))
        return [Failure(cell, error) for cell, error in found if error is not None]

    def doubts(self) -> list[str]:
        """What looked wrong while finished cells were computed, once for a model and an attack."""
        told = (
            f"{cell.attack} on {cell.model}: {doubt}" for cell in self.done() for doubt in self.store.doubts(cell.key)
        )
        return list(dict.fromkeys(told))

    def table(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of all finished cells in the order of the cells; `columns` of `schema()`, by default all."""
        tables = list(self.tables(columns))
        whole = schema()
        known = whole if columns is None else pa.schema([whole.field(name) for name in columns])
        frame: pd.DataFrame = (pa.concat_tables(tables) if tables else known.empty_table()).to_pandas()
        return frame

    def examples(self, start: int, stop: int) -> Tensor:
        """The images (stop - start, C, H, W) in [0, 1] of the run's examples."""
        return examples.rows(self.store.data, self.facts["data"]["digest"], start, stop)[0]

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of each finished cell.

        Raises:
            ValueError: a run of another version, whose rows mean something else.
        """
        if self.facts.get("format") != FORMAT:
            folder = self.store.folder
            raise ValueError(f"{folder} is of an older version; compute it anew: firstorder evaluate --out {folder}")
        for cell in self.done():
            yield pq.read_table(self.store.path(cell.key), columns=None if columns is None else list(columns))


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: a folder without a run.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(Cell(**cell) for cell in facts["cells"])
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no run ({FACTS} is missing); make one with firstorder evaluate") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the description of a run: {error}") from None
    return Run(Store(folder), facts, cells)
