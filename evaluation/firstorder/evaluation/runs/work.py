"""What a worker does: one cell after the other, with one model in memory."""

from __future__ import annotations

import json
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from firstorder.attacks import CrossEntropy, Model, Prepared
from firstorder.evaluation.memory import keep_memory
from firstorder.evaluation.runs import examples, plan
from firstorder.evaluation.runs.adversaries import adversary
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, Cell, digest
from firstorder.evaluation.runs.specification import Specification
from firstorder.evaluation.runs.store import SCHEMA, Store


class Report(NamedTuple):
    """What became of a cell.

    Attributes:
        cell: which.
        standing: how many of its examples were not broken; within the largest radius, where it has none.
        error: why it failed; None where it did not.
    """

    cell: Cell
    standing: int
    error: str | None


class _Loaded(NamedTuple):
    module: nn.Module
    face: Model


class Worker:
    """Computes the cells of a run.

    Args:
        folder: of the run.
        facts: of the run, as in `run.json`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.store = Store(folder)
        self._facts = facts
        self._specification = Specification(**facts["specification"])
        self._device = plan.processor(self._specification.device)
        self._models: dict[str, _Loaded] = {}
        shape = tuple(facts["data"]["shape"])
        self._adversaries = {
            entry.label: adversary(entry, self._specification, shape) for entry in self._specification.attacks
        }

    def compute(self, cell: Cell) -> Report:
        """Compute a cell and keep it, or record why that failed. A cell that is there already is only read."""
        if not self.store.done(cell.key):
            try:
                self.store.save(cell, self.table(cell))
            except Exception as error:  # whatever a model does wrong, the other cells go on
                told = f"{type(error).__name__}: {error}"
                self.store.fail(cell, told)
                return Report(cell, 0, told)
        return Report(cell, standing(self.store, cell, self._specification), None)

    def table(self, cell: Cell) -> pa.Table:
        """The rows of a cell; where memory runs out, in smaller batches."""
        x, y = self._rows(cell.start, cell.stop)
        size = min(self._specification.batch_size, len(x))
        while True:
            try:
                return self._attack(cell, x, y, size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not _exhausted(error):
                    raise
            size = math.ceil(size / 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _attack(self, cell: Cell, x: Tensor, y: Tensor, size: int) -> pa.Table:
        attack, (network, face) = self._adversaries[cell.attack], self._model(cell.model)
        began = time.perf_counter()
        clean, _ = _judge(network, x, y, size)
        right = clean == y
        adversarial = x.clone()
        forwards = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        backwards = forwards.clone()
        if bool(right.any()):
            seed = int(digest({"seed": cell.seed, "start": cell.start})[:15], 16)
            found = attack.run(face, network, x[right], y[right], cell.eps or 1.0, seed, size)
            adversarial[right] = found.adversarial
            forwards[right], backwards[right] = found.forwards, found.backwards
        if not bool(adversarial.isfinite().all()):
            raise ValueError(f"{cell.attack} returned examples that are not finite")
        seconds = (time.perf_counter() - began) / len(x)
        delta = (adversarial - x).flatten(1).double()
        sizes = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1)}
        common = {
            "attack": cell.attack,
            "eps": cell.eps,
            "seed": cell.seed,
            "seconds": seconds,
            **sizes,
            "forwards": forwards,
            "backwards": backwards,
        }
        inside = self._inside(cell, adversarial, sizes) | ~right
        names = [cell.model]
        if self._specification.transfer:
            names += [entry.label for entry in self._specification.models if entry.label != cell.model]
        tables = []
        for name in names:
            judge = self._model(name).module
            before = clean if name == cell.model else _judge(judge, x, y, size)[0]
            after, loss = _judge(judge, adversarial, y, size)
            success = (after != y) & inside
            verdict = {"clean_label": before, "adversarial_label": after, "loss": loss, "success": success}
            pictures = _pictures(adversarial, cell, self._specification) if name == cell.model else [None] * len(x)
            tables.append(
                _table(
                    len(x),
                    {
                        "model": cell.model,
                        "target": name,
                        "example": torch.arange(cell.start, cell.stop),
                        "label": y,
                        "adversarial": pictures,
                        **common,
                        **verdict,
                    },
                )
            )
        return pa.concat_tables(tables)

    def _inside(self, cell: Cell, adversarial: Tensor, sizes: dict[str, Tensor]) -> Tensor:
        """Which examples are within the bounds and the radius, up to rounding, (N,)."""
        flat = adversarial.flatten(1)
        inside = (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
        if cell.eps is not None:
            inside &= sizes[self._specification.norm.lower()] <= cell.eps * (1 + RELATIVE) + ABSOLUTE
        return inside

    def _model(self, name: str) -> _Loaded:
        """The model of that name; the others are let go, unless examples are carried from model to model."""
        if name not in self._models:
            if not self._specification.transfer:
                self._models.clear()
            (entry,) = (one for one in self._specification.models if one.label == name)
            (known,) = (one for one in self._facts["models"] if one["name"] == name)
            network = plan.module(entry, self._specification).to(self._device)
            if plan.identify(network) != known["digest"]:
                raise ValueError("the model's weights are others than when the run began; start the run anew")
            first, _ = self._rows(0, min(8, self._specification.shard, self._facts["data"]["count"]))
            face = plan.face(network, first, self._specification, known["precision"])
            parts = face.parts if isinstance(face, Prepared) else ()
            if list(parts) != known["preparation"]:
                raise ValueError(f"the model is prepared here by {parts}, not as planned; set prepare: false")
            self._models[name] = _Loaded(network, face)
        return self._models[name]

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, y = examples.rows(self.store.data, self._facts["data"]["digest"], start, stop)
        return x.to(self._device), y.to(self._device)


def work(folder: str, facts: str, cell: Cell, threads: int | None) -> Report:
    """Compute a cell in a process that keeps what cells have in common.

    Args:
        folder: of the run.
        facts: of the run, in JSON, without its cells.
        cell: which.
        threads: for torch; None leaves its own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return _worker(folder, facts).compute(cell)


def standing(store: Store, cell: Cell, specification: Specification) -> int:
    """How many examples of a finished cell were not broken."""
    rows = store.load(cell.key, ["model", "target", "success", specification.norm.lower()])
    own = rows["target"] == rows["model"]
    limit = max(specification.eps) if cell.eps is None else cell.eps
    broken = rows["success"] & (rows[specification.norm.lower()] <= limit * (1 + RELATIVE) + ABSOLUTE)
    return int((own & ~broken).sum())


@lru_cache(maxsize=1)
def _worker(folder: str, facts: str) -> Worker:
    keep_memory()
    return Worker(Path(folder), json.loads(facts))


def _judge(network: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The predicted labels (N,) and the cross-entropy (N,) in float64."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(size)])
    return logits.argmax(1), CrossEntropy()(logits.double(), y)


def _pictures(adversarial: Tensor, cell: Cell, specification: Specification) -> list[bytes | None]:
    kept = max(min(cell.stop, specification.pictures) - cell.start, 0)
    shown = [example.cpu().numpy().astype("<f4").tobytes() for example in adversarial[:kept]]
    return [*shown, *[None] * (len(adversarial) - kept)]


def _table(count: int, columns: dict[str, Any]) -> pa.Table:
    """The columns of `SCHEMA`; what is no column of values is repeated."""
    arrays = []
    for field in SCHEMA:
        value = columns[field.name]
        if isinstance(value, Tensor):
            value = np.asarray(value.cpu())
        elif not isinstance(value, list):
            value = [value] * count
        arrays.append(pa.array(value, field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _exhausted(error: Exception) -> bool:
    """Whether memory ran out, on the processor or on a GPU."""
    told = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in told
        or ("can't allocate memory" in told)
    )
