"""Standardised evaluation: packaged models and data, runs, reports and the command line.

    run = evaluate({"models": "mnist-cnn", "data": "mnist", "eps": 0.3, "attacks": ["pgd", "pqgd"]}, "runs/mnist")
    run.table()   # a row for every image and attack, as a pandas frame
    run.report()  # a page of it

Called again, it computes what the folder does not have.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from firstorder.evaluation.runs.computing import Engine
    from firstorder.evaluation.runs.specification import Specification
    from firstorder.evaluation.runs.store import Run
    from firstorder.evaluation.runs.work import Report

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A run, finished but for the cells that failed.

    Attributes:
        run: the folder of the run; its `failures()` and `doubts()` say what did not work and what looked wrong.
    """

    run: Run

    def table(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A row for every image, attack, radius, seed and target.

        Args:
            columns: those of `firstorder.evaluation.runs.columns` that are wanted; all by default.
        """
        return self.run.table(columns)

    def trust(self) -> dict[str, tuple[str, ...]]:
        """By model, the checks that warn: where there are any, its numbers are not to be trusted."""
        from firstorder.evaluation.reporting import summary, trust

        return {one.model: one.reasons for one in trust.panels(self.run, summary.load(self.run))}

    def report(self, out: str | Path | None = None) -> list[Path]:
        """Write report.html, report.md and figures/; returns the paths.

        Args:
            out: the folder; by default that of the run.
        """
        from firstorder.evaluation.reporting import page

        return page.write(self.run, self.run.store.folder if out is None else Path(out))


def evaluate(
    specification: Mapping[str, Any] | str | Path | Specification,
    out: str | Path | None = None,
    *,
    only: bool = False,
    trust_code: bool = False,
    engine: Engine | None = None,
    computed: Callable[[Report], None] = lambda report: None,
) -> Evaluation:
    """Compute a run, or what its folder does not have of it.

    Args:
        specification: what is to be evaluated: the keys of a specification, a YAML file with them, or the
            name of one of firstorder's own; or one that is checked already.
        out: the folder of the run; one that is there goes on, and grows. Without one the results are gone with the
            object that is returned.
        only: a run that is there becomes what is asked for alone.
        trust_code: whether a module:function that a *file* names, or the run's folder, may be imported.
        engine: who computes the cells; by default this process.
        computed: called with every cell that was computed, at its end.

    Raises:
        ValueError: anything that does not fit, before anything is computed.
        FileNotFoundError: weights or data that are not there.
    """
    from firstorder.evaluation.names import documents
    from firstorder.evaluation.runs.computing import Engine, begin, compute
    from firstorder.evaluation.runs.growth import Growth
    from firstorder.evaluation.runs.specification import Specification, specify
    from firstorder.evaluation.runs.store import read

    if isinstance(specification, str | Path):
        values, lines = documents.read(Path(specification))
        specification = specify(values, source=str(specification), lines=lines, trust_code=trust_code)
    elif not isinstance(specification, Specification):
        specification = specify(specification)
    who, growth = engine or Engine(), Growth(only=only, trust_code=trust_code)
    who.check()
    folder = tempfile.mkdtemp() if out is None else out
    try:
        chosen, store = begin(specification, Path(folder), "firstorder.evaluation.evaluate(...)", growth=growth)
        compute(chosen, store, who, computed=computed)
        run = read(store.folder)
    except BaseException:
        if out is None:
            shutil.rmtree(folder)
        raise
    if out is None:
        weakref.finalize(run.store, shutil.rmtree, folder)
    return Evaluation(run)
