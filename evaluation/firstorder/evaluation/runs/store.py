"""The folder of a run: its facts, and a file for every finished cell.

    run.json            what the run is: specification, models, data, attacks, versions, machine, the calls that made
                        it, the list of cells
    cells/KEY.parquet   rows of examples, see `columns`; its metadata say what looked wrong while they were computed;
    diagnoses/          likewise, cells whose keys begin with "diagnosis": a row for every check of a model
    failures/KEY.json   why a cell failed
    models/NAME.pt      what a model is, see `firstorder.hosts.identity`
    data/               the examples

Files are complete or absent, and a cell's name says everything that determines it: processes that share a folder can
at worst do the same work twice. Cells and models are sealed: a file that is damaged, or has another's name, is as good
as none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from firstorder.evaluation.runs import examples
from firstorder.evaluation.runs.cells import FORMAT, Cell, digest, last
from firstorder.evaluation.runs.columns import schema
from firstorder.evaluation.runs.seals import BLANK, MARK, seal, sealed
from firstorder.files import clear, replacing, write_text
from firstorder.hosts.identity import Identity

FACTS = "run.json"

DIAGNOSIS = "diagnosis"
"""The phase, and the beginning of the keys, of cells that hold what checks found of a model, not rows of examples."""

DOUBTS, SEAL = b"firstorder.doubts", b"firstorder.seal"
"""Metadata of a cell's file."""


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
        return self.folder / ("diagnoses" if key.startswith(DIAGNOSIS) else "cells") / f"{key}.parquet"

    def done(self, key: str) -> bool:
        """Whether the cell is finished, and its file whole."""
        return sealed(self.path(key), key)

    def damaged(self, key: str) -> bool:
        """Whether there is a file of the cell that is not whole, or another cell's."""
        return self.path(key).exists() and not self.done(key)

    def load(self, key: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of a finished cell; `columns` of `schema()`, by default all."""
        frame: pd.DataFrame = pq.read_table(self.path(key), columns=columns and list(columns)).to_pandas()
        return frame

    def read(self, key: str) -> pa.Table:
        """The rows of a finished cell, in all columns."""
        return pq.read_table(self.path(key))

    def save(self, cell: Cell, table: pa.Table, doubts: Sequence[str] = ()) -> None:
        """Keep a finished cell and what looked wrong in it; what was recorded of its failures is dropped."""
        notes = {DOUBTS: json.dumps(list(doubts)).encode(), SEAL: MARK + BLANK}
        with replacing(self.path(cell.key)) as temporary:
            columns = table.schema if cell.phase == DIAGNOSIS else schema()
            pq.write_table(table.cast(columns).replace_schema_metadata(notes), temporary, compression="zstd")
            seal(temporary, cell.key)
        self._failure(cell.key).unlink(missing_ok=True)

    def fail(self, cell: Cell, error: str) -> str:
        """Record why a cell failed; the same, with why it could not be recorded where that is so."""
        try:
            write_text(self._failure(cell.key), json.dumps({"cell": cell.plain(), "error": error}, indent=2) + "\n")
        except OSError as problem:
            return f"{error} (not recorded: {problem.strerror or problem})"
        return error

    def doubts(self, key: str) -> list[str]:
        """What looked wrong while a finished cell was computed."""
        return list(json.loads((pq.read_metadata(self.path(key)).metadata or {}).get(DOUBTS, b"[]")))

    def failure(self, key: str) -> str | None:
        """Why the cell failed when it was last tried; None where it did not."""
        try:
            return str(json.loads(self._failure(key).read_text(encoding="utf-8"))["error"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return "it is not known why: the record is damaged"

    def facts(self) -> dict[str, Any] | None:
        """The facts of the run; None where there are none.

        Raises:
            ValueError: they are damaged.
        """
        path = self.folder / FACTS
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kept, _ = facts.pop("sha256", None), [Cell.read(cell) for cell in facts["cells"]]
            facts["specification"].items()
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the description of a run: {error}") from None
        if facts.get("format") == FORMAT and kept != digest(facts):
            raise ValueError(
                f"{path} is damaged, or was edited; call firstorder evaluate again with the run's specification"
            )
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Keep the facts of the run."""
        sealed = {**facts, "sha256": digest(facts)}
        write_text(self.folder / FACTS, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")

    def clear(self) -> None:
        """Remove what killed processes left half written."""
        for folder in (
            self.folder,
            *(self.folder / name for name in ("cells", "diagnoses", "failures", "models", "data")),
        ):
            clear(folder)

    def identity_path(self, name: str) -> Path:
        """Where it is kept what the model called `name` is."""
        return self.folder / "models" / f"{name}.pt"

    def keep(self, name: str, identity: Identity) -> None:
        """Keep what a model is, unless it is there."""
        if self.identity(name) is None:
            buffer = io.BytesIO()
            torch.save(identity.save(), buffer)
            path = self.identity_path(name)
            with replacing(path) as temporary:
                temporary.write_bytes(MARK + BLANK + buffer.getvalue())
                seal(temporary, name)

    def identity(self, name: str) -> Identity | None:
        """What the model called `name` is; None where that is not there, or damaged."""
        path = self.identity_path(name)
        if not sealed(path, name):
            return None
        content = path.read_bytes()[len(MARK + BLANK) :]
        return Identity.load(torch.load(io.BytesIO(content), weights_only=True))

    def identities(self) -> Iterator[tuple[str, Identity]]:
        """What every model that is kept here is, by its name."""
        for path in sorted((self.folder / "models").glob("[!.]*.pt")):
            found = self.identity(path.stem)
            if found is not None:
                yield path.stem, found

    def _failure(self, key: str) -> Path:
        return self.folder / "failures" / f"{key}.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder holds it, finished or not.

    Attributes:
        store: the folder.
        facts: see `plan.facts`.
        cells: every cell of the run.
        diagnoses: a cell for every model that is diagnosed, see `trust`.
    """

    store: Store
    facts: dict[str, Any]
    cells: tuple[Cell, ...]
    diagnoses: tuple[Cell, ...] = ()

    def done(self) -> list[Cell]:
        """The finished cells."""
        return [cell for cell in self.cells if self.store.done(cell.key)]

    def damaged(self) -> list[Cell]:
        """The cells whose files are damaged; the next call computes them anew."""
        return [cell for cell in self.cells if self.store.damaged(cell.key)]

    def failures(self) -> list[Failure]:
        """The cells that failed when they were last tried."""
        found = ((cell, self.store.failure(cell.key)) for cell in self.cells if not self.store.done(cell.key))
        return [Failure(cell, error) for cell, error in found if error is not None]

    def doubts(self) -> list[str]:
        """What looked wrong while finished cells were computed, once for a model and an attack."""
        message = (
            f"{cell.attack} on {cell.model}: {doubt}" for cell in self.done() for doubt in self.store.doubts(cell.key)
        )
        return list(dict.fromkeys(message))

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
        """The rows of each finished cell, but of those that another one goes on from.

        Raises:
            ValueError: a run of another version, whose rows mean something else.
        """
        if self.facts.get("format") != FORMAT:
            folder = self.store.folder
            raise ValueError(f"{folder} is of an older version; compute it anew: firstorder evaluate --out {folder}")
        for cell in last(self.cells):
            if not self.store.done(cell.key):
                continue
            yield _whole(self.store.path(cell.key), columns)


def _whole(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """The rows of a file; null in the columns that it does not have."""
    asked = schema() if columns is None else pa.schema([schema().field(name) for name in columns])
    had = set(pq.read_schema(path).names)
    found = pq.read_table(path, columns=[name for name in asked.names if name in had])
    arrays = [found[f.name] if f.name in had else pa.nulls(len(found), f.type) for f in asked]
    return pa.Table.from_arrays(arrays, schema=asked)


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: a folder without a run, or one whose description is damaged.
    """
    facts = Store(folder).facts()
    if facts is None:
        raise ValueError(f"{folder} holds no run ({FACTS} is missing); make one with firstorder evaluate")
    cells, diagnoses = (tuple(map(Cell.read, facts.get(name, ()))) for name in ("cells", "diagnoses"))
    return Run(Store(folder), facts, cells, diagnoses)
