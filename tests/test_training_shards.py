"""Training on WebDataset's shards: the order of shards and a window, pictures left in their files, exact resumption."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from fabric_runs import BATCH, Kill, KilledError, equal, fit, recipe
from firstorder.evaluation.names import data as names
from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.archives import Shards
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import configure
from firstorder.fabric import Order

SIZES = (30, 1, 25, 40)


def write(folder: Path, sizes: tuple[int, ...] = SIZES, *, mode: Any = "w", side: int = 7) -> str:
    """Shards of those sizes of MNIST images, in colour; their name."""
    images = packaged.mnist()
    x = (255 * F.interpolate(images.x[: sum(sizes)], size=side)).round().to(torch.uint8)[:, 0].numpy()
    start = 0
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"a-{number:02}.tar", mode) as archive:
            for i in range(start, start + size):
                buffer = io.BytesIO()
                Image.fromarray(x[i]).save(buffer, "png")
                for kind, held in (("png", buffer.getvalue()), ("cls", str(int(images.y[i])).encode())):
                    member = tarfile.TarInfo(f"{i:04}.{kind}")
                    member.size = len(held)
                    archive.addfile(member, io.BytesIO(held))
        start += size
    return f"{folder}/a-{{00..{len(sizes) - 1:02}}}.tar"


class Held(TensorDataset):
    """In memory, in the order of shards."""

    def __init__(self, x: Tensor, y: Tensor, groups: tuple[int, ...], window: int) -> None:
        super().__init__(x, y)
        self.groups, self.window = groups, window


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple), st.integers(1, 60), st.integers(0, 9),
    st.integers(0, 5),
)  # fmt: skip
def test_every_example_once_near_its_place(groups: tuple[int, ...], window: int, seed: int, epoch: int) -> None:
    total = sum(groups)
    order = Order(examples=total, batch_size=1, seed=seed, groups=groups, window=window)
    found = order.indices(epoch).flatten().tolist()
    assert sorted(found) == list(range(total))
    assert found == order.indices(epoch).flatten().tolist()
    whole = Order(examples=total, batch_size=1, seed=seed, groups=groups).indices(epoch).flatten().tolist()
    number = np.repeat(np.arange(len(groups)), groups)
    assert sum(a != b for a, b in zip(number[whole][1:], number[whole], strict=False)) == len(groups) - 1
    assert all(a < b or number[a] != number[b] for a, b in pairwise(whole))
    places = {index: place for place, index in enumerate(whole)}
    assert max(abs(places[index] - place) for place, index in enumerate(found)) < window


def test_epochs_and_seeds_differ_and_a_wide_window_mixes_shards() -> None:
    def indices(epoch: int = 0, **changes: Any) -> list[int]:
        given: dict[str, Any] = {"examples": 96, "batch_size": 96, "groups": SIZES, "window": 20}
        found: list[int] = Order(**{**given, **changes}).indices(epoch).flatten().tolist()
        return found

    assert len({tuple(indices(epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9
    first = set(indices(window=1000)[:30])
    assert all(any(start <= i < stop for i in first) for start, stop in ((0, 30), (31, 56), (56, 96)))
    with pytest.raises(ValueError, match="groups hold 96 examples, not 95"):
        indices(examples=95)
    with pytest.raises(ValueError, match="window=0"):
        indices(window=0)


def test_the_pictures_are_those_of_an_evaluation(tmp_path: Path) -> None:
    rest = write(tmp_path)
    found, expected = Shards(rest, window=8), names.load(f"wds:{rest}")
    assert found.groups == SIZES
    assert torch.equal(torch.stack([found[i][0] for i in range(len(found))]), expected.x)
    assert torch.equal(found.labels, expected.y)
    cut = found.part(20, 60)
    assert (cut.groups, len(cut)) == ((10, 1, 25, 4), 40)
    assert torch.equal(cut[39][0], expected.x[59])
    sided = Shards(f"{rest}@5", window=8)
    assert sided[0][0].shape == (3, 5, 5)


def training(folder: Path) -> tuple[Shards, TensorDataset]:
    images = Shards(write(folder, side=7), window=8)
    x, y = zip(*(images[i] for i in range(84, 96)), strict=True)
    return images.part(0, 84), TensorDataset(torch.stack(x), torch.stack(y))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(147, 10))


@pytest.mark.parametrize(("at", "workers"), [(3, 0), (7, 2)])
def test_a_run_is_that_of_images_in_memory_also_after_a_kill(tmp_path: Path, at: int, workers: int) -> None:
    chosen = recipe(save=2, epochs=2)
    train, held = training(tmp_path)
    x, y = zip(*(train[i] for i in range(len(train))), strict=True)
    memory = Held(torch.stack(x), torch.stack(y), train.groups, train.window)
    expected = fit(tmp_path / "memory", chosen, network(), data=(memory, held)).state_dict()
    assert not equal(fit(tmp_path / "all", chosen, network(), data=(TensorDataset(*memory.tensors), held)).state_dict(),
                     expected)  # fmt: skip
    with pytest.raises(KilledError):
        fit(tmp_path / "run", chosen, network(), data=(train, held), progress=Kill(at))
    other = Shards(train.source, window=9).part(0, 84)
    with pytest.raises(ValueError, match="window was 8 and is 9"):
        fit(tmp_path / "run", chosen, network(), data=(other, held), resume=True)
    found = fit(tmp_path / "run", chosen, network(), data=(train, held), resume=True, workers=workers).state_dict()
    assert equal(found, expected)
    assert len(train) // BATCH * 2 > at


def test_the_pictures_stay_in_their_files(tmp_path: Path) -> None:
    images = Shards(write(tmp_path, (60, 60), side=64), window=8)
    all_of_them = 120 * 3 * 64 * 64 * 4
    tracemalloc.start()
    for i in range(len(images)):
        images[i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < all_of_them / 10
    held = [value for value in vars(images).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 120 * 4 * 8


def test_a_configuration_trains_on_shards(tmp_path: Path) -> None:
    chosen = configure({"data": f"wds:{write(tmp_path)}", "validation": 12, "examples": 80, "window": 16})
    found = parts.splits(chosen)
    assert isinstance(found.train, Shards)
    assert (len(found.train), found.train.window, sum(found.train.groups)) == (80, 16, 80)
    images = names.load(chosen.data)
    assert torch.equal(found.validation.tensors[0], images.x[84:])
    assert torch.equal(found.validation.tensors[1], images.y[84:])
    assert found.classes == 1 + int(images.y.max())


def test_what_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with pytest.raises(ValueError, match=r"unpack \.tar\.gz"):
        Shards(write(packed, (3,), mode="w:gz"), window=8)
    assert len(names.load(f"wds:{packed}/a-00.tar").y) == 3
    rest = write(tmp_path)
    with pytest.raises(ValueError, match="validation=96 leaves none of the 96 training images"):
        parts.splits(configure({"data": f"wds:{rest}", "validation": 96}))
    with pytest.raises(ValueError, match="window=0"):
        Shards(rest, window=0)
    with tarfile.open(tmp_path / "a-00.tar", "w"):
        pass
    with pytest.raises(ValueError, match="has no image"):
        Shards(f"{tmp_path}/a-00.tar", window=8)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write(mixed, (2,), side=7)
    (mixed / "a-00.tar").rename(mixed / "b-00.tar")
    write(mixed, (1,), side=9)
    with pytest.raises(ValueError, match="have several sizes; resize them to one, or add @SIDE"):
        Shards(f"{mixed}/*.tar", window=8)[1]
