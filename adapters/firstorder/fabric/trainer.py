"""The training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

from firstorder.attacks import validation
from firstorder.fabric.batches import Pairs
from firstorder.fabric.checkpoint import load_state
from firstorder.fabric.recipe import Recipe
from firstorder.fabric.run import Best, Progress, Run


class Trainer:
    """Trains a model by a recipe, in a folder that holds all there is to know about the run.

    The folder gets `state.pt` (for resumption), `best.safetensors` and `last.safetensors` (weights), `steps.csv`,
    `epochs.csv`, `gradients.csv` and `tensorboard/`. A run that was killed at any moment and is resumed ends with the
    weights of an uninterrupted one, on the CPU bit for bit. Under several processes every one attacks and weighs its
    own part of each batch, and the gradients are averaged; BatchNorm normalises by the part, and its running
    statistics are averaged whenever they are used.

    Args:
        fabric: launched; `make` builds one.
        recipe: what is trained, and how.
        folder: of the run.
        workers: processes that load examples which are not in memory.
        log_every: steps from row to row of `steps.csv`.
        tensorboard: whether to write event files. Other loggers are the fabric's: make(loggers=[...]).
    """

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        folder: Path | str,
        *,
        workers: int = 0,
        log_every: int = 10,
        tensorboard: bool = True,
    ) -> None:
        precision = fabric.strategy.precision
        if isinstance(precision, MixedPrecision):
            raise ValueError(
                "Fabric's own mixed precision wants one scalar loss; build the Fabric with firstorder.fabric.make(...) "
                f"or with plugins=[Autocast({precision.precision!r}, device)]"
            )
        validation.count("log_every", log_every)
        validation.count("workers", workers, low=0)
        self.fabric, self.recipe, self.folder = fabric, recipe, Path(folder)
        self.workers, self.log_every, self.tensorboard = workers, log_every, tensorboard

    def fit(
        self,
        model: nn.Module,
        train: Pairs,
        judged: Pairs,
        *,
        resume: bool = False,
        progress: Progress | None = None,
        others: Mapping[str, Pairs] | None = None,
    ) -> Best:
        """Train `model` in place.

        Args:
            model: the bare module with its first weights (of process 0).
            train: examples within the recipe's bounds and labels.
            judged: others, for validation, to choose the best epoch by.
            resume: continue the run in the folder, from the start if it had not saved a state.
            progress: called after every step with `step` and `steps`, and after every epoch with its row as well.
            others: further data sets that belong to the run, by what they are for: {"test": images}. They are not used,
                but a run is resumed only with the same ones, as with the same `train` and `judged` (see `fingerprint`).

        Raises:
            ValueError: a folder with a run that is not to be resumed, or of another run or other data; a state that is
                damaged; weights of the best epoch that are missing or damaged; data and batch sizes that do not fit.
            FloatingPointError: the loss is no longer finite.
        """
        run = Run(
            self.fabric,
            self.recipe,
            self.folder,
            model,
            train,
            judged,
            others or {},
            workers=self.workers,
            log_every=self.log_every,
        )
        state = load_state(self.folder, run.identity)
        if state is not None and not resume:
            raise ValueError(f"{self.folder} holds a run already; resume it, or train into another folder")
        run.restore(state)
        return run.go(progress or (lambda row: None), tensorboard=self.tensorboard)
