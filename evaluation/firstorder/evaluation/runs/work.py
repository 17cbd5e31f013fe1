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

from firstorder.attacks import UNDECIDED, Model, Prepared, broken
from firstorder.attacks.inspection import gathered
from firstorder.evaluation.names.defences import defence, drawn
from firstorder.evaluation.names.devices import processor
from firstorder.evaluation.runs import axes, examples, loading, trust
from firstorder.evaluation.runs.adversaries import Found
from firstorder.evaluation.runs.ball import eight_bit, inside
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, Cell, digest
from firstorder.evaluation.runs.classes import classes, clean, exhausted
from firstorder.evaluation.runs.columns import Rounded, Rows, schema, table
from firstorder.evaluation.runs.identity import require_same
from firstorder.evaluation.runs.memory import keep_memory
from firstorder.evaluation.runs.specification import LEAST_LIKELY, Specification
from firstorder.evaluation.runs.store import DIAGNOSIS, Store
from firstorder.evaluation.runs.verdicts import KEPT, Cascade, before, spread
from firstorder.hosts.transfer import sent

PICTURED = 2**22
"""Values of pixels, from a run's first on, whose examples are kept as pictures where they fell: 16 MB of an attack at a
radius, at most. These are the first 1365 examples of 3 x 32 x 32, or 27 of 3 x 224 x 224."""


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
        robust = 0 if cell.phase == DIAGNOSIS else unbroken(self.store, cell, self._specification)
        return Report(cell, robust, None)

    def table(self, cell: Cell) -> pa.Table:
        """The rows of a cell; where memory runs out, in smaller batches."""
        size = min(self._specification.batch_size, cell.stop - cell.start)
        while True:
            try:
                if cell.phase == DIAGNOSIS:
                    images = self._images(cell.start, cell.stop)
                    return trust.table(cell, self._model(cell.model).module, *images, self._specification.norm, size)
                return self._follow(cell, size) if cell.after else self._attack(cell, size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not exhausted(error):
                    raise
            size = math.ceil(size / 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _attack(self, cell: Cell, size: int) -> pa.Table:
        """The rows of a shard."""
        began = time.perf_counter()
        x, y = self._images(cell.start, cell.stop)
        wanted = self._wanted(cell, x, y, size) if self._specification.targeted else None
        found, right = self._found(cell, x, y, wanted, size)
        seconds = (time.perf_counter() - began) / len(x)
        places = torch.arange(cell.start, cell.stop)
        return self._rows(cell, places, x, y, wanted, found, right, size, seconds)

    def _follow(self, cell: Cell, size: int) -> pa.Table:
        """The rows of all examples after a later phase: those of before, but for the examples that it is about."""
        began = time.perf_counter()
        attack, rows = self._adversaries[cell.attack], before(self.store, cell)
        assert isinstance(attack, Cascade)
        seed = _seed({"seed": cell.seed, "phase": cell.phase})
        chosen = attack.chosen(cell.phase, rows, seed)
        if chosen:
            own = [rows[i] for i in chosen]
            places, y = (torch.tensor([row[name] for row in own]) for name in ("example", "label"))
            x, y = self._picked(places), y.to(self._device)
            wanted = torch.tensor([row["wanted"] for row in own]).to(y) if self._specification.targeted else None
            network, interface = self._model(cell.model)
            words = (x, y if wanted is None else wanted, own, cell.eps or 1.0, seed, size)
            index, found, notes = attack.follow(cell.phase, interface, network, *words, targeted=wanted is not None)
            for row in own:
                row.update(notes)
            if len(index):
                here = (places[index.cpu()], x[index], y[index], None if wanted is None else wanted[index])
                table = self._rows(cell, *here, found, torch.ones_like(here[2], dtype=torch.bool), size, 0.0)
                for i, row in zip(index.tolist(), table.to_pylist(), strict=True):
                    rows[chosen[i]] = {**row, **{name: own[i][name] for name in KEPT}}
        seconds = (time.perf_counter() - began) / len(rows)
        final = [{**row, "carried": None, "seconds": row["seconds"] + seconds} for row in rows]
        return pa.Table.from_pylist(final, schema=schema())

    def _rows(
        self,
        cell: Cell,
        places: Tensor,
        x: Tensor,
        y: Tensor,
        wanted: Tensor | None,
        found: Found,
        right: Tensor,
        size: int,
        seconds: float,
    ) -> pa.Table:
        """The rows of the examples at `places`, on every target."""
        if not bool(found.adversarial.isfinite().all()):
            raise ValueError(f"{cell.attack} returned examples that are not finite")
        ball = (x, cell.eps, self._specification.norm)
        within = inside(found.adversarial, *ball) | ~right
        picture = eight_bit(found.adversarial, *ball)
        kept_inside = inside(picture, *ball) | ~right
        common: dict[str, Any] = {
            "cell": cell, "examples": places, "x": x, "y": y, "wanted": wanted, "found": found, "seconds": seconds,
        }  # fmt: skip
        tables = []
        for name in dict.fromkeys([cell.model, *self._specification.carried_to]):
            for spec in (None, *self._specification.defences):
                verdict = self._verdict(cell, name, spec, x, y, wanted, found.adversarial, size)
                share, wrong = (torch.where(within, verdict.pop(key), 0.0) for key in ("reached", "wrong"))
                rounded = None
                if self._specification.carried_to and spec is None:
                    rounded = Rounded(classes(self._model(name).module, picture, y, size)[0], kept_inside)
                pictured = self._pictured(places, (share == 1) & right, x[0].numel())
                pictured &= name == cell.model and spec is None
                shares: dict[str, Any] = {"share": share, "wrong_share": wrong, "rounded": rounded}
                rows = Rows(**common, **verdict, **shares, target=name, defence=spec, pictured=pictured)
                tables.append(table(rows))
        return pa.concat_tables(tables)

    def _pictured(self, places: Tensor, fallen: Tensor, numel: int) -> Tensor:
        """Which examples at places (N,) are kept as pictures, (N,): the first ones, and those in `PICTURED` that fell.

        Their places alone say so, so that a cell is the same whatever else the run has.
        """
        count = self._specification.pictures
        return (places < count) | (fallen.cpu() & (places < PICTURED // numel) & (count > 0))

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
            before, after = clean(name, network, x, y, size), classes(network, adversarial, y, size)
            first, last = before.labels[None], after.labels[None]
        else:
            before, after, guard = None, None, defence(spec)
            draws, seed = self._specification.draws, self._defence_seed(cell, spec)
            first, last = (
                drawn(guard, network, images, draws=draws, seed=seed, batch_size=size) for images in (x, adversarial)
            )
        reached = broken(last, y) if wanted is None else last == wanted
        return {
            "before": first[0],
            "after": last[0],
            "bare": None if before is None or after is None else (before, after),
            "clean_share": broken(first, y).double().mean(0),
            "reached": reached.double().mean(0),
            "wrong": broken(last, y).double().mean(0),
            "undecided": (last == UNDECIDED).any(0),
        }

    def _defence_seed(self, cell: Cell, spec: str) -> int:
        return _seed({"defence": spec, "seed": cell.seed, "start": cell.start})

    def _wanted(self, cell: Cell, x: Tensor, y: Tensor, size: int) -> Tensor:
        """The class that each example is to be taken for, (N,), never its label.

        One that is drawn uniformly is the same in every run of the seed; the least likely one is that of the model that
        the examples are made on.
        """
        goal, module = self._specification.targeted, self._model(cell.model).module
        if goal.isdecimal():
            return torch.full_like(y, int(goal))
        with torch.no_grad():
            if goal == LEAST_LIKELY:
                logits = torch.cat([module(part) for part in x.split(size)])
                return logits.scatter(1, y[:, None], torch.inf).argmin(1)
            classes = int(module(x[:1]).shape[1])
        shift = torch.randint(1, classes, (cell.stop,), generator=torch.Generator().manual_seed(cell.seed))
        return (y + shift[cell.start :].to(y.device)) % classes

    def _found(self, cell: Cell, x: Tensor, y: Tensor, wanted: Tensor | None, size: int) -> tuple[Found, Tensor]:
        """What the attack makes of the examples that it is run on, and which these are, (N,).

        Those are the examples that are classified correctly; in a targeted run, those not yet taken for their class.
        """
        network, interface = self._model(cell.model)
        before = clean(cell.model, network, x, y, size).labels
        right = before == y if wanted is None else before != wanted
        adversarial = x.clone()
        forwards = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        backwards, doubtful = forwards.clone(), torch.zeros_like(right)
        claimed, course = doubtful.clone(), None
        if bool(right.any()):
            attack, goal = self._adversaries[cell.attack], y if wanted is None else wanted
            seed = _seed({"seed": cell.seed, "start": cell.start})
            words = (x[right], goal[right], cell.eps or 1.0, seed, size)
            found = attack.run(interface, network, *words, targeted=wanted is not None)
            *own, course = found
            for mine, theirs in zip((adversarial, forwards, backwards, doubtful, claimed), own, strict=True):
                mine[right] = theirs
        if isinstance(self._adversaries[cell.attack], Cascade):
            course = spread(course, right)
        return Found(adversarial, forwards, backwards, doubtful, claimed, course), right

    def _model(self, name: str) -> _Loaded:
        """The model, or ensemble, of that name; others are let go, unless examples are carried from model to model."""
        if name not in self._models:
            if not self._specification.carried_to:
                self._models.clear()
            (entry,) = (one for one in self._specification.interfaces if one.label == name)
            (known,) = (one for one in self._facts["models"] if one["name"] == name)
            network = loading.module(entry, self._specification).to(self._device)
            first, _ = self._images(0, min(8, self._specification.shard, self._facts["data"]["count"]))
            require_same(network, first, known["digest"], self.store)
            interface = loading.interface(network, first, self._specification, known["precision"])
            parts = interface.parts if isinstance(interface, Prepared) else ()
            if list(parts) != known["preparation"]:
                raise ValueError(f"the model is prepared here by {parts}, not as planned; set prepare: false")
            self._models[name] = _Loaded(network, interface)
        return self._models[name]

    def _images(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, y = examples.rows(self.store.data, self._facts["data"]["digest"], start, stop)
        return sent(x, self._device), sent(y, self._device)

    def _picked(self, places: Tensor) -> Tensor:
        """The images at places (N,) in order, (N, C, H, W)."""
        size = self._specification.shard
        parts = (
            self._images(int(own[0]), int(own[-1]) + 1)[0][(own - own[0]).to(self._device)]
            for own in (places[places // size == shard] for shard in (places // size).unique())
        )
        return torch.cat(list(parts))


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
