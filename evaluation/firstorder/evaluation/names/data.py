"""Images by name: packaged excerpts, .npz files, folders of pictures, torchvision's layouts, RobustBench's data."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from firstorder.attacks import validation
from firstorder.evaluation.names import pictures, shards
from firstorder.evaluation.names.packaged import DATA, Images
from firstorder.evaluation.names.pictures import LARGEST

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Data sets in torchvision's layouts, by name: their classes there."""

SOURCES = {"imagefolder": pictures.by_class, "hf": shards.hugging_face, "wds": shards.webdataset}
"""What reads data sets of pictures, by the word before the colon."""

Part = pictures.Part

MOST = 10**7
"""Images in an .npz file."""


class Stream(NamedTuple):
    """Images a part at a time: the data set's name, the names of its classes where they are known, and the parts."""

    name: str
    classes: tuple[str, ...]
    parts: Iterator[Part]


def family(spec: str) -> str:
    """The data set that `spec` names images of, as "mnist" or "cifar10"; empty where that is not known."""
    source, _, rest = spec.partition(":")
    if source == "robustbench":
        return rest.partition(":")[0]
    return source if spec in DATA or (source in TORCHVISION and rest) else ""


def load(spec: str, *, count: int | None = None, train: bool = False) -> Images:
    """The images that `spec` names, the first `count` of them; see `stream`."""
    found = stream(spec, count=count, train=train)
    parts = list(found.parts)
    return Images(found.name, torch.cat([pixels(x) for x, _ in parts]), torch.cat([y for _, y in parts]), found.classes)


def pixels(x: Tensor) -> Tensor:
    """Images in [0, 1] from those of a part."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def stream(spec: str, *, skip: int = 0, count: int | None = None, train: bool = False, size: int = 256) -> Stream:
    """The images that `spec` names, in parts of `size`; what the file format allows is read as the parts are asked for.

    Args:
        spec: "mnist" or "cifar10" (packaged excerpts); an .npz file with `x`, uint8 of shape (N, H, W, C), or floating
            point of shape (N, C, H, W) in [0, 1], and `y`, or several such files with commas between them, whose
            images follow one another; a folder of pictures of one size with a `labels.json` that
            maps file names to class indices; "mnist:DIR", "fashion-mnist:DIR", "cifar10:DIR", "cifar100:DIR" in
            torchvision's layouts; "robustbench:NAME:DIR", which RobustBench downloads where it is missing;
            "imagefolder:DIR", a folder for each class; "hf:NAME-or-FOLDER", a data set of the hub: parquet files, or
            pictures in folders or with metadata; "wds:SHARDS", WebDataset's tar files, "a-{000..012}.tar" or "*.tar".
            The last three may end with @SIDE: pictures whose shorter side is brought to it, and cropped.
        skip: how many images at the start to leave out.
        count: at most how many; None for all.
        train: the training split, where there are two.

    Raises:
        ValueError: a name that names nothing, a file that holds something else, or no image left.
        FileNotFoundError: data that could neither be found nor downloaded.
    """
    path, (source, _, rest) = Path(spec), spec.partition(":")
    if spec in DATA:
        images = DATA[spec]()
        name, classes, parts = images.name, images.classes, _split(images.x, images.y, size)
    elif source in TORCHVISION and rest:
        name, classes, parts = source, (), _torchvision(source, rest, train, size)
    elif source == "robustbench" and rest:
        name, classes, parts = rest.partition(":")[0], (), _robustbench(rest, count and count + skip, size)
    elif source in SOURCES and rest:
        name, classes, parts = SOURCES[source](rest, train, size)
    elif path.suffix == ".npz" and path.is_file():
        name, classes, parts = path.stem, (), _npz(path, size)
    elif files := _several(spec):
        name, classes, parts = "+".join(file.stem for file in files), (), _joined(files, size)
    elif (path / "labels.json").is_file():
        name, classes, parts = path.name, (), pictures.listed(path, size)
    else:
        raise ValueError(
            f"unknown data {spec!r}; name {' or '.join(DATA)}, an .npz file with x and y, a folder with pictures "
            f"and labels.json, {', '.join(TORCHVISION)} with :DIR, imagefolder:DIR, hf:NAME-or-FOLDER, wds:SHARDS, or "
            "robustbench:NAME:DIR"
        )
    return Stream(name, classes, _checked(_cut(parts, skip, count), spec, skip))


def _split(x: Tensor, y: Tensor, size: int) -> Iterator[Part]:
    return zip(x.split(size), y.split(size), strict=True)


def _cut(parts: Iterator[Part], skip: int, count: int | None) -> Iterator[Part]:
    """Without the first `skip` images, and at most `count`."""
    left = count
    for x, y in parts:
        gone = min(skip, len(x))
        skip -= gone
        x, y = x[gone:][:left], y[gone:][:left]
        if len(x):
            yield x, y
        left = None if left is None else left - len(x)
        if left == 0:
            return


def _checked(parts: Iterator[Part], spec: str, skip: int) -> Iterator[Part]:
    empty = True
    for x, y in parts:
        empty = False
        if x.is_floating_point():
            try:
                validation.images(x, x.new_zeros(()), x.new_ones(()), remedy=validation.RESCALE)
            except ValueError as error:
                raise ValueError(f"{spec}: {error}") from None
        yield x, y
    if empty:
        raise ValueError(f"{spec} has no image{f' after the first {skip}' if skip else ''}; lower skip, or name others")


def _several(spec: str) -> list[Path]:
    """The .npz files that `spec` names with commas between them; none where it names something else."""
    files = [Path(name) for name in spec.split(",")]
    if len(files) < 2 or any(file.suffix != ".npz" for file in files):
        return []
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found; the .npz files of {spec!r} must all be there")
    return files


def _joined(files: list[Path], size: int) -> Iterator[Part]:
    """The images of all files, which must be alike."""
    kind: tuple[torch.Size, bool] | None = None
    for file in files:
        for x, y in _npz(file, size):
            kind = kind or (x.shape[1:], x.dtype == torch.uint8)
            if kind != (x.shape[1:], x.dtype == torch.uint8):
                raise ValueError(
                    f"{file} has images of shape {tuple(x.shape[1:])}, {x.dtype}, and {files[0]} of "
                    f"{tuple(kind[0])}, {'uint8' if kind[1] else 'floating point'}; they must be alike"
                )
            yield x, y


def _npz(path: Path, size: int) -> Iterator[Part]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = {"x", "y"} - set(names)
            if missing:
                raise ValueError(f"{path} has no array {' and '.join(sorted(missing))}; it has {', '.join(names)}")
            with archive.open("y.npy") as file:
                labels, kind = _header(path, file, archive.getinfo("y.npy").file_size)
                y = _rows(path, file, labels, kind, labels[0] if labels else 1)
            with archive.open("x.npy") as file:
                shape, dtype = _header(path, file, archive.getinfo("x.npy").file_size)
                if len(shape) != 4 or shape[:1] != labels:
                    raise ValueError(f"{path}: x has shape {shape} and y {labels}; images and labels (N,) are needed")
                if (dtype.kind != "f" and dtype != np.uint8) or kind.kind not in "iu":
                    raise ValueError(
                        f"{path}: x is {dtype} and y {kind}; uint8 or floating point and integers are needed"
                    )
                if dtype == np.uint8 and shape[3] not in (1, 3):
                    raise ValueError(f"{path}: uint8 images have shape (N, H, W, C), C 1 or 3; x has {shape}")
                for start in range(0, shape[0], size):
                    x = torch.from_numpy(_rows(path, file, shape, dtype, min(size, shape[0] - start)))
                    x = x.movedim(-1, 1).contiguous() if x.dtype == torch.uint8 else x
                    yield x, torch.from_numpy(y[start : start + size].astype(np.int64))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not an .npz file, or a damaged one: {error}") from None


def _header(path: Path, file: IO[bytes], most: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of the array in `file`, of at most `most` bytes, which is left at its first value."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = read[version](file)
    except KeyError:
        raise ValueError(
            f"{path} is in version {version} of the .npy format; save plain arrays with np.savez"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError(f"{path} holds Python objects or Fortran's order; save numbers with np.ascontiguousarray")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize > most:
        raise ValueError(f"{path} says that it holds an array of shape {shape}, and ends before; it is damaged")
    if (shape and shape[0] > MOST) or math.prod(shape[1:]) > LARGEST:
        raise ValueError(f"{path} holds an array of shape {shape}; at most {MOST} images of {LARGEST} values are read")
    return shape, dtype


def _rows(
    path: Path, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], count: int
) -> np.ndarray[Any, Any]:
    """The next `count` rows of an array of that shape and type."""
    wanted = count * math.prod(shape[1:]) * dtype.itemsize
    data = file.read(wanted)
    if len(data) < wanted:
        raise ValueError(f"{path} ends before its last image; it is damaged")
    rows = np.frombuffer(bytearray(data), dtype).reshape(count, *shape[1:])
    return rows.astype(dtype.newbyteorder("="), copy=False)


def _torchvision(name: str, root: str, train: bool, size: int) -> Iterator[Part]:
    try:
        datasets = import_module("torchvision.datasets")  # takes seconds
        found = getattr(datasets, TORCHVISION[name])(root=Path(root), train=train, download=False)
    except (RuntimeError, AssertionError, ValueError, EOFError):
        raise ValueError(f"{root} does not hold {name} in torchvision's layout; name its root folder") from None
    x = torch.as_tensor(found.data)
    x = x[:, None] if x.ndim == 3 else x.movedim(-1, 1).contiguous()
    yield from _split(x, torch.as_tensor(found.targets), size)


def _robustbench(rest: str, count: int | None, size: int) -> Iterator[Part]:
    from firstorder.robustbench import provide_autoattack

    provide_autoattack()
    from robustbench.data import PREPROCESSINGS, load_clean_dataset
    from robustbench.model_zoo.enums import BenchmarkDataset

    name, _, folder = rest.partition(":")
    known = [dataset.value for dataset in BenchmarkDataset]
    if name not in known:
        raise ValueError(f"RobustBench has no data set {name!r}; it has {', '.join(known)}")
    crop = PREPROCESSINGS["Res256Crop224" if name == "imagenet" else None]
    try:
        x, y = load_clean_dataset(BenchmarkDataset(name), count or (5000 if name == "imagenet" else None), folder, crop)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} is neither in {folder or 'the current folder'} nor could it be downloaded: {error}"
        ) from error
    yield from _split(x, y, size)
