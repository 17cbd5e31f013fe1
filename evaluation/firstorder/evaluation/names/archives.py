"""WebDataset's shards as a data set of known length, for training: its pictures stay in their files."""

from __future__ import annotations

import tarfile
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from firstorder.attacks import validation
from firstorder.evaluation.names.pictures import Labelled, decoded, sided
from firstorder.evaluation.names.shards import LARGEST, examples, expanded


class Place(NamedTuple):
    """Where a picture lies: the number of its file, its first byte there, and how many it has."""

    file: int
    start: int
    bytes: int


class Shards(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (C, H, W) in [0, 1] and class indices of tar files, read one by one from where they lie.

    The headers of all files are read once, here; in memory are the place and the class of every picture. An order that
    keeps the pictures of a file together (`firstorder.fabric.Order`) reads `groups` of them.

    Args:
        rest: the files, as "a-{000..012}.tar" or "*.tar", with @SIDE as in `data.stream`.
        window: how far the order of training may take a picture from its place among the files.

    Attributes:
        labels: class indices (N,).
        groups: the number of pictures of every file.

    Raises:
        ValueError: no such files, compressed ones, an example without a class, a picture that is too large.
    """

    def __init__(self, rest: str, *, window: int) -> None:
        validation.count("window", window)
        self.source, self.window = rest, window
        pattern, self._side = sided(rest)
        self.files = [str(file) for file in expanded(pattern)]
        places, labels = [], []
        for number, file in enumerate(self.files):
            for one in examples([Path(file)], "r:", _place):
                start, length = one.content  # type: ignore[misc]
                places.append(Place(number, start, length))
                labels.append(one.label)
        if not labels:
            raise ValueError(f"wds:{rest} has no image; name others")
        self._places, self.labels = torch.tensor(places), torch.tensor(labels)
        self._shape = self._picture(0).shape

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(len(list(own)) for _, own in groupby(self._places[:, 0].tolist()))

    def part(self, start: int, stop: int) -> Shards:
        """The pictures from `start` to `stop` alone."""
        found = object.__new__(Shards)
        vars(found).update(vars(self))
        found._places, found.labels = self._places[start:stop], self.labels[start:stop]
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self._picture(index)
        if x.shape != self._shape:
            raise ValueError(
                f"the pictures in {self.source} have several sizes; resize them to one, or add @SIDE to the name, as "
                f"in wds:{self.source}@224"
            )
        return x.float() / 255, self.labels[index]

    def _picture(self, index: int) -> Tensor:
        place = Place(*self._places[index].tolist())
        with open(self.files[place.file], "rb") as file:
            file.seek(place.start)
            held = file.read(place.bytes)
        return decoded(Labelled(held, f"byte {place.start} of {self.files[place.file]}", 0), self._side)


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> tuple[int, int]:
    if member.size > LARGEST:
        raise ValueError(f"{member.name} in {file} has {member.size} bytes; at most {LARGEST} are read")
    return member.offset_data, member.size
