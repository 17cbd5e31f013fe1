"""Diagnoses of a run's models: each a cell of its own, that has a row for every check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pyarrow as pa
from torch import Tensor, nn

from firstorder.attacks.distribution import versions
from firstorder.evaluation.runs.cells import FORMAT, Cell, digest
from firstorder.evaluation.runs.diagnosis import CHECKS, Finding, diagnose
from firstorder.evaluation.runs.examples import Examples
from firstorder.evaluation.runs.specification import Specification
from firstorder.evaluation.runs.store import DIAGNOSIS, Run

COUNT = 25
"""Of a run's first examples, those that its models are diagnosed on."""

SCHEMA = pa.schema([pa.field(name, pa.string()) for name in Finding.__dataclass_fields__])
"""Of the rows."""


def cells(
    specification: Specification, device: str, found: Examples, models: Sequence[tuple[str, str]]
) -> Iterator[Cell]:
    """A cell for every model where the run has a radius: the diagnosis at its largest one.

    Args:
        specification: of the run.
        device: the type of it.
        found: the run's examples.
        models: names and digests.
    """
    if not (specification.diagnose and specification.eps):
        return
    stop, eps = min(COUNT, found.count), max(specification.eps)
    common = {
        "format": FORMAT,
        "phase": DIAGNOSIS,
        "checks": [check.name for check in CHECKS],
        "versions": versions(["torch"]),
        "device": device,
        "norm": specification.norm,
        "eps": eps,
        "examples": [shard for start, _, shard in found.shards if start < stop],
        "stop": stop,
    }
    for name, known in models:
        key = f"{DIAGNOSIS}-{digest({**common, 'model': [name, known]})}"
        yield Cell(key, name, DIAGNOSIS, eps, 0, 0, stop, DIAGNOSIS)


def table(cell: Cell, network: nn.Module, x: Tensor, y: Tensor, norm: str, size: int) -> pa.Table:
    """The rows of a diagnosis, `size` images in a forward."""
    found = diagnose(network, x, y, eps=cell.eps or 1.0, norm=norm, batch_size=size)
    return pa.Table.from_pylist([asdict(one) for one in found], schema=SCHEMA)


def findings(run: Run, model: str) -> list[Finding] | None:
    """What the diagnosis of a model of the run found; None where there is none that is finished."""
    for cell in run.diagnoses:
        if cell.model == model and run.store.done(cell.key):
            return [Finding(**row) for row in run.store.read(cell.key).to_pylist()]
    return None


def failure(run: Run, model: str) -> str | None:
    """Why the diagnosis of a model failed when it was last tried; None where it did not."""
    found = (run.store.failure(cell.key) for cell in run.diagnoses if cell.model == model)
    return next((error for error in found if error is not None), None)
