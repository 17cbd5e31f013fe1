"""Images in parts: the same as in one piece, whatever is skipped; copied for a run, and read back by slices."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from firstorder.evaluation.names import data
from firstorder.evaluation.runs import examples

COUNT = 13
KINDS = ["uint8", "float16", "float32", "float64", "big-endian", "packed", "folder", "mnist", "cifar10:", "mnist:"]


@pytest.fixture
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Tensor, Tensor]:
    """A specification, and what it names: images in [0, 1] and their labels."""
    kind: str = request.param
    random = np.random.default_rng(3)
    size = {"mnist:": (COUNT, 28, 28, 1), "cifar10:": (COUNT, 32, 32, 3)}.get(kind, (COUNT, 4, 5, 3))
    x, y = random.integers(0, 256, size, dtype=np.uint8), random.integers(0, 10, COUNT)
    images = torch.from_numpy(x).movedim(-1, 1).float() / 255
    labels = torch.from_numpy(y)
    spec = str(tmp_path / "images.npz")
    if kind == "mnist":
        whole = data.load("mnist")
        return "mnist", whole.x[:COUNT], whole.y[:COUNT]
    if kind in ("uint8", "packed"):
        (np.savez if kind == "uint8" else np.savez_compressed)(spec, x=x, y=y.astype(np.uint8))
    elif kind == "folder":
        spec = str(tmp_path)
        for i, picture in enumerate(x):
            Image.fromarray(picture).save(tmp_path / f"{i:03}.png")
        (tmp_path / "labels.json").write_text(json.dumps({f"{i:03}.png": int(label) for i, label in enumerate(y)}))
    elif kind == "cifar10:":
        for split in ("train_list", "test_list"):
            monkeypatch.setattr(datasets.CIFAR10, split, [["test_batch", ""]])
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).is_file())
        folder = tmp_path / datasets.CIFAR10.base_folder
        folder.mkdir()
        flat = x.transpose(0, 3, 1, 2).reshape(COUNT, -1)
        (folder / "test_batch").write_bytes(pickle.dumps({"data": flat, "labels": y.tolist()}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        spec = f"cifar10:{tmp_path}"
    elif kind == "mnist:":
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for name, values in (("images-idx3", x[..., 0]), ("labels-idx1", y.astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            for split in ("t10k", "train"):
                (folder / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
        spec = f"mnist:{tmp_path}"
    else:
        dtype = ">f4" if kind == "big-endian" else kind
        floating = (images if kind == "float16" else images.double()).numpy().astype(dtype)
        np.savez(spec, x=floating, y=y.astype(">i4"))
        images = torch.from_numpy(floating.astype(np.float32))
    return spec, images, labels


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_parts_make_up_the_whole(source: tuple[str, Tensor, Tensor]) -> None:
    spec, x, y = source
    whole = data.load(spec, count=COUNT)
    assert torch.equal(whole.x, x)
    assert torch.equal(whole.y, y)
    for size in (1, 4, COUNT, 99):
        parts = list(data.stream(spec, count=COUNT, size=size).parts)
        assert torch.equal(torch.cat([data.pixels(part) for part, _ in parts]), x)
        assert all(len(part) <= size for part, _ in parts)
        assert [part.dtype.is_floating_point for part, _ in parts] == [parts[0][0].is_floating_point()] * len(parts)


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_skip_and_count(source: tuple[str, Tensor, Tensor]) -> None:
    spec, x, y = source
    for skip, count in ((0, 1), (0, 5), (3, 4), (4, 4), (5, 8), (12, 1)):
        parts = list(data.stream(spec, skip=skip, count=count, size=4).parts)
        assert torch.equal(torch.cat([data.pixels(part) for part, _ in parts]), x[skip : skip + count])
        assert torch.equal(torch.cat([labels for _, labels in parts]), y[skip : skip + count])
    if spec != "mnist":
        assert sum(len(labels) for _, labels in data.stream(spec, skip=5, size=4).parts) == COUNT - 5
        with pytest.raises(ValueError, match=r"has no image after the first 13; lower skip, or name others"):
            list(data.stream(spec, skip=COUNT).parts)


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_what_a_run_keeps_is_read_by_slices(source: tuple[str, Tensor, Tensor], tmp_path: Path) -> None:
    spec, x, y = source
    found = examples.survey(spec, skip=2, count=10, shard=4)
    assert [(start, stop) for start, stop, _ in found.shards] == [(0, 4), (4, 8), (8, 10)]
    assert (found.count, found.shape) == (10, tuple(x.shape[1:]))
    assert torch.equal(found.first, x[2:6])
    assert found.labels[1] == int(y[2:12].max())
    store = tmp_path / "store"
    examples.write(found, store, skip=2, count=10)
    for start, stop in ((0, 10), (0, 4), (3, 9), (9, 10)):
        images, labels = examples.rows(store, found.digest, start, stop)
        assert torch.equal(images, x[2 + start : 2 + stop])
        assert torch.equal(labels, y[2 + start : 2 + stop])
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert sorted(path.name for path in store.iterdir()) == [
        f"{found.digest}-x.npy",
        f"{found.digest}-y.npy",
        f"{found.digest}.json",
    ]
    times = [path.stat().st_mtime_ns for path in sorted(store.iterdir())]
    examples.write(found, store, skip=2, count=10)
    assert [path.stat().st_mtime_ns for path in sorted(store.iterdir())] == times


def test_bytes_are_kept_as_bytes(tmp_path: Path) -> None:
    for name, x in (("bytes", np.zeros((4, 5, 5, 1), np.uint8)), ("floats", np.zeros((4, 1, 5, 5), np.float64))):
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.zeros(4, int))
        found = examples.survey(str(tmp_path / f"{name}.npz"), skip=0, count=None, shard=3)
        examples.write(found, tmp_path / name, skip=0, count=None)
        kept = np.load(tmp_path / name / f"{found.digest}-x.npy")
        assert (kept.shape, kept.dtype) == ((4, 1, 5, 5), np.uint8 if name == "bytes" else np.float32)


def test_data_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.npz"
    np.savez(file, x=np.zeros((4, 1, 5, 5), np.float32), y=np.zeros(4, int))
    found = examples.survey(str(file), skip=0, count=None, shard=3)
    np.savez(file, x=np.full((4, 1, 5, 5), 0.5, np.float32), y=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"images.npz changed while it was read; start again"):
        examples.write(found, tmp_path / "store", skip=0, count=None)
    assert not list((tmp_path / "store").iterdir())


def test_a_shard_is_known_by_what_it_holds(tmp_path: Path) -> None:
    def digests(edit: Any = None) -> list[str]:
        x, y = np.linspace(0, 1, 4 * 25, dtype=np.float32).reshape(4, 1, 5, 5), np.arange(4)
        if edit:
            edit(x, y)
        np.savez(tmp_path / "images.npz", x=x, y=y)
        found = examples.survey(str(tmp_path / "images.npz"), skip=0, count=None, shard=2)
        return [digest for _, _, digest in found.shards] + [found.digest]

    before = digests()
    assert before == digests()
    assert len(set(before)) == 3
    for edit in (lambda x, y: x.__setitem__((3, 0, 0, 0), 0.25), lambda x, y: y.__setitem__(3, 0)):
        assert [one == two for one, two in zip(before, digests(edit), strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("{", "labels.json is not JSON"),
        ("[1]", "must map file names to class indices"),
        ('{"a.png": "cat"}', "must map file names to class indices"),
        ('{"a.png": true}', "must map file names to class indices"),
        ("{}", "names no picture"),
        ('{"../a.png": 1}', "which lies outside the folder"),
        ('{"a.png": 1, "b.png": 2}', "have several sizes, .*; resize them to one"),
        ('{"labels.json": 1}', "is no picture, or a damaged one"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, listing: str, message: str) -> None:
    for name, side in (("a", 4), ("b", 5)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.json").write_text(listing)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path))


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"a.png": 1}')
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("spec", ["cifar9", "none.npz", "nowhere", "cifar10:", "robustbench:", "mnist:/nowhere", ""])
def test_names_that_name_nothing(spec: str) -> None:
    with pytest.raises(ValueError, match=r"; name "):
        list(data.stream(spec).parts)
