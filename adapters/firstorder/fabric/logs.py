"""The logs of a run: CSV files that a resumed run continues without gap or repetition, and Lightning's loggers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from firstorder.files import replacing

STEPS = "steps.csv"
EPOCHS = "epochs.csv"
GRADIENTS = "gradients.csv"


class Log:
    """Tables in a folder, each in its own CSV file whose first column is the step, and scalars in loggers.

    Args:
        folder: of the run.
        step: the number of steps done: rows beyond it, left by a killed run, are dropped.
        tensorboard: whether event files are written too, to folder/tensorboard.
        loggers: further ones, Fabric's or Lightning's.
    """

    def __init__(
        self, folder: Path, *, step: int = 0, tensorboard: bool = True, loggers: Iterable[Logger] = ()
    ) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in (STEPS, EPOCHS, GRADIENTS):
            _truncate(folder / name, step)
        board = [TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1)] if tensorboard else []
        self._loggers: list[Logger] = [*board, *loggers]

    def rows(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        """Append rows of the same keys, `step` first, to a table."""
        path = self._folder / name
        if name not in self._files:
            self._files[name] = path.open("a", newline="", encoding="utf-8")
        writer = csv.DictWriter(self._files[name], list(rows[0]), lineterminator="\n")
        if self._files[name].tell() == 0:
            writer.writeheader()
        writer.writerows(rows)

    def scalars(self, name: str, row: Mapping[str, float]) -> None:
        """Append a row, `step` first, to a table and to the loggers."""
        self.rows(name, [row])
        group = Path(name).stem
        values = {f"{group}/{key}": value for key, value in row.items() if key != "step"}
        for logger in self._loggers:
            logger.log_metrics(values, step=int(row["step"]))

    def flush(self) -> None:
        """Bring everything to the files."""
        for file in self._files.values():
            file.flush()
        for logger in self._loggers:
            logger.save()

    def close(self) -> None:
        """Bring everything to the files and close them."""
        self.flush()
        for file in self._files.values():
            file.close()
        for logger in self._loggers:
            logger.finalize("success")


def _truncate(path: Path, step: int) -> None:
    """Drop incomplete rows and those beyond `step`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join([*lines[:1], *kept]) if kept else "", encoding="utf-8")
