"""Computing what a plan says and its folder does not have: the one way to results."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from firstorder.evaluation.runs import engines, examples
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.plan import Plan
from firstorder.evaluation.runs.store import Store
from firstorder.evaluation.runs.work import Report, standing, work


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


def begin(chosen: Plan, out: Path, command: str) -> Store:
    """The folder with the run's facts and examples.

    Args:
        chosen: what is to be computed.
        out: the folder.
        command: that made the run.

    Raises:
        ValueError: a folder that cannot be written to.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        if new and out.is_dir():
            out.rmdir()
        raise ValueError(f"{out} cannot be written to ({error.strerror}); name another folder with --out") from None
    store = Store(out)
    specification = chosen.specification
    examples.write(chosen.examples, store.data, skip=specification.skip, count=specification.count)
    store.write(chosen.facts(command))
    return store


def compute(
    chosen: Plan,
    store: Store,
    engine: Engine,
    *,
    found: Callable[[Report], None] = lambda report: None,
    computed: Callable[[Report], None] = lambda report: None,
) -> int:
    """Compute what is not done; how many cells failed.

    Args:
        chosen: what is to be computed.
        store: of the run.
        engine: who computes it.
        found, computed: called with every cell that was there already, and with every other one at its end.
    """
    facts = json.dumps({key: value for key, value in chosen.facts("").items() if key != "cells"})
    task = partial(work, str(store.folder.resolve()), facts, threads=engine.threads)
    done = {cell for cell in chosen.cells if store.done(cell.key)}
    waiting = [cell for cell in chosen.cells if cell not in done]
    for cell in done:
        found(Report(cell, standing(store, cell, chosen.specification), None))
    run: Callable[..., Any] = engines.local
    if engine.name == "ray":
        run = partial(engines.ray, gpus=engine.gpus, address=engine.address)
    reports = run(waiting, task, partial(_fail, store), jobs=engine.jobs, threads=engine.threads)
    failed = 0
    try:
        for report in reports:
            failed += report.error is not None
            computed(report)
    finally:
        reports.close()  # ends the processes
    return failed


def _fail(store: Store, cell: Cell, error: str) -> Report:
    store.fail(cell, error)
    return Report(cell, 0, error)
