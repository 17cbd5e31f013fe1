"""How a run tells where it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from firstorder.evaluation.reporting.terminal import console
from firstorder.evaluation.runs.plan import Plan
from firstorder.evaluation.runs.work import Report

Group = tuple[str, str, float | None]


def duration(seconds: float) -> str:
    """A rough duration in words: "3 min"."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Cells as they are finished: robust accuracy so far, examples per second, time left.

    Args:
        plan: of the run.
        quiet: tell nothing but failures.
    """

    def __init__(self, plan: Plan, *, quiet: bool) -> None:
        self._plan = plan
        self._quiet = quiet
        self._total = Counter[Group]((cell.model, cell.attack, cell.eps) for cell in plan.cells)
        self._done, self._examples, self._standing = Counter[Group](), Counter[Group](), Counter[Group]()
        self._cells, self._computed, self._new = 0, 0, 0
        self._began = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._bars = Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bars.add_task("starting", total=len(plan.cells), pace="")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()

    def found(self, report: Report) -> None:
        """Count a cell that was there already."""
        self._count(report)
        self._bars.update(self._task, completed=self._cells)

    def told(self, report: Report) -> None:
        """Count a cell that was computed, or that failed."""
        cell = report.cell
        group = (cell.model, cell.attack, cell.eps)
        self._count(report)
        self._computed += cell.stop - cell.start
        self._new += 1
        name = f"{cell.model}, {cell.attack}" + ("" if cell.eps is None else f", radius {cell.eps:.4g}")
        if report.error is not None:
            message = f"failed: {name}, examples {cell.start} to {cell.stop - 1}: {report.error}"
            self._bars.console.print(message, highlight=False, markup=False, soft_wrap=True)
        share = f"{100 * self._standing[group] / max(self._examples[group], 1):.1f} % robust"
        self._bars.update(self._task, completed=self._cells, description=escape(f"{name}: {share}"), pace=self._pace())
        if self._done[group] == self._total[group] and self._examples[group] and not self._quiet:
            told = f"{name}: {share} on {self._examples[group]} examples"
            if not console.is_terminal:
                told += f" ({self._cells} of {len(self._plan.cells)} cells, {self._pace()})"
            self._bars.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def _count(self, report: Report) -> None:
        cell = report.cell
        group = (cell.model, cell.attack, cell.eps)
        self._cells += 1
        self._done[group] += 1
        if report.error is None:
            self._examples[group] += cell.stop - cell.start
            self._standing[group] += report.standing

    def _pace(self) -> str:
        seconds = time.monotonic() - self._began
        left = seconds / self._new * (len(self._plan.cells) - self._cells)
        return f"{self._computed / seconds:.1f} examples/s, {duration(left)} left"
