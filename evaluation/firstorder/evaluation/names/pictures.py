"""Pictures: decoded, brought to a size, and read from folders a part at a time."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from firstorder.evaluation.names.numbers import short

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Of pictures: 8 bits a channel, or less."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of pictures in folders and archives that no list names."""

LARGEST = 2**26
"""Values of an image in an .npz file, pixels of a picture."""

TRAINING, TESTING = ("train", "training"), ("test", "val", "validation", "valid")
"""What the splits of a data set are called."""

Part = tuple[Tensor, Tensor]
"""Images (n, C, H, W), uint8 or floating point in [0, 1], and their labels (n,)."""


class Labelled(NamedTuple):
    """A picture that is not decoded yet: its file or its bytes, what to call it, and its class."""

    content: Path | bytes
    name: str
    label: int


Read = tuple[str, tuple[str, ...], Iterator[Part]]
"""A data set's name, those of its classes where they are known, and its images in parts."""


def sided(rest: str) -> tuple[str, int | None]:
    """What is before @SIDE at the end of a name, and SIDE.

    Raises:
        ValueError: a side of no pixels, or of too many.
    """
    found = re.fullmatch(r"(.+)@(\d{1,6})", rest)
    if found is None:
        return rest, None
    side = int(found[2])
    if not 0 < side**2 <= LARGEST:
        raise ValueError(f"{short(rest)}: a side of {side} pixels is not possible; name one as in DIR@224")
    return found[1], side


def parts(
    pictures: Iterable[Labelled], size: int, side: int | None, source: str, *, brought: bool = True
) -> Iterator[Part]:
    """The pictures in parts of `size`, decoded as they are asked for.

    Args:
        pictures: in order.
        size: of a part.
        side: as in `decoded`.
        source: what holds them, for messages.
        brought: whether a name can say the side.

    Raises:
        ValueError: no picture, or a damaged one; pictures of several sizes without a side to bring them to.
    """
    left, shape = iter(pictures), None
    while chunk := list(islice(left, size)):
        x = [decoded(one, side) for one in chunk]
        shape = shape or x[0].shape
        other = next((i for i, picture in enumerate(x) if picture.shape != shape), None)
        if other is not None:
            remedy = ", or add @SIDE to the name, as in imagefolder:DIR@224" if brought else ""
            raise ValueError(
                f"the pictures in {source} have several sizes, {chunk[other].name} another; resize them to one{remedy}"
            )
        yield torch.stack(x), torch.tensor([one.label for one in chunk])


@contextmanager
def _silently() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decoded(one: Labelled, side: int | None = None) -> Tensor:
    """The picture (3, H, W), uint8; with `side` its shorter side is brought to it, and the middle cropped.

    Raises:
        ValueError: no picture, or one that is damaged or too large.
    """
    content = io.BytesIO(one.content) if isinstance(one.content, bytes) else one.content
    try:
        if isinstance(content, Path) and content.exists() and not content.is_file():
            raise _PictureError(f"{one.name} is no picture, but something else than a file")
        with _silently(), Image.open(content) as picture:
            if picture.width * picture.height > LARGEST:
                raise _PictureError(
                    f"{one.name} has {picture.width} x {picture.height} pixels, too many; make it smaller"
                )
            if picture.mode not in MODES:
                raise _PictureError(
                    f"{one.name} has values of another kind than 8 bits ({picture.mode}); save it as RGB"
                )
            made: Image.Image = picture.convert("RGB")
            made = made if side is None else _cropped(made, side)
            return torch.from_numpy(np.array(made)).permute(2, 0, 1)
    except (FileNotFoundError, MemoryError):
        raise
    except _PictureError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # decoders fail in any way
        why = getattr(error, "strerror", "") or error
        raise ValueError(" ".join(f"{short(one.name)[1:-1]} is no picture, or a damaged one: {why}".split())) from None


def by_class(rest: str, train: bool, size: int) -> Read:
    """A folder with a folder of pictures for each class, in alphabetical order; above them there may be splits.

    Raises:
        ValueError: no folder of that kind.
    """
    root, side = sided(rest)
    folder = split(Path(root), train)
    classes = sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    if not any(_is_picture(file) for name in classes for file in (folder / name).rglob("*")):
        raise ValueError(f"{root} holds no folders of pictures, one for each class; name their common folder")

    def found() -> Iterator[Labelled]:
        for label, name in enumerate(classes):
            for file in sorted((folder / name).rglob("*")):
                if _is_picture(file):
                    yield Labelled(file, str(file), label)

    return Path(root).name, tuple(classes), parts(found(), size, side, root)


def split(root: Path, train: bool) -> Path:
    """The folder of a split, where there are splits; the root itself elsewhere."""
    names = TRAINING if train else TESTING
    return next((root / name for name in names if (root / name).is_dir()), root)


def listed(path: Path, size: int) -> Iterator[Part]:
    """The pictures that a folder's labels.json names, by name.

    Raises:
        ValueError: a list that is none, pictures that are not there or of several sizes.
    """
    listing = path / "labels.json"
    try:
        labels = json.loads(listing.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing} is not JSON: {error}") from None
    if not isinstance(labels, dict) or not all(type(label) is int and abs(label) < 2**31 for label in labels.values()):
        raise ValueError(f'{listing} must map file names to class indices: {{"a.png": 0}}')
    if not labels:
        raise ValueError(f"{listing} names no picture")
    yield from parts(
        (within(path, name, labels[name], listing) for name in sorted(labels)), size, None, str(path), brought=False
    )


def within(folder: Path, name: str, label: int, listing: Path) -> Labelled:
    """A picture that a list names in its folder.

    Raises:
        ValueError: it lies outside.
    """
    file = folder / name
    try:
        outside = not file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or error
        raise ValueError(f"{short(str(file))[1:-1]} is no picture, or a damaged one: {why}") from None
    if outside:
        raise ValueError(f"{listing} names {short(name)}, which lies outside the folder")
    return Labelled(file, str(file), label)


class _PictureError(Exception):
    """A message of ours about a picture."""


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file()


def _cropped(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture whose shorter side is brought to `side`."""
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    if width * height > LARGEST:
        raise _PictureError(
            f"a picture of {picture.width} x {picture.height} pixels is too long to be brought to {side}"
        )
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))
