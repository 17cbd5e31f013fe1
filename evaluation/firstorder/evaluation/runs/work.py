"""What a worker does: one cell after the other, with one model in memory."""

from __future__ import annotations

import json
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from firstorder.attacks import UNDECIDED, CrossEntropy, Model, Prepared, broken, predicted
from firstorder.attacks.inspection import gathered
from firstorder.evaluation.names.defences import Defence, defence
from firstorder.evaluation.names.devices import processor
from firstorder.evaluation.runs import axes, examples, loading
from firstorder.evaluation.runs.adversaries import Found
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, Cell, digest
from firstorder.evaluation.runs.columns import Rows, table
from firstorder.evaluation.runs.identity import require_same
from firstorder.evaluation.runs.memory import keep_memory
from firstorder.evaluation.runs.specification import Specification
from firstorder.evaluation.runs.store import Store
from firstorder.hosts.transfer import sent


class Report(NamedTuple):
    """What became of a cell.

    Attributes:
        cell: which.
        robust: how many of its examples were not broken; within the largest radius, where it has none.
        error: why it failed; None where it did not.
    """

    cell: Cell
    robust: int
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
        self._adversaries = {one.name: one for one in axes.attacks(self._specification, shape).found}

    def compute(self, cell: Cell) -> Report:
        """Compute a cell and keep it, or record why that failed. A cell that is there already is only read."""
        if not self.store.done(cell.key):
            try:
                with gathered() as doubts:
                    table = self.table(cell)
                self.store.save(cell, table, doubts)
            except Exception as error:  # whatever a model does wrong, the other cells go on
                return Report(cell, 0, self.store.fail(cell, f"{type(error).__name__}: {error}"))
        return Report(cell, unbroken(self.store, cell, self._specification), None)

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
        wanted = self._wanted(cell, x, y) if self._specification.targeted else None
        found, right = self._found(cell, x, y, wanted, size)
        seconds = (time.perf_counter() - began) / len(x)
        inside = self._inside(cell, found.adversarial, x) | ~right
        kept = max(min(cell.stop, self._specification.pictures) - cell.start, 0)
        common: dict[str, Any] = {"cell": cell, "x": x, "y": y, "wanted": wanted, "found": found, "seconds": seconds}
        tables = []
        for name in dict.fromkeys([cell.model, *self._specification.carried_to]):
            for spec in (None, *self._specification.defences):
                verdict = self._verdict(cell, name, spec, x, y, wanted, found.adversarial, size)
                share = torch.where(inside, verdict.pop("reached"), 0.0)
                pictures = kept if name == cell.model and spec is None else 0
                rows = Rows(**common, **verdict, target=name, defence=spec, share=share, pictures=pictures)
                tables.append(table(rows))
        return pa.concat_tables(tables)

    def _verdict(
        self,
        cell: Cell,
        name: str,
        spec: str | None,
        x: Tensor,
        y: Tensor,
        wanted: Tensor | None,
        adversarial: Tensor,
        size: int,
    ) -> dict[str, Any]:
        """What the target, bare or behind a defence, makes of the examples as they are and of the adversarial ones."""
        network = self._model(name).module
        if spec is None:
            before = _clean(name, network, x, y, size)
            after, loss = _classes(network, adversarial, y, size)
            first, last = before[None], after[None]
        else:
            loss, guard = None, defence(spec)
            draws = self._specification.draws if guard.random else 1
            first, last = (
                _drawn(guard, network, images, draws, self._defence_seed(cell, spec), size)
                for images in (x, adversarial)
            )
        reached = broken(last, y) if wanted is None else last == wanted
        return {
            "before": first[0],
            "after": last[0],
            "loss": loss,
            "clean_share": broken(first, y).double().mean(0),
            "reached": reached.double().mean(0),
            "undecided": (last == UNDECIDED).any(0),
        }

    def _defence_seed(self, cell: Cell, spec: str) -> int:
        return _seed({"defence": spec, "seed": cell.seed, "start": cell.start})

    def _wanted(self, cell: Cell, x: Tensor, y: Tensor) -> Tensor:
        """A uniformly drawn class other than the label for each example, (N,): the same in every run of the seed."""
        with torch.no_grad():
            classes = int(self._model(cell.model).module(x[:1]).shape[1])
        shift = torch.randint(1, classes, (cell.stop,), generator=torch.Generator().manual_seed(cell.seed))
        return (y + shift[cell.start :].to(y.device)) % classes

    def _found(self, cell: Cell, x: Tensor, y: Tensor, wanted: Tensor | None, size: int) -> tuple[Found, Tensor]:
        """What the attack makes of the examples that it is run on, and which these are, (N,).

        Those are the examples that are classified correctly; in a targeted run, those not yet taken for their class.
        """
        network, interface = self._model(cell.model)
        before = _clean(cell.model, network, x, y, size)
        right = before == y if wanted is None else before != wanted
        adversarial = x.clone()
        forwards = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        backwards, doubtful = forwards.clone(), torch.zeros_like(right)
        claimed = doubtful.clone()
        if bool(right.any()):
            attack, goal = self._adversaries[cell.attack], y if wanted is None else wanted
            seed = _seed({"seed": cell.seed, "start": cell.start})
            words = (x[right], goal[right], cell.eps or 1.0, seed, size)
            found = attack.run(interface, network, *words, targeted=wanted is not None)
            adversarial[right], forwards[right], backwards[right], doubtful[right], claimed[right] = found
        if not bool(adversarial.isfinite().all()):
            raise ValueError(f"{cell.attack} returned examples that are not finite")
        return Found(adversarial, forwards, backwards, doubtful, claimed), right

    def _inside(self, cell: Cell, adversarial: Tensor, x: Tensor) -> Tensor:
        """Which examples are within the bounds and the radius, up to rounding, (N,)."""
        flat = adversarial.flatten(1)
        inside = (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
        if cell.eps is not None:
            delta = (adversarial - x).flatten(1).double()
            size = delta.abs().amax(1) if self._specification.norm == "Linf" else delta.norm(dim=1)
            inside &= size <= cell.eps * (1 + RELATIVE) + ABSOLUTE
        return inside

    def _model(self, name: str) -> _Loaded:
        """The model, or ensemble, of that name; others are let go, unless examples are carried from model to model."""
        if name not in self._models:
            if not self._specification.carried_to:
                self._models.clear()
            (entry,) = (one for one in self._specification.interfaces if one.label == name)
            (known,) = (one for one in self._facts["models"] if one["name"] == name)
            network = loading.module(entry, self._specification).to(self._device)
            first, _ = self._rows(0, min(8, self._specification.shard, self._facts["data"]["count"]))
            require_same(network, first, known["digest"], self.store)
            interface = loading.interface(network, first, self._specification, known["precision"])
            parts = interface.parts if isinstance(interface, Prepared) else ()
            if list(parts) != known["preparation"]:
                raise ValueError(f"the model is prepared here by {parts}, not as planned; set prepare: false")
            self._models[name] = _Loaded(network, interface)
        return self._models[name]

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, y = examples.rows(self.store.data, self._facts["data"]["digest"], start, stop)
        return sent(x, self._device), sent(y, self._device)


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


def unbroken(store: Store, cell: Cell, specification: Specification) -> int:
    """How many examples of a finished cell were not broken."""
    rows = store.load(cell.key, ["model", "target", "defence", "success", specification.norm.lower()])
    own = (rows["target"] == rows["model"]) & rows["defence"].isna()
    limit = max(specification.eps, default=math.inf) if cell.eps is None else cell.eps
    broken = rows["success"] & (rows[specification.norm.lower()] <= limit * (1 + RELATIVE) + ABSOLUTE)
    return int((own & ~broken).sum())


@lru_cache(maxsize=1)
def _worker(folder: str, facts: str) -> Worker:
    keep_memory()
    return Worker(Path(folder), json.loads(facts))


def _seed(facts: dict[str, Any]) -> int:
    return int(digest(facts)[:15], 16)


def _classes(network: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The predicted labels (N,), `UNDECIDED` where logits are no numbers, and the cross-entropy (N,) in float64."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(size)])
    return predicted(logits), CrossEntropy()(logits.double(), y)


def _drawn(guard: Defence, network: nn.Module, x: Tensor, draws: int, seed: int, size: int) -> Tensor:
    """The predicted labels (draws, N) behind a defence, whose draws do not depend on `size`."""
    generator = torch.Generator(x.device).manual_seed(seed)

    def parts(images: Tensor) -> Tensor:
        return torch.cat([network(part) for part in images.split(size)])

    return torch.stack([guard.predict(parts, x, generator) for _ in range(draws)])


def _clean(name: str, network: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The predicted labels (N,) of examples as they are.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    labels, _ = _classes(network, x, y, size)
    undecided = int((labels == UNDECIDED).sum())
    if undecided:
        raise ValueError(
            f"the logits of {name} are NaN or infinite for {undecided} of {len(x)} clean examples; check its weights"
        )
    return labels


def _exhausted(error: Exception) -> bool:
    """Whether memory ran out, on the processor or on a GPU."""
    told = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in told
        or "can't allocate memory" in told
    )
