"""Nets that others trained and published, with what complete verifiers say of single images."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from firstorder.evaluation.names import data as images
from firstorder.evaluation.runs.limits import Limit
from firstorder.files import replacing

VERIFIED = {
    "vnncomp2021-cifar10-resnet.csv": "cifar10-wang2021-{}",
    "vnncomp2022-oval21.csv": "cifar10-oval-{}",
    "vnncomp2020-colt-mnist-0.1.csv": "mnist-balunovic2020-colt-0.1",
}
"""Files of what is proven of single images, and the nets they are about."""


@dataclass(frozen=True)
class Net:
    """A net, and what it was trained for.

    Attributes:
        name: of the packaged model, or of the file.
        path: the file; None for a packaged model.
        data, norm, eps: the kind of images, and the ball.
    """

    name: str
    path: Path | None
    data: str
    norm: str
    eps: float


PACKAGED = {
    net.name: net
    for net in (Net("mnist-cnn", None, "mnist", "Linf", 0.3), Net("fashion-cnn", None, "fashion-mnist", "Linf", 0.2))
}
"""The packaged robust models."""


def nets(folder: Path, names: Sequence[str] = ()) -> list[Net]:
    """The nets in a folder, by name; `names` of them and of the packaged models, by default all of the folder.

    Raises:
        ValueError: a name of none, or a file without the facts.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    every = [*PACKAGED, *found]
    unknown = [name for name in names if name not in every]
    if unknown or not found:
        raise ValueError(f"{folder} has no net {', '.join(unknown)}; choose {', '.join(every)}")
    return [PACKAGED.get(name) or _net(found[name]) for name in names or found]


def _net(path: Path) -> Net:
    with safe_open(str(path), "pt") as file:
        facts: dict[str, Any] = json.loads((file.metadata() or {}).get("zoo", "{}"))
    missing = [key for key in ("data", "norm", "eps") if key not in facts]
    if missing:
        raise ValueError(f"{path}: its metadata do not name {', '.join(missing)}; write them under zoo, as JSON")
    return Net(
        path.stem, path.resolve(), facts["data"], {"linf": "Linf", "l2": "L2"}[facts["norm"].lower()], facts["eps"]
    )


def limits(folder: Path) -> dict[str, list[Limit]]:
    """What is known of single images, by the name of the net, from the files in a folder; those that are not there
    say nothing. The radius is that of the specification: the column beside it is rounded, in some rows upwards.
    """
    found: dict[str, list[Limit]] = {}
    for name, pattern in VERIFIED.items():
        path = folder / name
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    net = pattern.format(row.get("net", "").partition(".")[0].removeprefix("cifar_").replace("_", "-"))
                    limit = Limit(int(row["test_index"]), _eps(row), row["verdict"] == "unsat", row["verdict"] == "sat")
                    found.setdefault(net.replace("resnet-", "resnet"), []).append(limit)
    return found


def _eps(row: Mapping[str, str]) -> float:
    """The radius of a row; where its specification is rounded to fewer digits than the column, k/255 next to that."""
    if "spec" not in row:
        return float(row["eps"])
    written, column = re.findall(r"eps_?([0-9]+\.[0-9]+)", row["spec"]), float(row["eps_pixels"])
    if written and abs(float(written[-1]) - column) < 2e-6:
        return float(written[-1])
    nearest = round(column * 255) / 255
    return nearest if abs(nearest - column) < 1e-6 else column


def chosen(spec: str, indices: Path, kind: str, out: Path) -> tuple[str, list[int]]:
    """The images of a data set that a file names, in an .npz file in `out`: its path, and their places in the data.

    Args:
        spec: the data, as a run names them.
        indices: with the columns set, position, test_index and label.
        kind: how the name of the set begins.
        out: where the images are written, unless they are there.

    Raises:
        ValueError: a file without such a set, or with labels that are not the data's.
    """
    with indices.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if kind.startswith(row["set"].partition("_")[0])]
    if not rows:
        raise ValueError(f"{indices} names no images of {kind}; leave out --indices, or choose nets with --net")
    places = [int(row["test_index"]) for row in rows]
    path = out / f"{kind}-{indices.stem}.npz"
    if not path.exists():
        every = images.load(spec, count=max(places) + 1)
        x, y = every.x[places].numpy(), every.y[places].numpy()
        if y.tolist() != [int(row["label"]) for row in rows]:
            raise ValueError(f"{indices} has other labels than {spec}; name the data that it is about")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file_:
            np.savez(file_, x=x, y=y)
    return str(path), places
