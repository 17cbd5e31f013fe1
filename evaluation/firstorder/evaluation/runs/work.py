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

from firstorder.attacks import UNDECIDED, CrossEntropy, Model, Prepared, broken, predicted
from firstorder.attacks.inspection import gathered
from firstorder.evaluation.names.devices import processor
from firstorder.evaluation.runs import examples, plan
from firstorder.evaluation.runs.adversaries import Found, adversary
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, Cell, digest
from firstorder.evaluation.runs.memory import keep_memory
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
    interface: Model


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
        self._device = processor(self._specification.device)
        self._models: dict[str, _Loaded] = {}
        shape = tuple(facts["data"]["shape"])
        self._adversaries = {
            entry.label: adversary(entry, self._specification, shape) for entry in self._specification.attacks
        }

    def compute(self, cell: Cell) -> Report:
        """Compute a cell and keep it, or record why that failed. A cell that is there already is only read."""
        if not self.store.done(cell.key):
            try:
                with gathered() as doubts:
                    table = self.table(cell)
                self.store.save(cell, table, doubts)
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
        began = time.perf_counter()
        found, right = self._found(cell, x, y, size)
        seconds = (time.perf_counter() - began) / len(x)
        delta = (found.adversarial - x).flatten(1).double()
        sizes = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1)}
        common = {
            "model": cell.model,
            "attack": cell.attack,
            "eps": cell.eps,
            "seed": cell.seed,
            "example": torch.arange(cell.start, cell.stop),
            "label": y,
            **sizes,
            "forwards": found.forwards,
            "backwards": found.backwards,
            "seconds": seconds,
        }
        inside = self._inside(cell, found.adversarial, sizes) | ~right
        tables = []
        for name in self._targets(cell):
            judge = self._model(name).module
            before = _clean(name, judge, x, y, size)
            after, loss = _judge(judge, found.adversarial, y, size)
            success = broken(after, y) & inside
            verdict = {
                "clean_label": before,
                "adversarial_label": after,
                "loss": loss,
                "success": success,
                "doubtful": (found.doubtful | (after == UNDECIDED)) & ~success,
            }
            kept = max(min(cell.stop, self._specification.pictures) - cell.start, 0) if name == cell.model else 0
            pictures = {"target": name, "adversarial": _pictures(found.adversarial, kept)}
            tables.append(_table(len(x), {**common, **verdict, **pictures}))
        return pa.concat_tables(tables)

    def _found(self, cell: Cell, x: Tensor, y: Tensor, size: int) -> tuple[Found, Tensor]:
        """What the attack makes of the examples that are classified correctly, and which these are, (N,)."""
        network, interface = self._model(cell.model)
        right = _clean(cell.model, network, x, y, size) == y
        adversarial = x.clone()
        forwards = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        backwards, doubtful = forwards.clone(), torch.zeros_like(right)
        if bool(right.any()):
            seed = int(digest({"seed": cell.seed, "start": cell.start})[:15], 16)
            attack = self._adversaries[cell.attack]
            found = attack.run(interface, network, x[right], y[right], cell.eps or 1.0, seed, size)
            adversarial[right], forwards[right], backwards[right], doubtful[right] = found
        if not bool(adversarial.isfinite().all()):
            raise ValueError(f"{cell.attack} returned examples that are not finite")
        return Found(adversarial, forwards, backwards, doubtful), right

    def _targets(self, cell: Cell) -> list[str]:
        """The model itself and, where examples are carried from model to model, the others."""
        others = [entry.label for entry in self._specification.models if entry.label != cell.model]
        return [cell.model, *(others if self._specification.transfer else [])]

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
                raise ValueError("the model's weights or code are others than when the run began; start the run anew")
            first, _ = self._rows(0, min(8, self._specification.shard, self._facts["data"]["count"]))
            interface = plan.interface(network, first, self._specification, known["precision"])
            parts = interface.parts if isinstance(interface, Prepared) else ()
            if list(parts) != known["preparation"]:
                raise ValueError(f"the model is prepared here by {parts}, not as planned; set prepare: false")
            self._models[name] = _Loaded(network, interface)
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
    """The predicted labels (N,), `UNDECIDED` where logits are no numbers, and the cross-entropy (N,) in float64."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(size)])
    return predicted(logits), CrossEntropy()(logits.double(), y)


def _clean(name: str, network: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The predicted labels (N,) of examples as they are.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    labels, _ = _judge(network, x, y, size)
    undecided = int((labels == UNDECIDED).sum())
    if undecided:
        raise ValueError(
            f"the logits of {name} are NaN or infinite for {undecided} of {len(x)} clean examples; check its weights"
        )
    return labels


def _pictures(adversarial: Tensor, kept: int) -> list[bytes | None]:
    """The first `kept` examples as the store has them."""
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
        or "can't allocate memory" in told
    )
