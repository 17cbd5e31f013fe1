"""RobustBench's model zoo, with errors that say what to do."""

from __future__ import annotations

import difflib
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
from robustbench.utils import load_model as load_from_zoo
from torch import nn


def load_model(
    model_name: str,
    model_dir: str | Path = "./models",
    dataset: str | BenchmarkDataset = BenchmarkDataset.cifar_10,
    threat_model: str | ThreatModel = ThreatModel.Linf,
    custom_checkpoint: str = "",
    *,
    allow_pickle: bool = False,
) -> nn.Module:
    """A model of RobustBench's zoo in evaluation mode, as `robustbench.load_model`.

    The checkpoint is expected at `model_dir/dataset/threat_model/model_name.pt` and downloaded where it is missing.

    Args:
        allow_pickle: load checkpoints that hold more than tensors. Unpickling runs code from the file: only
            for files whose origin you trust.

    Raises:
        ValueError: an unknown name, or a checkpoint that needs unpickling.
        FileNotFoundError: the checkpoint is missing and could not be downloaded.
    """
    data, threat = BenchmarkDataset(dataset), ThreatModel(ThreatModel(threat_model).value.replace("_3d", ""))
    if threat not in model_dicts[data]:
        raise ValueError(
            f"RobustBench has no {data.value} models for threat_model={threat.value!r}; "
            f"it has {', '.join(t.value for t in model_dicts[data])}"
        )
    known = model_dicts[data][threat]
    alias = f"{model_name.lower().replace('-', '_')}_{data.value.lower()}_{threat.value.lower()}"
    from_timm = timm.is_model(alias)
    if model_name not in known and not from_timm:
        near = difflib.get_close_matches(model_name, known, n=3)
        raise ValueError(
            f"RobustBench has no {data.value} {threat.value} model {model_name!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else f"; it has {len(known)}, see robustbench.model_zoo")
        )
    files = {} if from_timm else _checkpoints(known[model_name]["gdrive_id"], model_name, Path(model_dir), data, threat)
    missing = {path: drive for path, drive in files.items() if not path.is_file()}
    try:
        with _unpickling(allow_pickle):
            model: nn.Module = load_from_zoo(model_name, model_dir, data, threat, custom_checkpoint)
    except pickle.UnpicklingError as error:
        broken = [path for path in files if path.is_file() and not _pickled(path)]
        if broken or allow_pickle:
            raise ValueError(
                f"{' and '.join(map(str, broken or files))}: not a PyTorch checkpoint, perhaps a web page or half a "
                "download; delete it and load again"
            ) from error
        raise ValueError(
            f"the checkpoint of {model_name} holds more than tensors, and unpickling it would run code from the file; "
            f"pass allow_pickle=True if you trust {' and '.join(map(str, files))} ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        absent = [f"{path} (Google Drive id {drive})" for path, drive in missing.items() if not path.is_file()]
        if not absent:
            raise
        raise FileNotFoundError(
            f"the checkpoint of {model_name} could not be downloaded: {type(error).__name__}: {error}. "
            f"Download it by hand and put it at {', '.join(absent)}; RobustBench publishes no checksum"
        ) from error
    return model


def _checkpoints(
    drive: str | list[str] | None, name: str, folder: Path, data: BenchmarkDataset, threat: ThreatModel
) -> dict[Path, str]:
    """The files the zoo expects, each with the Google Drive id it is fetched from."""
    path = folder / data.value / threat.value / f"{name}.pt"
    if isinstance(drive, list):
        return {path.with_name(f"{path.name}_m{i}.pt"): part for i, part in enumerate(drive)}
    return {} if drive is None else {path: drive}


def _pickled(path: Path) -> bool:
    """Whether the file looks like torch.save's: a zip archive, or a pickle of old."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


@contextmanager
def _unpickling(allowed: bool) -> Iterator[None]:
    """torch.load within unpickles only tensors, or anything if `allowed`, whatever torch's default is."""
    names = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[allowed]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
