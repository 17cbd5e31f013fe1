"""Test images by name: packaged excerpts, .npz files, and folders of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from firstorder.attacks import validation
from firstorder.evaluation import packaged
from firstorder.evaluation.packaged import Images

PACKAGED = {"mnist": packaged.mnist, "cifar10": packaged.cifar10}
"""The excerpts that come with firstorder."""


def load(spec: str, *, count: int | None = None) -> Images:
    """The images that `spec` names, the first `count` of them.

    Args:
        spec: "mnist" or "cifar10" (packaged excerpts); an .npz file with `x`, uint8 of shape (N, H, W, C), or floating
            point of shape (N, C, H, W) in [0, 1], and `y`; or a folder of pictures of one size with a `labels.json`
            that maps file names to class indices.
        count: at most how many; None for all.

    Raises:
        ValueError: a name that names nothing, or a file that holds something else.
    """
    if spec in PACKAGED:
        images = PACKAGED[spec]()
        return Images(images.name, images.x[:count], images.y[:count], images.classes)
    path = Path(spec)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, count)
    if (path / "labels.json").is_file():
        return _folder(path, count)
    raise ValueError(
        f"unknown data {spec!r}; name {' or '.join(PACKAGED)}, an .npz file with x and y, or a folder with pictures "
        "and labels.json"
    )


def _npz(path: Path, count: int | None) -> Images:
    with np.load(path, allow_pickle=False) as data:
        missing = {"x", "y"} - set(data.files)
        if missing:
            raise ValueError(f"{path} has no array {' and '.join(sorted(missing))}; it has {', '.join(data.files)}")
        x, y = data["x"], data["y"]
    if x.ndim != 4 or y.shape != x.shape[:1]:
        raise ValueError(f"{path}: x has shape {x.shape} and y {y.shape}; images and labels (N,) are needed")
    if (x.dtype.kind != "f" and x.dtype != np.uint8) or y.dtype.kind not in "iu":
        raise ValueError(f"{path}: x is {x.dtype} and y {y.dtype}; uint8 or floating point and integers are needed")
    pixels, labels = torch.from_numpy(x[:count]), torch.from_numpy(y[:count].astype(np.int64))
    if pixels.dtype == torch.uint8:
        pixels = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
    validation.images(pixels, pixels.new_zeros(()), pixels.new_ones(()))
    return Images(path.stem, pixels.float(), labels, ())


def _folder(path: Path, count: int | None) -> Images:
    labels: dict[str, int] = json.loads((path / "labels.json").read_text(encoding="utf-8"))
    names = sorted(labels)[:count]
    if not names:
        raise ValueError(f"{path / 'labels.json'} names no picture")
    pictures = []
    for name in names:
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{path / 'labels.json'} names {name!r}, which lies outside the folder")
        with Image.open(file) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    sizes = {tuple(picture.shape) for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"the pictures in {path} have {len(sizes)} sizes; resize them to one")
    return Images(path.name, torch.stack(pictures).float() / 255, torch.tensor([labels[name] for name in names]), ())
