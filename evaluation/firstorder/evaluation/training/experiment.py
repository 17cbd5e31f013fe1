"""A run of training from its configuration to its result on the test images."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import TensorDataset

from firstorder.attacks.distribution import versions
from firstorder.evaluation.names import documents
from firstorder.evaluation.runs.seals import from_json, to_json
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import Configuration
from firstorder.evaluation.training.landscape import Landscape, landscape
from firstorder.fabric import Robustness, Trainer, evaluate
from firstorder.fabric.batches import Pairs
from firstorder.fabric.checkpoint import BEST, LAST, STATE, load_weights
from firstorder.fabric.contents import fingerprint
from firstorder.fabric.run import Progress
from firstorder.files import replacing, write_text

RESULT = "result.json"
LANDSCAPE = "landscape.npz"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ends with, on the images called `images` ("test", or "validation" where there are no test images).

    Attributes:
        images: which images, and how many.
        best: accuracy of the best epoch's weights, `robust` under the evaluation attack.
        last: of the last epoch's.
        best_epoch: counted from 1.
        radii: of the best weights, the robust accuracy at further radii, by radius.
        overfitting: (best.robust - last.robust) / best.robust (ENGM, Table 2); 0 where best.robust is.
    """

    images: str
    count: int
    best: Robustness
    last: Robustness
    best_epoch: int
    overfitting: float
    radii: Mapping[str, float] = field(default_factory=dict)


def run(
    configuration: Configuration,
    folder: Path,
    fabric: Fabric,
    *,
    resume: bool = False,
    workers: int = 0,
    tensorboard: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Train, evaluate the best and the last weights, and write all of it into `folder`, which all processes see.

    Raises:
        ValueError: a configuration that does not fit its data; a folder with another run, or one not to be resumed.
    """
    recipe = parts.recipe(configuration)
    train, validation, test, classes = parts.splits(configuration)
    model = parts.network(configuration, classes)
    trainer = Trainer(fabric, recipe, folder, workers=workers, tensorboard=tensorboard)
    if fabric.is_global_zero and not (folder / STATE).exists():
        configurations.write(configuration, folder / configurations.FILE)
    if fabric.is_global_zero:
        for logger in fabric.loggers:
            logger.log_hyperparams(configuration.model_dump(mode="json"))
    others = {} if test is None else {"test": test}
    best = trainer.fit(model, train, validation, resume=resume, progress=progress, others=others)
    name, images = ("validation", validation) if test is None else ("test", test)
    found: dict[str, Robustness] = {}
    scapes: dict[str, Landscape] = {}
    for file in (BEST, LAST):
        model.load_state_dict(load_weights(folder / file))
        label = Path(file).stem
        found[label] = evaluate(fabric, model, images, recipe.judge, bounds=recipe.bounds, seed=configuration.seed)
        if configuration.landscape and fabric.is_global_zero:
            scapes[label] = _landscape(configuration, model, images, fabric.device)
    model.load_state_dict(load_weights(folder / BEST))
    further = (configuration.model_copy(update={"eps": eps}) for eps in configuration.radii)
    radii = {
        f"{own.eps:g}": evaluate(
            fabric, model, images, parts.evaluation_attack(own, parts.inner(own)), bounds=recipe.bounds, seed=own.seed
        ).robust
        for own in further
    }
    outcome = Outcome(
        images=name,
        count=len(images),
        best=found["best"],
        last=found["last"],
        best_epoch=best.epoch,
        radii=radii,
        overfitting=1 - found["last"].robust / found["best"].robust if found["best"].robust else 0.0,
    )
    if fabric.is_global_zero:
        if scapes:
            best_scape, last_scape = (scapes[name] for name in ("best", "last"))
            with replacing(folder / LANDSCAPE) as temporary:
                np.savez(
                    temporary,
                    offsets=best_scape.offsets.numpy(force=True),
                    best=best_scape.loss.numpy(force=True),
                    last=last_scape.loss.numpy(force=True),
                )
        write_text(
            folder / RESULT,
            to_json(
                {
                    **asdict(outcome),
                    "versions": versions(["torch", "lightning-fabric"]),
                    "data": contents(train, validation, test),
                },
                _written(folder),
            ),
        )
    return outcome


def load(folder: Path) -> Outcome:
    """The outcome that `run` wrote.

    Raises:
        ValueError: a folder without one, or with one that is damaged or of another configuration.
    """
    values = _result(folder)
    for name in ("versions", "data"):
        values.pop(name, None)
    return Outcome(**{**values, "best": Robustness(**values["best"]), "last": Robustness(**values["last"])})


def contents(train: Pairs, validation: Pairs, test: Pairs | None) -> dict[str, str]:
    """A line for each of the images, which equal ones have."""
    named = {"training": train, "validation": validation, "test": test}
    return {name: fingerprint(images) for name, images in named.items() if images is not None}


def trained_on(folder: Path) -> dict[str, str]:
    """The `contents` of the images of a finished run; nothing for one by an earlier version, which did not keep them.

    Raises:
        ValueError: as `load`.
    """
    return dict(_result(folder).get("data", {}))


def _result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    if not path.exists():
        raise ValueError(f"{folder} holds no {RESULT}; finish the run: firstorder train --out {folder} --resume")
    values = from_json(path, _written(folder))
    if values is None:
        raise ValueError(
            f"{path} is damaged, or of another {configurations.FILE}; delete it, then firstorder train --out {folder} "
            "--resume"
        )
    return values


def arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The losses around images that `run` wrote: `offsets`, `best` and `last`; none where it was to write none.

    Raises:
        ValueError: they are damaged.
    """
    path = folder / LANDSCAPE
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in ("offsets", "best", "last")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"{path} is damaged; delete it, then firstorder train --out {folder} --resume") from None


def _written(folder: Path) -> dict[str, Any]:
    """The values of the folder's file of the configuration, which a result belongs to."""
    path = folder / configurations.FILE
    return documents.read(path)[0] if path.exists() else {}


def _landscape(
    configuration: Configuration, model: nn.Module, images: TensorDataset, device: torch.device
) -> Landscape:
    x, y = (part[: configuration.landscape].to(device) for part in images.tensors)
    generator = torch.Generator(device).manual_seed(configuration.seed)
    return landscape(model, x, y, eps=configuration.eps, generator=generator)
