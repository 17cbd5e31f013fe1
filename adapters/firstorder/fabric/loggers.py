"""Loggers by name, beside a run's own files: Lightning's for Weights & Biases and MLflow."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
"""What a run logs to, by name. The CSV files are always written; TensorBoard's are the `Trainer`'s own."""


def logger(name: str, folder: Path) -> Logger:
    """The logger of a run in a folder; a resumed run goes on in the same one.

    Where the rows go is said as these services want it: WANDB_PROJECT and WANDB_MODE, MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME; without a server MLflow writes to `folder`/mlruns.

    Args:
        name: "wandb" or "mlflow".
        folder: of the run, whose name is the run's.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: a package that it needs is not installed; the message has the command.
    """
    if name not in ("wandb", "mlflow"):
        raise ValueError(f"logger={name!r} is not known; choose {', '.join(LOGGERS)}")
    missing = [module for module in (name, "pytorch_lightning") if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the logger {name} needs {' and '.join(missing)}: pip install {name} pytorch-lightning", name=missing[0]
        )
    made: Any = import_module("pytorch_lightning.loggers")
    own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if name == "wandb":
        found: Logger = made.WandbLogger(name=folder.name, id=own, resume="allow", save_dir=folder)
        return found
    return _mlflow(made, folder, own)


def _mlflow(made: Any, folder: Path, own: str) -> Logger:
    """The logger of MLflow's run that has the folder's tag, a new one where there is none."""
    uri = environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
    experiment = environ.get("MLFLOW_EXPERIMENT_NAME", "firstorder")
    client = import_module("mlflow").tracking.MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    tag = "firstorder.folder"
    runs = [] if known is None else client.search_runs([known.experiment_id], f"tags.`{tag}` = '{own}'")
    found: Logger = made.MLFlowLogger(
        experiment_name=experiment,
        run_name=folder.name,
        tracking_uri=uri,
        tags={tag: own},
        run_id=runs[0].info.run_id if runs else None,
    )
    return found
