"""Processes of which each holds one contender and runs it on command, so that none shares another's memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import torch

from firstorder.evaluation.runs.memory import resident

IMPORTS = (
    "torch",
    "art.estimators.classification",
    "art.attacks.evasion",
    "torchattacks",
    "foolbox",
    "adv_lib.attacks",
)
"""What every process imports first where it is installed, so that no contender's memory includes its own imports."""

Build = Callable[[], Callable[[], object]]


class Worker:
    """A process with a contender; a context manager.

    Args:
        build: makes the contender there; picklable, and what the contender returns too.
        threads: for torch.
    """

    def __init__(self, build: Build, *, threads: int) -> None:
        methods, imports = multiprocessing.get_all_start_methods(), installed()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([__name__, *imports])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, threads, imports), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        self._ask(None)
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def run(self) -> Any:
        """Run the contender; what it returns."""
        return self._ask("run")

    def peak(self) -> float:
        """Bytes that the contender has added to the process's resident memory at its peak."""
        return float(self._ask("peak"))

    def _ask(self, what: str | None) -> Any:
        if what is not None:
            self._pipe.send(what)
        failure, answer = self._pipe.recv()
        if failure is not None:
            raise RuntimeError(failure)
        return answer


def installed() -> list[str]:
    """Those of `IMPORTS` that are installed."""
    return [name for name in IMPORTS if find_spec(name.partition(".")[0]) is not None]


def _serve(pipe: Connection, build: Build, threads: int, imports: list[str]) -> None:
    try:
        for name in imports:
            import_module(name)
        torch.set_num_threads(threads)
        before = resident()
        run = build()
        pipe.send((None, None))
        while True:
            what = pipe.recv()
            pipe.send((None, run() if what == "run" else resident() - before))
    except EOFError:
        return
    except Exception as error:  # whatever a contender raises is the parent's to report
        pipe.send((f"{type(error).__name__}: {error}", None))
