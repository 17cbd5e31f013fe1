"""A leaderboard in RobustBench's columns: models against AutoAttack and any registered attacks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from firstorder.autoattack import AutoAttack, Record
from firstorder.evaluation.names import models, packaged
from firstorder.evaluation.names.attacks import at, autoattack, parse
from firstorder.evaluation.names.packaged import Images
from firstorder.files import write_text

AUTOATTACK = "autoattack"
"""The name of the standard AutoAttack among attacks."""

TAKEN = ("eps", "norm", "memory_budget")
"""Hyper-parameters that are the leaderboard's."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model to rank.

    Attributes:
        name: as in the table.
        load: returns the model, in evaluation mode.
        images: loads the images it is judged on, in [0, 1].
        info: RobustBench's model_info of it, empty where there is none.
        data: the images' name, by which attacks choose their presets.
    """

    name: str
    load: Callable[[], nn.Module]
    images: Callable[[], Images]
    info: dict[str, Any] = field(default_factory=dict)
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's line. Accuracies are shares; `robust` by attack; `best_known` after all attacks together.

    `gradients` and `forwards` are backward and forward passes per image, by attack. `reported` is RobustBench's
    AutoAttack figure at the same eps. `unverified` counts examples that did not pass the second look, `doubtful` those
    that no attack broke but some met NaN or infinite logits or gradients on: neither broken nor robust for sure.
    """

    model: str
    clean: float
    robust: dict[str, float]
    best_known: float
    gradients: dict[str, float]
    forwards: dict[str, float]
    reported: float | None
    images: int
    unverified: int
    doubtful: int
    architecture: str
    venue: str


def entry(spec: str, *, data: str = "cifar10-resnet18", model_dir: Path, info_dir: Path | None, threat: str) -> Entry:
    """The model that `spec` names, as `firstorder.evaluation.names.models` knows them.

    Args:
        data: the packaged model whose images judge a model that brings none.
        model_dir: where RobustBench's checkpoints are.
        info_dir: a folder of RobustBench's model_info, `info_dir/cifar10/Linf/NAME.json`.
        threat: "Linf" or "L2", the zoo's threat model.

    Raises:
        ValueError: a spec that names nothing.
    """
    if spec in packaged.MODELS and packaged.MODELS[spec].data:
        own = packaged.MODELS[spec]
        return Entry(name=spec, load=own.model, images=own.images, data=own.data)
    make = models.finder(spec, zoo=models.Zoo(folder=model_dir, threat=threat))
    source, _, name = spec.partition(":")
    info: dict[str, Any] = {}
    if source == "robustbench":
        path = None if info_dir is None else info_dir / "cifar10" / threat / f"{name}.json"
        info = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    return Entry(
        name=name if source == "robustbench" else spec,
        load=lambda: models.ready(make()),
        images=packaged.get(data).images,
        info=info,
        data=packaged.get(data).data,
    )


def check(attacks: Sequence[str], norm: str) -> None:
    """Raise ValueError for an attack that is unknown or does not know the norm."""
    for name in attacks:
        if autoattack(name) is None:
            line = parse(name, without=TAKEN)
            if norm not in line.cls.norms:
                raise ValueError(f"{name} knows {' and '.join(line.cls.norms)}, not norm={norm!r}; leave it out")
            line.build(eps=1.0 if line.bounded else None)


def judge(
    model: Entry,
    attacks: Sequence[str],
    *,
    eps: float,
    norm: str,
    count: int,
    seed: int,
    batch_size: int,
    states: Path,
    progress: Callable[[str], None] = lambda name: None,
) -> Row:
    """Run every attack on all examples of the model by itself; what was run before is read from `states`."""
    network, images = model.load(), model.images()
    x, y = images.x[:count], images.y[:count]
    records: dict[str, Record] = {}
    for name in attacks:
        progress(name)
        auto = autoattack(name)
        parameters: dict[str, dict[str, Any]] = {}
        if auto is not None:
            names, version = list(auto.attacks), auto.version
        else:
            line = parse(name, without=TAKEN, data=model.data)
            names, version = [line.name], "custom"
            words = {key: at(value, eps if line.bounded else None) for key, value in line.parameters.items()}
            parameters |= {line.name: words} if words else {}
        adversary = AutoAttack(network, norm, eps, seed, False, names, version, device="cpu", parameters=parameters)
        state = states / f"{_filename(model.name)}-{name}-{norm}-{eps:g}-{len(x)}-{batch_size}-{seed}.json"
        adversary.run_standard_evaluation(x, y, bs=batch_size, state_path=state)
        assert adversary.record is not None
        records[name] = adversary.record
    standing = torch.stack([record.robust for record in records.values()]).all(0)
    same = abs(float(model.info.get("eps") or eps) - eps) < 1e-4
    reported = model.info.get("autoattack_acc") if same else None
    return Row(
        model=str(model.info.get("name") or model.name),
        clean=next(iter(records.values())).accuracy["clean"],
        robust={name: float(record.robust.float().mean()) for name, record in records.items()},
        best_known=float(standing.float().mean()),
        gradients={name: sum(record.gradients.values()) / len(x) for name, record in records.items()},
        forwards={name: sum(record.forwards.values()) / len(x) for name, record in records.items()},
        reported=None if reported in (None, "") else float(reported) / 100,
        images=len(x),
        unverified=sum(sum(record.unverified.values()) for record in records.values()),
        doubtful=int((standing & torch.stack([record.doubtful for record in records.values()]).any(0)).sum()),
        architecture=str(model.info.get("architecture") or type(network).__name__),
        venue=str(model.info.get("venue") or ""),
    )


def write(rows: Sequence[Row], out: Path, *, facts: dict[str, Any]) -> list[Path]:
    """Write leaderboard.md, .csv and .json to `out`; returns the paths."""
    header, lines = table(rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    passes = [
        [row.model, name, f"{row.gradients[name]:.0f}", f"{row.forwards[name]:.0f}"]
        for row in rank(rows)
        for name in row.robust
    ]
    protocol = ", ".join(f"{name} {value}" for name, value in facts.items())
    contents = {
        "leaderboard.md": f"{_markdown(header, lines)}\n\nAccuracies in percent; {protocol}. Doubtful images met NaN: "
        "neither broken nor robust for sure, counted as robust. Passes per image:\n\n"
        + _markdown(["model", "attack", "backward", "forward"], passes)
        + "\n",
        "leaderboard.csv": text.getvalue(),
        "leaderboard.json": json.dumps({**facts, "models": [vars(row) for row in rank(rows)]}, indent=2) + "\n",
    }
    for name, content in contents.items():
        write_text(out / name, content)
    return [out / name for name in contents]


def rank(rows: Sequence[Row]) -> list[Row]:
    """Best known robust accuracy first, then clean accuracy, then name."""
    return sorted(rows, key=lambda row: (-row.best_known, -row.clean, row.model))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines, ranked, in percent."""
    attacks = [name for name in rows[0].robust if name != AUTOATTACK]
    header = ["rank", "model", "clean", "AutoAttack", "AutoAttack (reported)", "best known", *attacks]
    lines = [
        [
            str(place),
            row.model,
            _percent(row.clean),
            _percent(row.robust.get(AUTOATTACK)),
            _percent(row.reported),
            _percent(row.best_known),
            *[_percent(row.robust[name]) for name in attacks],
            str(row.images),
            str(row.unverified),
            str(row.doubtful),
            row.architecture,
            row.venue,
        ]
        for place, row in enumerate(rank(rows), 1)
    ]
    return [*header, "images", "unverified", "doubtful", "architecture", "venue"], lines


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in (header, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _filename(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
