"""RobustBench's benchmark with any registered attack in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from robustbench.data import get_preprocessing, load_clean_dataset
from robustbench.eval import benchmark as original
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
from robustbench.utils import DATASET_CLASSES, update_json
from torch import Tensor, nn

from firstorder.attacks import validation
from firstorder.attacks.outputs import logits_of, require_logits
from firstorder.autoattack import AutoAttack
from firstorder.autoattack.conditions import evaluated, home

Preprocessing = str | Callable[..., Any] | None


def benchmark(
    model: nn.Module,
    n_examples: int = 10000,
    dataset: str | BenchmarkDataset = BenchmarkDataset.cifar_10,
    threat_model: str | ThreatModel = ThreatModel.Linf,
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str = "./data",
    corruptions_data_dir: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: str | None = None,
    preprocessing: Preprocessing = None,
    aa_state_path: str | Path | None = None,
    *,
    attacks: Sequence[str] | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    seed: int | None = None,
    details: bool = False,
    audit: int | None = None,
) -> Any:
    """Clean and robust accuracy of a model, as `robustbench.benchmark`.

    Args:
        model: maps (N, C, H, W) in [0, 1] to logits; it is put in evaluation mode for the evaluation.
        device: where the model is moved to; None leaves it where it is.
        to_disk: file the figures in robustbench's `model_info`, in the working directory; for `attacks=None` only.
        attacks: names of AutoAttack's and of registered attacks, run one after the other on what is left;
            "autoattack" means the standard four, "verdict" what AutoAttack(version="fast") runs, its closing stages
            once over all that is left. None runs the standard four, as robustbench does.
        parameters: registry name to hyper-parameters.
        x: images (N, C, H, W) in [0, 1] to use instead of the data set's, with labels y (N,).
        y: their labels.
        seed: of every attack; None takes the time, as robustbench does.
        details: return the record of the evaluation as well.
        audit: of a verdict, see `AutoAttack`: the standard four on a random sample of so many that it gave up.

    Returns:
        (clean accuracy, robust accuracy), with `details` followed by the `firstorder.autoattack.Record`.

    Raises:
        ValueError: eps missing, x without y, a model with another number of classes than the data set, or an
            argument that does not go with the threat model.

    Warns:
        RobustnessWarning: the model is in training mode; it is evaluated in evaluation mode.
    """
    data, threat = BenchmarkDataset(dataset), ThreatModel(threat_model)
    if to_disk and model_name is None:
        raise ValueError("to_disk=True needs the name to file the result under; pass model_name")
    if to_disk and attacks is not None:
        raise ValueError("to_disk=True files the figure of the standard AutoAttack; leave attacks out")
    if threat not in (ThreatModel.Linf, ThreatModel.L2):
        if attacks is not None or x is not None or details or audit is not None:
            raise ValueError(
                f"threat_model={threat.value!r} has no attacks; leave out attacks, x, y, details and audit"
            )
        words: dict[str, Any] = {"dataset": data, "threat_model": threat, "to_disk": to_disk, "model_name": model_name}
        words |= {"data_dir": data_dir, "corruptions_data_dir": corruptions_data_dir, "device": home(model, device)}
        with evaluated(model):
            return original(model, n_examples, batch_size=batch_size, eps=eps, preprocessing=preprocessing, **words)
    if eps is None:
        raise ValueError(f"eps=None: threat_model={threat.value!r} needs the radius; pass eps, for example 8/255")
    if (x is None) != (y is None):
        raise ValueError("x and y belong together; pass both or neither")
    if n_examples is not None:  # which means all
        validation.count("n_examples", n_examples)
    validation.count("batch_size", batch_size)
    if x is not None and y is not None and (not len(x) or len(x) != len(y)):
        raise ValueError(
            f"there are {len(x)} images and {len(y)} labels; pass one label for each of at least one image"
        )
    device = home(model, device)
    model = model.to(device)
    with evaluated(model):
        if x is None or y is None:
            prepare = get_preprocessing(data, threat, model_name, preprocessing)
            x, y = load_clean_dataset(data, n_examples, data_dir, prepare)
            _check_classes(model, x, data, device)
        x, y = x[:n_examples], y[:n_examples]
        words = {"device": device, "log_path": log_path, "parameters": parameters, "audit": audit}
        adversary = AutoAttack(model, threat.value, eps, seed, True, attacks or (), **words)
        adversary.run_standard_evaluation(x, y, bs=batch_size, state_path=aa_state_path)
    record = adversary.record
    assert record is not None
    clean, robust = record.accuracy["clean"], float(record.robust.float().mean())
    if to_disk:
        update_json(data, threat, model_name, clean, robust, eps)
    return (clean, robust, record) if details else (clean, robust)


def _check_classes(model: nn.Module, x: Tensor, data: BenchmarkDataset, device: torch.device) -> None:
    with torch.no_grad():
        scores = logits_of(model(x[:1].to(device)))
    require_logits(scores, len(x[:1]))
    found = scores.shape[1]
    if found != DATASET_CLASSES[data]:
        raise ValueError(
            f"the model has {found} classes, {data.value} has {DATASET_CLASSES[data]}; "
            "pass the dataset it was trained on, or your own x and y"
        )
