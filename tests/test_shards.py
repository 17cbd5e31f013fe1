"""Data sets of other stacks: folders by class, the hub's layouts, WebDataset's shards; bounded in memory."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from typer.testing import CliRunner

from firstorder.evaluation.cli import app
from firstorder.evaluation.names import data, packaged, pictures, shards

COUNT = 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples() -> tuple[Tensor, Tensor]:
    """40 CIFAR-10 images of three classes, uint8, in the order of their classes, and their labels."""
    images = packaged.cifar10()
    chosen = torch.cat([(images.y == label).nonzero()[:, 0] for label in (0, 1, 2)])[:COUNT]
    return (255 * images.x[chosen]).round().to(torch.uint8), images.y[chosen]


X, Y = examples()
CLASSES = ("airplane", "automobile", "bird")


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()


def class_folders(root: Path) -> None:
    for i, (x, y) in enumerate(zip(X, Y.tolist(), strict=True)):
        folder = root / CLASSES[y]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(png(x))
        (folder / f"{i:03}.txt").write_text("no picture")


def table(file: Path, chosen: slice, *, names: bool = True) -> None:
    rows = [{"bytes": png(x), "path": None} for x in X[chosen]]
    made = pa.table({"img": rows, "label": Y[chosen].tolist()})
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}
    facts = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if names else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made.replace_schema_metadata(facts), file)


def tar(file: Path, chosen: slice, *, described: bool = False, compressed: bool = False) -> None:
    with tarfile.open(file, "w:gz" if compressed else "w") as archive:
        for i, (x, y) in enumerate(zip(X[chosen], Y[chosen].tolist(), strict=True)):
            label = {"json": json.dumps({"label": y}).encode()} if described else {"cls": f"{y}\n".encode()}
            for kind, content in {"png": png(x), "txt": b"a caption", **label}.items():
                member = tarfile.TarInfo(f"set.1/{i:05}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def make(name: str) -> str:
    """A data set of all examples; its name."""
    root = Path(name)
    if name == "classes":
        class_folders(root)
        return "imagefolder:classes"
    if name == "splits":
        class_folders(root / "val")
        (root / "train" / "airplane").mkdir(parents=True)
        (root / "train" / "airplane" / "0.png").write_bytes(png(X[0]))
        return "imagefolder:splits"
    if name == "hf-classes":
        class_folders(root / "test")
        return "hf:hf-classes"
    if name == "hf-parquet":
        table(root / "data" / "train-00000-of-00001.parquet", slice(0, 7))
        table(root / "data" / "test-00000-of-00002.parquet", slice(0, 25))
        table(root / "data" / "test-00001-of-00002.parquet", slice(25, None), names=False)
        return "hf:hf-parquet"
    if name in ("hf-csv", "hf-jsonl"):
        (root / "test" / "sub").mkdir(parents=True)
        for i, x in enumerate(X):
            (root / "test" / "sub" / f"{i}.png").write_bytes(png(x))
        rows = [(f"sub/{i}.png", y) for i, y in enumerate(Y.tolist())]
        if name == "hf-csv":
            lines = ["file_name,label", *(f"{file},{y}" for file, y in rows)]
        else:
            lines = [json.dumps({"file_name": file, "label": y}) for file, y in rows]
        (root / "test" / f"metadata.{name[3:]}").write_text("\n".join(lines) + "\n")
        return f"hf:{name}"
    for i, start in enumerate(range(0, COUNT, 15)):
        tar(Path(f"a-{i:03}.tar"), slice(start, start + 15), described=name == "wds-json", compressed=i == 1)
    return "wds:a-*.tar" if name == "wds-glob" else "wds:a-{000..002}.tar"


ALL = ["classes", "splits", "hf-classes", "hf-parquet", "hf-csv", "hf-jsonl", "wds-cls", "wds-json", "wds-glob"]


@pytest.mark.parametrize("name", ALL)
def test_every_layout_is_read(name: str, place: Path) -> None:
    spec = make(name)
    found = data.load(spec)
    assert torch.equal(found.x, X.float() / 255)
    assert torch.equal(found.y, Y)
    assert found.classes in (CLASSES, ())
    assert (found.classes == CLASSES) == (name in ("classes", "splits", "hf-classes", "hf-parquet"))
    parts = list(data.stream(spec, skip=5, count=20, size=8).parts)
    assert all(len(x) <= 8 and x.dtype == torch.uint8 for x, _ in parts)
    assert torch.equal(torch.cat([x for x, _ in parts]), X[5:25])
    assert torch.equal(torch.cat([y for _, y in parts]), Y[5:25])


def test_splits_by_name(place: Path) -> None:
    assert len(data.load(make("splits"), train=True).x) == 1
    assert len(data.load(make("hf-parquet"), train=True).x) == 7
    table(Path("only") / "train.parquet", slice(0, 3))
    with pytest.raises(ValueError, match="only has no test or validation split: its files are train"):
        data.load("hf:only")
    table(Path("none") / "part.parquet", slice(0, 3))
    assert len(data.load("hf:none").x) == len(data.load("hf:none", train=True).x) == 3


@pytest.mark.parametrize("spec", ["imagefolder:set", "hf:set"])
def test_sizes_are_brought_to_one(spec: str, place: Path) -> None:
    for i, (width, height) in enumerate([(40, 30), (30, 60), (24, 24)]):
        Path("set/a").mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2)
        Image.fromarray(ramp.astype(np.uint8)).save(f"set/a/{i}.png")
    with pytest.raises(
        ValueError, match=r"the pictures in set have several sizes, .*; resize them to one, or add @SIDE"
    ):
        data.load(spec)
    found = data.load(f"{spec}@24").x
    assert found.shape == (3, 3, 24, 24)
    own = np.asarray(Image.open("set/a/0.png").resize((32, 24), Image.Resampling.BILINEAR))[:, 4:28]
    assert torch.equal((255 * found[0]).round().to(torch.uint8), torch.from_numpy(own.copy()).permute(2, 0, 1))
    with pytest.raises(ValueError, match="a side of 0 pixels is not possible"):
        data.load(f"{spec}@0")


def test_shards_are_bounded_in_memory(place: Path) -> None:
    """A part of noise that no compression helps, of forty such parts, is all that is held."""
    side, count = 256, 40
    with tarfile.open("big.tar", "w") as archive:
        for i in range(count):
            noise = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            for kind, content in (("png", png(noise)), ("cls", b"0")):
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    one = 3 * side * side
    tracemalloc.start()
    try:
        total = sum(len(x) for x, _ in data.stream("wds:big.tar", size=2).parts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == count
    assert peak < 12 * one < count * one


def members(file: str, given: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in given.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


GOOD = png(X[0])
HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "no class": ({"a.png": GOOD}, r"a in x\.tar has no picture or no class; its members are png"),
    "no picture": ({"a.cls": b"1"}, r"a in x\.tar has no picture or no class; its members are cls"),
    "a word": ({"a.png": GOOD, "a.cls": b"cat"}, "a in x.tar: the class is 'cat'; a whole number from 0 is needed"),
    "negative": ({"a.png": GOOD, "a.json": b'{"label": -1}'}, "the class is -1; a whole number"),
    "deep": ({"a.png": GOOD, "a.json": b"[" * 10**5}, "has no picture or no class"),
    "damaged": ({"a.png": GOOD[:80], "a.cls": b"0"}, r"a in x\.tar is no picture, or a damaged one"),
    "text": ({"a.png": b"import os", "a.cls": b"0"}, r"a in x\.tar is no picture, or a damaged one"),
    "nothing": ({"a.txt": b""}, "wds:x.tar has no image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shards_end_in_one_line(name: str, place: Path) -> None:
    given, message = HOSTILE[name]
    members("x.tar", given)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("wds:x.tar")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_large_members_are_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGEST", 10)
    members("x.tar", {"a.png": GOOD, "a.cls": b"0"})
    with pytest.raises(ValueError, match=r"a\.png in x\.tar has \d+ bytes; at most 10 are read"):
        data.load("wds:x.tar")


REFUSED = {
    "wds:x.tar": r"'x\.tar': x\.tar is not there; name tar files",
    "wds:{9..1}.tar": "names no files, or more than 10000",
    "wds:{0..9999}{0..9999}.tar": "names no files, or more than 10000",
    "wds:b-*.tar": "such a file is not there; name tar files",
    "wds:bad.tar": r"bad\.tar is not a tar file, or a damaged one",
    "imagefolder:empty": "empty holds no folders of pictures, one for each class",
    "imagefolder:none": "none holds no folders of pictures",
    "hf:empty": "empty holds no folders of pictures",
    "hf:bad": "is not a parquet file, or a damaged one",
    "hf:columns": "has columns a, b; a picture",
    "hf:outside": r"names '\.\./\.\./own\.png', which lies outside the folder",
    "hf:unlabelled": r"row 1 of .*metadata\.csv has no file_name or no class index",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_is_no_data_set_is_refused(spec: str, place: Path) -> None:
    for name in ("empty", "bad", "columns", "outside", "unlabelled"):
        Path(name).mkdir()
    Path("bad.tar").write_bytes(b"nothing" * 1000)
    Path("bad/test.parquet").write_bytes(b"nothing")
    Path("own.png").write_bytes(GOOD)
    parquet.write_table(pa.table({"a": [1], "b": [2]}), "columns/test.parquet")
    Path("outside/metadata.csv").write_text("file_name,label\n../../own.png,1\n")
    Path("unlabelled/metadata.csv").write_text("file_name,caption\na.png,cat\n")
    with pytest.raises(ValueError, match=REFUSED[spec]) as caught:
        data.load(spec)
    assert "\n" not in str(caught.value)


def test_names_on_the_hub_keep_its_message(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")
    asked = []

    def offline(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"]))
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"hf:nobody/nothing is neither .*: the hub cannot be reached"):
        data.load("hf:nobody/nothing@32")
    assert asked == [("nobody/nothing", "dataset")]
    make("hf-parquet")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: "hf-parquet")
    assert torch.equal(data.load("hf:somebody/something").y, Y)


def test_commands_take_them(place: Path) -> None:
    spec = make("wds-cls")
    words = ["evaluate", "--model", "cifar10-resnet18", "--data", spec, "--attack", "fgsm", "--eps", "1/255"]
    done = CliRunner().invoke(app, [*words, "--count", "20", "--out", "out"])
    assert done.exit_code == 0, done.output
    own = np.load(next(Path("out/data").glob("*-x.npy")))
    assert np.array_equal(own, X[:20].numpy())


def test_pictures_are_bounded() -> None:
    assert pictures.sided("a@b") == ("a@b", None)
    assert pictures.sided("a@224") == ("a", 224)
    with pytest.raises(ValueError, match="a side of 99999 pixels is not possible"):
        pictures.sided("a@99999")
