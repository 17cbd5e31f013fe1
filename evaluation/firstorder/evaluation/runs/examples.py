"""The examples of a run, on disk, so that what a process holds of them does not grow with their number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from firstorder.evaluation.names import data
from firstorder.evaluation.names.pictures import Part
from firstorder.files import replacing, write_text


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a run knows of its examples.

    Attributes:
        spec: their name, as in `data.stream`.
        name: the data set's.
        digest: of all of them with their labels.
        shards: start, stop and digest of each.
        shape: (C, H, W).
        bytes: whether they are uint8.
        labels: lowest and highest.
        chosen: their places in the data set, in order, where not all were taken.
        first: the first images, float in [0, 1], for checks.
        classes: names of the classes, where they are known.
    """

    spec: str
    name: str
    digest: str
    shards: tuple[tuple[int, int, str], ...]
    shape: tuple[int, ...]
    bytes: bool
    labels: tuple[int, int]
    chosen: tuple[int, ...] | None
    first: Tensor
    classes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shards[-1][1]


def survey(
    spec: str,
    *,
    skip: int,
    count: int | None,
    shard: int,
    keep: Callable[[Tensor, Tensor], Tensor] | None = None,
    kept: str = "classified correctly by all models",
) -> Examples:
    """Read all examples once, keep the first, and give every shard its digest.

    Args:
        spec: as in `data.stream`.
        skip, count: which, of those that are kept.
        shard: examples in a shard.
        keep: which images (N, ...) of a part with labels (N,) are taken, (N,); None takes all.
        kept: what these are, for messages.

    Raises:
        ValueError: data that hold something else.
        FileNotFoundError: data that are not there.
    """
    chosen = None if keep is None else _chosen(spec, keep, kept, skip, count, shard)
    found = _stream(spec, skip, count, shard, chosen)
    shards: list[tuple[int, int, str]] = []
    whole, first, start, low, high = hashlib.sha256(), None, 0, 0, 0
    for x, y in found.parts:
        first = (x[:8], x.dtype) if first is None else first
        own = _digest(x, y)
        whole.update(own)
        shards.append((start, start + len(x), own.hex()[:32]))
        low, high, start = min(low, int(y.min())), max(high, int(y.max())), start + len(x)
    assert first is not None
    return Examples(
        spec=spec,
        name=found.name,
        digest=whole.hexdigest()[:32],
        shards=tuple(shards),
        shape=tuple(first[0].shape[1:]),
        bytes=first[1] == torch.uint8,
        labels=(low, high),
        chosen=chosen,
        first=data.pixels(first[0]),
        classes=found.classes,
    )


def write(examples: Examples, folder: Path, *, skip: int, count: int | None) -> bool:
    """Copy the examples into `folder`, unless they are there; what `rows` reads.

    Returns:
        Whether they were there, but damaged.

    Raises:
        ValueError: the data are not those that were surveyed.
    """
    x_path, y_path = _paths(folder, examples.digest)
    sums = folder / f"{examples.digest}.json"
    damaged = sums.exists()
    if damaged and _sums(x_path, y_path) == sums.read_bytes():
        return False
    dtype = np.dtype(np.uint8 if examples.bytes else "<f4")
    labels: list[int] = []  # no tensors, which would lie between the images and keep the heap from being used again
    whole, size = hashlib.sha256(), examples.shards[0][1]
    with replacing(x_path) as temporary:
        with temporary.open("wb") as file:
            _begin(file, (examples.count, *examples.shape), dtype)
            for x, y in _stream(examples.spec, skip, count, size, examples.chosen).parts:
                whole.update(_digest(x, y))
                file.write(x.contiguous().numpy().astype(dtype).tobytes())
                labels.extend(y.tolist())
        if whole.hexdigest()[:32] != examples.digest:
            raise ValueError(f"{examples.spec} changed while it was read; start again")
    with replacing(y_path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(labels, np.int64))
    write_text(sums, _sums(x_path, y_path).decode())
    return damaged


def rows(folder: Path, digest: str, start: int, stop: int) -> Part:
    """Images (stop - start, C, H, W) in [0, 1] and their labels, of the examples of that digest in `folder`.

    Raises:
        ValueError: a file that is cut short.
    """
    found = []
    for path in _paths(folder, digest):
        with path.open("rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                width = int(np.prod(shape[1:]))
                file.seek(start * width * dtype.itemsize, 1)
                part = np.fromfile(file, dtype, (stop - start) * width).reshape(stop - start, *shape[1:])
            except ValueError:
                raise ValueError(f"{path} is damaged; firstorder evaluate --out {folder.parent} mends it") from None
            found.append(torch.from_numpy(part))
    return data.pixels(found[0]), found[1]


def _chosen(
    spec: str, keep: Callable[[Tensor, Tensor], Tensor], kept: str, skip: int, count: int | None, size: int
) -> tuple[int, ...]:
    """The places of the examples that are kept, without the first `skip`, at most `count`."""
    found: list[int] = []
    start, enough = 0, None if count is None else skip + count
    for x, y in data.stream(spec, size=size).parts:
        found.extend((start + keep(x, y.long()).nonzero()[:, 0]).tolist())
        start += len(x)
        if enough is not None and len(found) >= enough:
            break
    if len(found) <= skip:
        left = f" after the first {skip}" if skip else ""
        raise ValueError(f"{spec}: no image{left} is {kept}; choose others")
    return tuple(found[skip:enough])


def _stream(spec: str, skip: int, count: int | None, size: int, chosen: tuple[int, ...] | None) -> data.Stream:
    """The examples in parts of `size`."""
    if chosen is None:
        found = data.stream(spec, skip=skip, count=count, size=size)
        return found._replace(parts=_even(found.parts, size))
    found = data.stream(spec, count=chosen[-1] + 1, size=size)
    return found._replace(parts=_even(_picked(found.parts, chosen), size))


def _picked(parts: Iterator[Part], chosen: tuple[int, ...]) -> Iterator[Part]:
    """The examples at the places `chosen`."""
    start, places = 0, torch.tensor(chosen)
    for x, y in parts:
        own = places[(places >= start) & (places < start + len(x))] - start
        start += len(x)
        if len(own):
            yield x[own], y[own]


def _digest(x: Tensor, y: Tensor) -> bytes:
    whole = hashlib.sha256(str((x.dtype, tuple(x.shape))).encode())
    for part in (x, y):
        whole.update(part.contiguous().numpy().tobytes())
    return whole.digest()


def _sums(*paths: Path) -> bytes:
    """The digests of files, as text; empty where one is missing."""
    found = {}
    for path in paths:
        whole = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while part := file.read(2**20):
                    whole.update(part)
        except FileNotFoundError:
            return b""
        found[path.name] = whole.hexdigest()
    return json.dumps(found).encode()


def _paths(folder: Path, digest: str) -> tuple[Path, Path]:
    return folder / f"{digest}-x.npy", folder / f"{digest}-y.npy"


def _begin(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(file, header)


def _even(parts: Iterator[Part], size: int) -> Iterator[Part]:
    """The same examples in parts of `size`, the last one excepted."""
    held: list[Part] = []
    for x, y in parts:
        held.append((x, y))
        while sum(len(y) for _, y in held) >= size:
            x, y = (torch.cat(kind) for kind in zip(*held, strict=True))
            yield x[:size], y[:size].long()
            held = [(x[size:], y[size:])] if len(x) > size else []
    if held:
        x, y = (torch.cat(kind) for kind in zip(*held, strict=True))
        yield x, y.long()
