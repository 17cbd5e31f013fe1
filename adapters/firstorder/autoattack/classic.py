"""AutoAttack with its classic signature, from whichever distribution is installed.

The original distribution installs a module `autoattack`. The one on the package index, pyautoattack, installs another
module with another signature: `attacks=` for `attacks_to_run=`, keyword-only, `batch_size=` for `bs=`, and a pair as
result. `ClassicAutoAttack` is the class of the first that is found, with the signature of the original.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstorder.autoattack.conditions import home


def _original() -> tuple[Any, bool]:
    """The class of the original distribution and True, else pyautoattack's and False."""
    for name in ("autoattack", "pyautoattack"):
        if name not in sys.modules:
            spec = find_spec(name)
            if spec is None or spec.origin is None:  # absent, or a mere folder of that name
                continue
        cls = getattr(import_module(name), "AutoAttack", None)
        if cls is not None:
            return cls, "attacks_to_run" in inspect.signature(cls).parameters
    raise ModuleNotFoundError("neither autoattack nor pyautoattack is installed", name="pyautoattack")


ORIGINAL: Any
ORIGINAL, CLASSIC = _original()

NAMES = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
"""AutoAttack's own attacks."""

VERSIONS = ("standard", "plus", "rand")
"""AutoAttack's own lists of attacks."""


class ClassicAutoAttack(ORIGINAL):  # type: ignore[misc]
    """AutoAttack's class with the signature that papers and robustbench use.

    Args:
        model: maps (N, C, H, W) in [0, 1] to logits (N, K).
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball.
        seed: of every attack; None takes the time.
        verbose: log progress, in the logger "auto-attack".
        attacks_to_run: for version="custom" only.
        version: "standard", "plus", "rand" or "custom".
        is_tf_model: must be False.
        device: where batches are moved to; the model's by default.
        log_path: file that gets the log as well.
    """

    attacks_to_run: list[str]

    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        if is_tf_model:
            raise ValueError("is_tf_model=True: TensorFlow models are not supported; pass a PyTorch model")
        words: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "version": version}
        words["device"] = home(model, device)
        names = list(attacks_to_run)
        if CLASSIC:
            super().__init__(model, verbose=verbose, attacks_to_run=names, log_path=log_path, **words)
        else:
            super().__init__(model, attacks=names or None, **words)
            self.attacks_to_run = list(self.attacks_to_run or [])
        self.verbose = verbose
        self.log_path = log_path

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Adversarial examples (N, ...), x itself where none was found; with the predicted labels if asked for."""
        path = None if state_path is None else Path(state_path)
        with self._logging():
            if CLASSIC:
                return super().run_standard_evaluation(x_orig, y_orig, bs, return_labels, path)
            adversarial, labels = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=path)
        return (adversarial, labels) if return_labels else adversarial

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Every attack on all examples by itself: name to what `run_standard_evaluation` returns."""
        names, found = list(self.attacks_to_run), {}
        try:
            for name in names:
                self.attacks_to_run = [name]
                found[name] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        finally:
            self.attacks_to_run = names
        return found

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """pyautoattack's log in `log_path`; the original writes it by itself."""
        if CLASSIC or self.log_path is None:
            yield
            return
        logger = logging.getLogger("auto-attack")
        path = str(Path(self.log_path).absolute())
        if any(isinstance(h, logging.FileHandler) and h.baseFilename == path for h in logger.handlers):
            yield
            return
        handler, level = logging.FileHandler(self.log_path, encoding="utf-8"), logger.level
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()
