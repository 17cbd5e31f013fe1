"""Computing what a plan says and its folder does not have: the one way to results."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from firstorder.evaluation.runs import engines, examples
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.growth import Growth
from firstorder.evaluation.runs.growth import known as known_facts
from firstorder.evaluation.runs.machine import called
from firstorder.evaluation.runs.plan import Plan, plan
from firstorder.evaluation.runs.specification import Specification
from firstorder.evaluation.runs.store import Store
from firstorder.evaluation.runs.work import Report, unbroken, work
from firstorder.files import alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who computes the cells.

    Attributes:
        name: this machine, or Ray.
        address: of a running Ray cluster; None starts Ray here.
        jobs: processes on this machine.
        threads: of each process; None leaves torch its own choice.
        gpus: of each of Ray's workers, also a fraction of one.
    """

    name: Literal["local", "ray"] = "local"
    address: str | None = None
    jobs: int = 1
    threads: int | None = None
    gpus: float = 0.0

    def check(self) -> None:
        """Raise ValueError for an engine that cannot be used."""
        if self.name == "ray":
            engines.require_ray(self.address)
        elif self.address is not None or self.gpus:
            raise ValueError("--address and --gpus are Ray's; add --engine ray")


def begin(
    specification: Specification,
    out: Path,
    command: str,
    *,
    growth: Growth | None = None,
    tell: Callable[[str], None] = logger.warning,
) -> tuple[Plan, Store]:
    """Plan a run, and write its facts and examples into its folder.

    Args:
        specification: what is asked for.
        out: the folder; a run that is there goes on.
        command: that made the run.
        growth: how a run that is there changes.
        tell: called with a line on everything about it that its user must see.

    Raises:
        ValueError: anything that does not fit, or a folder that cannot be written to.
        FileNotFoundError: weights or data that are not there.
    """
    store = Store(out)
    while True:
        chosen = plan(specification, store, growth)
        with _writable(out):
            store.clear()
            notices = [*chosen.notices, *_damage(chosen, store)]
            own = chosen.specification
            if examples.write(chosen.examples, store.data, skip=own.skip, count=own.count):
                notices.append("damaged: the examples in data/; they are written anew")
            for known in chosen.models:
                store.keep(known.digest, known.identity)
            with alone(out):
                facts = chosen.facts(command)
                now = known_facts(store)[0]
                made_by = {key: facts[key] for key in ("versions", "machine", "settings")}
                facts["calls"] = called(now.get("calls", ()), command, made_by)
                if now == chosen.before or all(now.get(key) == facts[key] for key in ("cells", "diagnoses")):
                    store.write(facts)
                    break
        # another process has begun meanwhile, and what it asked for stays in the run
    for line in notices:
        tell(line)
    return chosen, store


def _damage(chosen: Plan, store: Store) -> Iterator[str]:
    """A line for every file that is damaged."""
    for cell in (*chosen.cells, *chosen.diagnoses):
        if store.damaged(cell.key):
            name = store.path(cell.key).relative_to(store.folder)
            where = f"{cell.attack} on {cell.model}, examples {cell.start} to {cell.stop - 1}"
            yield f"damaged: {name} ({where}); it is computed anew"
    for known in chosen.models:
        path = store.identity_path(known.digest)
        if path.exists() and store.identity(known.digest) is None:
            yield f"damaged: {path.relative_to(store.folder)} ({known.entry.label}); it is written anew"


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """A context for writing into a folder, which is made; an error of it is one line."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        yield
    except OSError as error:
        if new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise ValueError(f"{out} cannot be written to ({error.strerror}); name another folder with --out") from None


def compute(
    chosen: Plan,
    store: Store,
    engine: Engine,
    *,
    found: Callable[[Report], None] = lambda report: None,
    computed: Callable[[Report], None] = lambda report: None,
    diagnosing: Callable[[Sequence[Cell]], None] = lambda left: None,
) -> int:
    """Compute what is not done; how many cells failed.

    Args:
        chosen: what is to be computed.
        store: of the run.
        engine: who computes it.
        found, computed: called with every cell that was there already, and with every other one at its end.
        diagnosing: called with the diagnoses that are left, before the first, and after every one.
    """
    facts = json.dumps({key: value for key, value in chosen.facts("").items() if key not in ("cells", "diagnoses")})
    task = partial(work, str(store.folder.resolve()), facts, threads=engine.threads)
    done = {cell for cell in chosen.cells if store.done(cell.key)}
    for cell in done:
        found(Report(cell, unbroken(store, cell, chosen.specification), None))
    run: Callable[..., Any] = engines.local
    if engine.name == "ray":
        run = partial(engines.ray, gpus=engine.gpus, address=engine.address)
    failed = 0
    diagnoses = [cell for cell in chosen.diagnoses if not store.done(cell.key)]
    if diagnoses:
        diagnosing(diagnoses)
        made = run(diagnoses, task, partial(_fail, store), jobs=engine.jobs, threads=engine.threads)
        try:
            for report in made:  # one that fails is kept as such, and shown as left out
                diagnoses = [cell for cell in diagnoses if cell.key != report.cell.key]
                diagnosing(diagnoses)
        finally:
            made.close()
    for cells in _waves([cell for cell in chosen.cells if cell not in done]):
        reports = run(cells, task, partial(_fail, store), jobs=engine.jobs, threads=engine.threads)
        try:
            for report in reports:
                failed += report.error is not None
                computed(report)
        finally:
            reports.close()  # ends the processes
    return failed


def _waves(waiting: list[Cell]) -> Iterator[list[Cell]]:
    """The cells in lists, each after those that it goes on from."""
    while waiting:
        keys = {cell.key for cell in waiting}
        yield [cell for cell in waiting if keys.isdisjoint(cell.after)]
        waiting = [cell for cell in waiting if not keys.isdisjoint(cell.after)]


def _fail(store: Store, cell: Cell, error: str) -> Report:
    return Report(cell, 0, store.fail(cell, error))
