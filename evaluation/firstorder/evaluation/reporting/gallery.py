"""Every example of a run, for a page: what attacks made of it as scripts, the images as sheets of pictures.

A script calls `firstorder.push` with the rows of a group: a model, an attack, a radius and a seed. A sheet is a PNG in
which images lie in lines of equal length. Both are in files beside the page, or in the page where they are small.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.cells import ABSOLUTE, RELATIVE, last
from firstorder.evaluation.runs.store import Run
from firstorder.files import replacing, write_text

FOLDER = "examples"

INLINE = 1_500_000
"""Bytes up to which scripts and sheets are a part of the page."""

SHEET = 1_000_000
"""Pixels of a sheet, at most; of one image where that has more."""

CLEAN = 64_000_000
"""Pixels of clean images beside a page, at most; the first images are shown."""

COLUMNS = (
    "model", "target", "defence", "attack", "eps", "seed", "example", "label", "clean_label", "adversarial_label",
    "clean_confidence", "confidence", "logit_margin", "success", "doubtful", "linf", "l2", "forwards", "backwards",
    "stage",
)  # fmt: skip
KEPT = ("model", "target", "example", "adversarial")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Gallery:
    """What a page has of a run's examples.

    Attributes:
        index: what its script knows from the start, as JSON in a script.
        scripts: of all groups, where they are in the page; else empty.
        paths: the files beside the page; empty where there are none.
        count: how many rows there are.
        fallen: how many of them are of examples that an attack broke.
        pictured: how many of these have a picture.
    """

    index: str
    scripts: tuple[str, ...]
    paths: tuple[Path, ...]
    count: int
    fallen: int
    pictured: int


def gallery(run: Run, out: Path, *, inline: int = INLINE) -> Gallery:
    """The examples of a run for a page in the folder `out`.

    Args:
        run: finished or not.
        out: the folder; files that an earlier page had beside it are removed.
        inline: bytes up to which everything is a part of the page.
    """
    found = _own(run.table(COLUMNS))
    groups: list[dict[str, Any]] = []
    shape = tuple(run.facts["data"]["shape"])
    drawn = len(shape) == 3 and shape[0] in (1, 3) and len(found) > 0
    files: dict[str, bytes] = {}
    clean = _clean(run, shape, files) if drawn else None
    fallen = pictured = 0
    for i, (group, rows) in enumerate(_groups(found, run)):
        groups.append(group)
        own = _kept(run, group) if drawn else {}
        numbers, factors, sheets = _pictures(run, own, shape, f"pictures-{i + 1}", files)
        pictures: dict[str, Mapping[int, float]] = {"picture": numbers, "factor": factors} if own else {}
        columns = {name: [values.get(place) for place in rows["example"]] for name, values in pictures.items()}
        payload = {"group": i, "sheets": sheets, "rows": {**_columns(rows, run), **columns}}
        files[f"rows-{i + 1}.js"] = f"firstorder.push({script(payload)});\n".encode()
        broken = rows["example"][rows["success"] & (rows["label"] == rows["clean_label"])]
        fallen, pictured = fallen + len(broken), pictured + int(broken.isin(list(own)).sum())
    size = sum(map(len, files.values()))
    within = size <= inline
    sources = {name: _address(name, content) if within else f"{FOLDER}/{name}" for name, content in files.items()}
    index = {
        "classes": list(run.facts["data"]["classes"]),
        "groups": groups,
        "files": [] if within else [sources[f"rows-{i + 1}.js"] for i in range(len(groups))],
        "norm": "L∞" if run.facts["specification"]["norm"] == "Linf" else "L2",
        "radii": [[eps, radius(eps)] for eps in summary.radii(run.facts)],
        "slack": [RELATIVE, ABSOLUTE],
        "shape": list(shape),
        "clean": clean,
        "sheets": {name: address for name, address in sources.items() if name.endswith(".png")},
        "stops": {attack["name"]: bool(attack["stops_early"]) for attack in run.facts["attacks"]},
    }
    scripts = tuple(content.decode() for name, content in files.items() if within and name.endswith(".js"))
    paths = _write({} if within else files, out / FOLDER)
    return Gallery(script(index), scripts, paths, len(found), fallen, pictured)


def script(value: object) -> str:
    """A plain value as JSON that may be in a script: no markup, no line separator, no NaN."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _own(rows: pd.DataFrame) -> pd.DataFrame:
    """What attacks made of a model's examples for the model itself."""
    return rows[(rows["model"] == rows["target"]) & rows["defence"].isna()].reset_index(drop=True)


def _groups(rows: pd.DataFrame, run: Run) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows of a model, an attack, a radius and a seed, in the order of the run."""
    parts = dict(iter(rows.groupby(["model", "attack", rows["eps"].fillna(0.0), "seed"])))
    order = {name: i for i, name in enumerate(summary.names(run.facts, "models"))}
    attacks = {name: i for i, name in enumerate(summary.names(run.facts, "attacks"))}
    for key in sorted(parts, key=lambda key: (order[key[0]], key[2], attacks[key[1]], key[3])):
        model, attack, eps, seed = key
        yield {"model": model, "attack": attack, "eps": float(eps) or None, "seed": int(seed)}, parts[key]


def _columns(rows: pd.DataFrame, run: Run) -> dict[str, list[Any]]:
    """The rows as columns of plain values; null where something is not known."""
    size = rows["linf" if run.facts["specification"]["norm"] == "Linf" else "l2"]
    return {
        "example": rows["example"].tolist(),
        "label": rows["label"].tolist(),
        "before": rows["clean_label"].tolist(),
        "after": rows["adversarial_label"].tolist(),
        "sure": _numbers(rows["clean_confidence"], 4),
        "sureAfter": _numbers(rows["confidence"], 4),
        "margin": _numbers(rows["logit_margin"], 3),
        "size": [float(f"{value:.6g}") for value in size],
        "success": rows["success"].astype(int).tolist(),
        "doubtful": rows["doubtful"].astype(int).tolist(),
        "forwards": _numbers(rows["forwards"], 1),
        "gradients": _numbers(rows["backwards"], 1),
        "stage": [value if isinstance(value, str) else None for value in rows["stage"]],
    }


def _numbers(values: pd.Series[Any], digits: int) -> list[float | int | None]:
    rounded = (None if value is None or not math.isfinite(value) else round(float(value), digits) for value in values)
    return [int(value) if value is not None and value == int(value) else value for value in rounded]


def _kept(run: Run, group: Mapping[str, Any]) -> dict[int, bytes]:
    """The pictures of a group, of the model itself, by example."""
    own = tuple(cell for cell in last(run.cells) if all(getattr(cell, key) == group[key] for key in group))
    kept: dict[int, bytes] = {}
    for table in replace(run, cells=own).tables(KEPT):
        for row in table.filter(table["adversarial"].is_valid()).to_pylist():
            if row["model"] == row["target"]:
                kept.setdefault(row["example"], row["adversarial"])
    return kept


def _clean(run: Run, shape: tuple[int, ...], files: dict[str, bytes]) -> dict[str, Any]:
    """The clean images as sheets, and how they lie there."""
    pixels = shape[1] * shape[2]
    count = min(run.facts["data"]["count"], max(CLEAN // pixels, 1))
    side = max(math.isqrt(SHEET // pixels), 1)
    names: list[str] = []
    for start in range(0, count, side * side):
        name = f"clean-{len(names) + 1}.png"
        files[name] = _sheet(run.examples(start, min(start + side * side, count)).numpy(), side)
        names.append(name)
    return {"count": count, "side": side, "names": names}


def _pictures(
    run: Run, kept: Mapping[int, bytes], shape: tuple[int, ...], name: str, files: dict[str, bytes]
) -> tuple[dict[int, int], dict[int, float], dict[str, Any] | None]:
    """The pictures of a group as sheets.

    A picture is an adversarial image, then its perturbation, magnified, on grey. Returns its number and by how much it
    is magnified, by example; and how these pairs lie in sheets: how many there are, how many in a line and in a sheet,
    and the sheets' names.
    """
    if not kept:
        return {}, {}, None
    examples, factors = sorted(kept), dict[int, float]()
    side = max(math.isqrt(SHEET // (shape[1] * shape[2])), 1)
    across = min(max(side // 2, 1), len(examples))
    each, names = across * side, list[str]()
    for start in range(0, len(examples), each):
        images: list[Array] = []
        for example in examples[start : start + each]:
            original = run.examples(example, example + 1)[0].numpy()
            adversarial = np.frombuffer(kept[example], "<f4").reshape(shape)
            largest = float(np.abs(adversarial - original).max())
            factors[example] = two_digits(0.5 / largest) if largest else 1.0
            images += [adversarial, 0.5 + factors[example] * (adversarial - original)]
        names.append(f"{name}-{len(names) + 1}.png")
        files[names[-1]] = _sheet(np.stack(images), 2 * across)
    numbers = {example: number for number, example in enumerate(examples)}
    return numbers, factors, {"count": len(numbers), "across": across, "each": each, "names": names}


def two_digits(value: float) -> float:
    """The largest number of two significant digits that is not above a positive `value`."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.12g}")


def _sheet(images: Array, across: int) -> bytes:
    """Images (N, C, H, W) in [0, 1] as a PNG of 8 bits a channel, `across` in a line."""
    count, channels, high, wide = images.shape
    lines = -(-count // across)
    sheet = np.zeros((lines * across, high, wide, channels), np.uint8)
    sheet[:count] = (images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    whole = sheet.reshape(lines, across, high, wide, channels).swapaxes(1, 2)
    whole = whole.reshape(lines * high, across * wide, channels).squeeze(2 if channels == 1 else ())
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "png")
    return buffer.getvalue()


def _address(name: str, content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if name.endswith(".png") else ""


def _write(files: Mapping[str, bytes], folder: Path) -> tuple[Path, ...]:
    """Write the files, and remove those of an earlier page."""
    for path in _earlier(folder, files):
        path.unlink()
    for name, content in files.items():
        if name.endswith(".js"):
            write_text(folder / name, content.decode())
            continue
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return tuple(folder / name for name in files)


def _earlier(folder: Path, files: Mapping[str, bytes]) -> Sequence[Path]:
    found = [path for kind in ("rows-*.js", "clean-*.png", "pictures-*.png") for path in sorted(folder.glob(kind))]
    return [path for path in found if path.name not in files]
