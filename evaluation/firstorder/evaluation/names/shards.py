"""Data sets of the hub and of WebDataset, read a part at a time, with no library of theirs and no code of anybody's."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

from firstorder.evaluation.names.numbers import short
from firstorder.evaluation.names.pictures import (
    SUFFIXES,
    TESTING,
    TRAINING,
    Labelled,
    Read,
    by_class,
    parts,
    sided,
    split,
    within,
)

IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls", "class")
"""Columns of pictures and of class indices, in the order in which they are looked for."""

LARGEST = 2**28
"""Bytes of a member of an archive."""

SHARDS = 10_000
"""Archives of a data set."""

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def hugging_face(rest: str, train: bool, size: int) -> Read:
    """A data set of the hub, in a folder, in the local cache or on the hub: parquet files, a folder of pictures for
    each class, or pictures beside a metadata.csv or metadata.jsonl with `file_name` and a label.

    Raises:
        ValueError: a folder that holds none of these.
        FileNotFoundError: a name that is neither in the cache nor could be downloaded; with the hub's own message.
        ModuleNotFoundError: the hub's client is not installed, and the name is no folder.
    """
    name, side = sided(rest)
    root = Path(name) if Path(name).is_dir() else _snapshot(name)
    tables = _of_split(sorted(root.rglob("*.parquet")), root, train)
    if tables:
        classes, columns = _columns(tables[0])
        return Path(name).name, classes, parts(_rows(tables, columns, size), size, side, name)
    folder = split(root, train)
    listing = next((folder / one for one in ("metadata.csv", "metadata.jsonl") if (folder / one).is_file()), None)
    if listing is not None:
        return Path(name).name, (), parts(_described(listing), size, side, name)
    _, classes, found = by_class(str(root) if side is None else f"{root}@{side}", train, size)
    return Path(name).name, classes, found


def webdataset(rest: str, train: bool, size: int) -> Read:
    """Tar files whose members that share a name up to the first dot are an example: a picture, and its class in `.cls`
    or in `.json` as "label" or "cls". One member is in memory at a time, and the part that is being made.

    Raises:
        ValueError: no such files; an example without a class.
    """
    pattern, side = sided(rest)
    files = expanded(pattern)
    return Path(pattern).name.partition(".")[0], (), parts(examples(files, "r|*", content), size, side, pattern)


def _snapshot(name: str) -> Path:
    """The folder of a data set of the hub, brought here where it is not."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"hf:{name} is not installed here: pip install huggingface_hub", name=error.name
        ) from None
    patterns = ["*.parquet", "*.csv", "*.jsonl", *(f"*{suffix}" for suffix in SUFFIXES)]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # connections, names, rights, the cache: all the hub's own
        raise FileNotFoundError(
            f"the data set hf:{name} is neither a folder, nor in the local cache, nor could it be downloaded: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _of_split(files: list[Path], root: Path, train: bool) -> list[Path]:
    """The files of a split, which their names or folders say, "train-00000-of-00002.parquet" or "train/0.parquet"."""
    for name in TRAINING if train else TESTING:
        word = re.compile(rf"(^|[/_.-]){name}([/_.-]|$)")
        found = [file for file in files if word.search(file.relative_to(root).as_posix())]
        if found:
            return found
    other = re.compile(rf"(^|[/_.-])({'|'.join((*TRAINING, *TESTING))})([/_.-]|$)")
    rest = [file for file in files if not other.search(file.relative_to(root).as_posix())]
    if files and not rest:
        kind = "training" if train else "test or validation"
        raise ValueError(f"{root} has no {kind} split: its files are {', '.join(file.name for file in files[:5])}")
    return rest


def _columns(file: Path) -> tuple[tuple[str, ...], tuple[str, str]]:
    """The names of the classes, where the hub's metadata have them, and the columns of pictures and labels."""
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
    except Exception as error:  # damaged
        raise ValueError(f"{file} is not a parquet file, or a damaged one: {' '.join(str(error).split())}") from None
    image, label = (next((name for name in names if name in schema.names), None) for names in (IMAGES, LABELS))
    if image is None or label is None:
        raise ValueError(
            f"{file} has columns {', '.join(schema.names)}; a picture ({', '.join(IMAGES)}) and its class index "
            f"({', '.join(LABELS)}) are needed"
        )
    features: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = (features.get(label) or {}).get("names") or ()
    return tuple(str(name) for name in names), (image, label)


def _rows(files: list[Path], columns: tuple[str, str], size: int) -> Iterator[Labelled]:
    from pyarrow import parquet

    for file in files:
        start = 0
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=size, columns=list(columns)):
            images, labels = (batch.column(name).to_pylist() for name in columns)
            for i, (image, label) in enumerate(zip(images, labels, strict=True), start):
                content = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(content, bytes):
                    raise ValueError(
                        f"row {i} of {file} holds no picture's bytes; save the data set with them embedded"
                    )
                yield Labelled(content, f"row {i} of {file}", _class(label, f"row {i} of {file}"))
            start += len(images)


def _described(listing: Path) -> Iterator[Labelled]:
    """The pictures that metadata name."""
    with listing.open(encoding="utf-8", newline="") as file:
        rows: Iterator[Any] = csv.DictReader(file) if listing.suffix == ".csv" else map(_json, file)
        for number, row in enumerate(rows, 1):
            where = f"row {number} of {listing}"
            label = next((row[name] for name in LABELS if name in row), None) if isinstance(row, dict) else None
            if label is None or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where} has no file_name or no class index ({', '.join(LABELS)})")
            yield within(listing.parent, row["file_name"], _class(label, where), listing)


def _json(line: str | bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _class(value: object, where: str) -> int:
    """A class index, as a number or as text."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if isinstance(text, str) and re.fullmatch(r"\s*\d{1,9}\s*", text):
        return int(text)
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < 2**31:
        return text
    raise ValueError(f"{where}: the class is {short(text)}; a whole number from 0 is needed")


def expanded(pattern: str) -> list[Path]:
    """The files that a pattern with {000..012} or * names, in order.

    Raises:
        ValueError: none, or too many.
    """
    names = [pattern]
    while found := next((_RANGE.search(name) for name in names if _RANGE.search(name)), None):
        first, last = int(found[1]), int(found[2])
        if last < first or (last - first + 1) * len(names) > SHARDS:
            raise ValueError(f"{short(pattern)} names no files, or more than {SHARDS}; write SHARDS-{{000..012}}.tar")
        numbers = [f"{i:0{len(found[1])}}" for i in range(first, last + 1)]
        names = [name.replace(found[0], number, 1) for name in names for number in numbers]
    files = [Path(file) for name in names for file in (sorted(glob(name)) if has_magic(name) else [name])]
    missing = [str(file) for file in files if not file.is_file()]
    if not files or missing:
        raise ValueError(f"{short(pattern)}: {', '.join(missing[:3]) or 'such a file'} is not there; name tar files")
    return files


def examples(files: list[Path], mode: Literal["r|*", "r:"], read: Callable[..., Any]) -> Iterator[Labelled]:
    """The examples of tar files, whose members follow one another.

    Args:
        files: in order.
        mode: "r|*" in one go, compressed or not; "r:" where members are to be found again, not compressed.
        read: what of a picture an example holds, from the archive, the member and the file.
    """
    for file in files:
        key, sample = "", dict[str, Any]()
        try:
            with tarfile.open(file, mode) as archive:
                for member in archive:
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if folder + slash + stem != key and sample:
                        yield _example(sample, file, key)
                        sample = {}
                    key, kind = folder + slash + stem, kind.lower()
                    if member.isfile() and f".{kind}" in SUFFIXES:
                        sample[kind] = read(archive, member, file)
                    elif member.isfile() and kind in ("cls", "json"):
                        sample[kind] = content(archive, member, file)
        except (tarfile.TarError, EOFError, OSError) as error:
            packed = "" if mode == "r|*" else "; training reads members where they lie: unpack .tar.gz and the like"
            raise ValueError(f"{file} is not a tar file, or a damaged one: {error}{packed}") from None
        if sample:
            yield _example(sample, file, key)


def content(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    """The bytes of a member."""
    if member.size > LARGEST:
        raise ValueError(f"{member.name} in {file} has {member.size} bytes; at most {LARGEST} are read")
    found = archive.extractfile(member)
    assert found is not None
    return found.read()


def _example(sample: dict[str, Any], file: Path, key: str) -> Labelled:
    where = f"{key} in {file}"
    image = next((held for kind, held in sample.items() if f".{kind}" in SUFFIXES), None)
    described = _json(sample["json"]) if "json" in sample else None
    own = described if isinstance(described, dict) else {}
    label = sample.get("cls", next((own[name] for name in LABELS if name in own), None))
    if image is None or label is None:
        raise ValueError(f"{where} has no picture or no class; its members are {', '.join(sorted(sample))}")
    return Labelled(image, where, _class(label, where))
