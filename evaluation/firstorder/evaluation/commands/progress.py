"""How a run says where it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from firstorder.evaluation.reporting.terminal import console, say
from firstorder.evaluation.runs.cells import Cell, last
from firstorder.evaluation.runs.plan import Plan
from firstorder.evaluation.runs.work import Report

Group = tuple[str, str, float | None]

EVERY = 30.0
"""Seconds after which there is a line where there is no terminal, whatever happens."""


def duration(seconds: float) -> str:
    """A rough duration in words: "3 min"."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Cells as they are finished: robust accuracy so far, examples per second, time left.

    Args:
        plan: of the run.
        quiet: say nothing but failures.
        every: seconds after which there is a line where there is no terminal.
    """

    def __init__(self, plan: Plan, *, quiet: bool, every: float = EVERY) -> None:
        self._plan = plan
        self._quiet = quiet
        self._lines = not (quiet or console.is_terminal)
        self._every, self._last, self._ended = every, time.monotonic(), threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        self._rows = {cell.key for cell in last(plan.cells)}
        self._left = Counter[str](cell.model for cell in plan.cells)
        self._total = Counter[Group]((cell.model, cell.attack, cell.eps) for cell in plan.cells)
        self._done, self._examples, self._robust = Counter[Group](), Counter[Group](), Counter[Group]()
        self._cells, self._computed, self._new = 0, 0, 0
        self._diagnosing = ""
        self._began = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._bars = Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bars.add_task("starting", total=len(plan.cells), pace="")

    def __enter__(self) -> Progress:
        self._bars.start()
        if self._lines:
            self._ticking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, and write no more lines."""
        self._ended.set()
        if self._ticking.is_alive():
            self._ticking.join()
        self._bars.stop()

    def found(self, report: Report) -> None:
        """Count a cell that was there already."""
        self._count(report)
        self._bars.update(self._task, completed=self._cells)

    def diagnosing(self, left: Sequence[Cell]) -> None:
        """Say that models are being diagnosed, those of these cells still; none of them ends it."""
        total = len(self._plan.diagnoses)
        self._diagnosing = f"diagnosing, {total - len(left)} of {total} models done" if left else ""
        self._bars.update(self._task, description=self._diagnosing or "starting")
        if self._lines:
            self._print(self._diagnosing or f"diagnosed: {', '.join(cell.model for cell in self._plan.diagnoses)}")
        if not left:
            self._began = time.monotonic()  # the pace is that of the cells

    def computed(self, report: Report) -> None:
        """Count a cell that was computed, or that failed."""
        cell = report.cell
        group = (cell.model, cell.attack, cell.eps)
        self._count(report)
        self._computed += cell.stop - cell.start
        self._new += 1
        name = f"{cell.model}, {cell.attack}" + ("" if cell.eps is None else f", radius {cell.eps:.4g}")
        if report.error is not None:
            self._print(f"failed: {name}, examples {cell.start} to {cell.stop - 1}: {report.error}")
        known = self._examples[group]
        share = f"{100 * self._robust[group] / known:.1f} % robust" if known else "under way"
        self._bars.update(self._task, completed=self._cells, description=f"{name}: {share}", pace=self._pace())
        if self._quiet:
            return
        if self._done[group] == self._total[group] and self._examples[group]:
            at = f" ({self._where()})" if self._lines else ""
            self._print(f"{name}: {share} on {self._examples[group]} examples{at}")
        if self._lines and not self._left[cell.model]:
            self._print(f"{cell.model} is done: {sum(one.model == cell.model for one in self._plan.cells)} cells")

    def _tick(self) -> None:
        """Write a line whenever there was none for long."""
        while not self._ended.wait(max(self._last + self._every - time.monotonic(), 0.01)):
            if time.monotonic() >= self._last + self._every:
                self._print(f"running: {self._where()}")

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        say(line)

    def _where(self) -> str:
        return self._diagnosing or f"{self._cells} of {len(self._plan.cells)} cells, {self._pace()}"

    def _count(self, report: Report) -> None:
        cell = report.cell
        group = (cell.model, cell.attack, cell.eps)
        self._cells += 1
        self._left[cell.model] -= 1
        self._done[group] += 1
        if report.error is None and cell.key in self._rows:
            self._examples[group] += cell.stop - cell.start
            self._robust[group] += report.robust

    def _pace(self) -> str:
        seconds = time.monotonic() - self._began
        if not self._new:
            return f"none new in {duration(seconds)}"
        left = seconds / self._new * (len(self._plan.cells) - self._cells)
        return f"{self._computed / seconds:.1f} examples/s, {duration(left)} left"
