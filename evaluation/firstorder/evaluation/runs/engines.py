"""Who computes the cells: this process, several on this machine (joblib), or a cluster (Ray)."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from firstorder.attacks.distribution import pip_install
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.work import Report

Work = Callable[[Cell], Report]
"""Computes a cell, in whichever process."""

Fail = Callable[[Cell, str], Report]
"""Records that a cell failed."""

DEATHS = 3
"""How often a worker may die over a cell."""


def local(cells: Sequence[Cell], work: Work, fail: Fail, *, jobs: int, threads: int | None) -> Generator[Report]:
    """Compute cells on this machine, in this process or in several.

    Args:
        cells: which.
        work: what a process does with one; its hooks must be picklable where there are several.
        fail: records a cell over which `DEATHS` workers died.
        jobs: processes.
        threads: of each, for numerical libraries.
    """
    if jobs == 1:
        yield from map(work, cells)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left, deaths = dict.fromkeys(cells), Counter[Cell]()
    try:
        while left:
            alone = [cell for cell in left if deaths[cell]][:1]  # a suspect takes nothing with it
            handed = alone or list(left)
            try:
                with parallel_config("loky", inner_max_num_threads=threads):
                    parallel = Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")
                    for report in parallel(delayed(work)(cell) for cell in handed):
                        del left[report.cell]
                        yield report
            except TerminatedWorkerError:
                # cells are handed out in order: the dead worker had one of the first, and the others died with it
                deaths.update([cell for cell in handed if cell in left][:jobs])
                for cell in [cell for cell in alone if deaths[cell] == DEATHS]:
                    del left[cell]
                    yield fail(cell, f"the process that computed it died {DEATHS} times; was its memory exhausted?")
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def require_ray(address: str | None) -> None:
    """Check that cells can be sent to Ray, before anything is written.

    Raises:
        ValueError: Ray is not installed, or nothing answers at the address.
    """
    if find_spec("ray") is None:
        raise ValueError(f"engine=ray needs Ray: {pip_install('ray')}")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host:
        try:
            with socket.create_connection((host, int(port)), timeout=10):
                pass
        except (OSError, ValueError) as error:  # Ray itself would wait for minutes
            raise ValueError(f"no Ray cluster answers at address={address}: {error}") from None


def ray(
    cells: Sequence[Cell], work: Work, fail: Fail, *, jobs: int, threads: int | None, gpus: float, address: str | None
) -> Generator[Report]:
    """Compute cells as Ray tasks.

    Args:
        cells: which.
        work: what a worker does with one.
        fail: records a cell over which workers died.
        jobs: workers, where Ray is started here.
        threads: CPUs of each; one by default.
        gpus: of each, also a fraction of one.
        address: of a running cluster, all of whose nodes see the folder of the run; None starts Ray on this machine.

    Raises:
        ValueError: no cluster at the address.
    """
    cluster: Any = import_module("ray")
    share = threads or 1
    size = {"num_cpus": jobs * share, "include_dashboard": False} if address is None else {"address": address}
    try:
        cluster.init(**size, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from None
    try:
        task = cluster.remote(num_cpus=share, num_gpus=gpus, max_retries=DEATHS - 1)(lambda cell: work(cell))
        waiting = {task.remote(cell): cell for cell in cells}
        while waiting:
            (done,), _ = cluster.wait(list(waiting), num_returns=1)
            cell = waiting.pop(done)
            try:
                yield cluster.get(done)
            except cluster.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                yield fail(cell, f"{type(cause).__name__}: {cause}".splitlines()[0])
    finally:
        cluster.shutdown()
