"""The adversarial pictures of a run as files of 8 bits, as the targets of transfer have classified them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from firstorder.evaluation.reporting.tables import csv_text, radius
from firstorder.evaluation.runs.ball import LEVELS, eight_bit
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

COLUMNS = ("model", "target", "defence", "attack", "eps", "seed", "example", "label", "adversarial")


def save(run: Run, folder: Path) -> list[Path]:
    """Write what attacks made of the images that the run keeps as pictures.

    Every source, attack, radius and seed is a folder of PNG files named by the image's place in the run, with a
    labels.json of true classes, so that it can be named as data. `pictures.csv` lists the folders.

    Args:
        run: with `pictures` in its specification.
        folder: is made.

    Returns:
        `pictures.csv`, and the folders.

    Raises:
        ValueError: images that no PNG file holds, or a run without pictures.
    """
    shape = tuple(run.facts["data"]["shape"])
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"images of shape {shape} are no pictures, which have 1 or 3 channels; leave out --save")
    labels: dict[Path, dict[str, int]] = {}
    lines: dict[Path, list[object]] = {}
    for table in run.tables(COLUMNS):
        rows = table.filter(table["adversarial"].is_valid()).to_pylist()
        if not rows:
            continue
        first = rows[0]
        setting = [first["model"], first["attack"], first["eps"], first["seed"]]
        place = _place(folder, setting, lines)
        lines[place] = setting
        for row, image in zip(rows, _images(run, rows, shape), strict=True):
            name = f"{row['example']:06d}.png"
            _write(image, place / name)
            labels.setdefault(place, {})[name] = row["label"]
    if not lines:
        raise ValueError("the run keeps no pictures; set pictures to how many of the images it is to keep")
    for place, own in labels.items():
        write_text(place / "labels.json", json.dumps(own, indent=1))
    header = ["folder", "source", "attack", "eps", "seed", "images"]
    found = [[place.name, *setting, len(labels[place])] for place, setting in lines.items()]
    write_text(folder / "pictures.csv", csv_text(header, found))
    return [folder / "pictures.csv", *lines]


def _place(folder: Path, setting: list[Any], known: dict[Path, list[object]]) -> Path:
    """The folder of a setting: its words, with a number where another setting has the same."""
    source, attack, eps, seed = setting
    words = [source, attack, *([] if eps is None else [f"eps={radius(eps)}"]), f"seed={seed}"]
    name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", "-".join(words)).strip("_.")[:120]
    place, number = folder / name, 2
    while known.get(place, setting) != setting:
        place, number = folder / f"{name}-{number}", number + 1
    return place


def _images(run: Run, rows: list[dict[str, Any]], shape: tuple[int, ...]) -> Tensor:
    """The adversarial pictures (N, C, H, W) of rows, in their order."""
    made = np.stack([np.frombuffer(row["adversarial"], "<f4").reshape(shape) for row in rows])
    first = rows[0]["example"]
    x = run.examples(first, rows[-1]["example"] + 1)[[row["example"] - first for row in rows]]
    return eight_bit(torch.from_numpy(made), x, rows[0]["eps"], run.facts["specification"]["norm"])


def _write(image: Tensor, path: Path) -> None:
    pixels = (LEVELS * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with replacing(path) as temporary:
        Image.fromarray(cast(Any, pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)).save(temporary, format="PNG")
