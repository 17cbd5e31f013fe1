"""The page of all items of the papers, made from what was computed, and the record that it is made from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from firstorder.evaluation.names.citations import PAPERS
from firstorder.evaluation.names.packaged import ASSETS
from firstorder.evaluation.names.papers import Item, items
from firstorder.evaluation.reporting.readings import FILE
from firstorder.evaluation.reporting.tables import markdown
from firstorder.files import write_text

RECORD = ASSETS / "papers" / "readings.json"

SHORT = {
    "liu2020sharper": "quantised gradients",
    "lin2020nesterov": "Nesterov, scale",
    "ngm2024provable": "clipped NGM",
    "liu2021selfadaptive": "self-adaptive norm",
    "dabouei2022revisiting": "ENGM",
}
"""What the list calls the papers."""

HEADER = """# The five papers, item by item

Every table, figure, algorithm and ablation of the five papers, what it shows there, and what is found here. None of
the papers' own networks is available, so figures differ and directions are compared. A claim *agrees* where the 95 %
interval of the difference here lies wholly on the paper's side. It *differs* where the interval lies wholly on the
other, or wholly below half of the difference that the paper prints (of norms in proportion): then there is none here,
or a much smaller one. It is *undecided* else. The difference and its interval stand in brackets, in the unit of the
table; a norm's is over the images for which both sides have one. Images and seeds were added to some items that were
undecided, so their intervals hold somewhat less often than 95 times in 100. An item differs if one of its claims does,
and agrees if all do.

This page is made by `firstorder reproduce record` and `firstorder reproduce page` from what `firstorder reproduce ITEM`
computed; `firstorder reproduce list` prints it. The robust CIFAR-10 network `nets.py:adv4` is the published
*cifar10-dathathri2020-cnn-a-adv4*, trained at 4/255.
"""


def recorded() -> dict[str, dict[str, Any]]:
    """What was computed of every item, by its name."""
    found: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return found


def record(out: Path, into: Path = RECORD) -> Path:
    """Add the results in the folders of `out` to the record, but none of the smallest size.

    Raises:
        ValueError: there are none.
    """
    found = {name: json.loads((out / name / FILE).read_text(encoding="utf-8"))
             for name in items() if (out / name / FILE).exists()}  # fmt: skip
    whole = {name: one for name, one in found.items() if not one["small"]}
    if not whole:
        raise ValueError(f"{out} holds no results; compute items first: firstorder reproduce ITEM --out {out}")
    known = {**recorded(), **whole}
    write_text(into, json.dumps({name: known[name] for name in items() if name in known}, indent=1) + "\n")
    return into


def page() -> str:
    """The page, as Markdown."""
    known, parts, counts = recorded(), [], Counter[str]()
    for key, short in SHORT.items():
        own = {name: one for name, one in items().items() if one.paper == key}
        rows = []
        for name, one in own.items():
            row = _row(name, one, known.get(name))
            counts[row[-1].partition(":")[0]] += 1
            rows.append(row)
        paper = PAPERS[key]
        parts.append(f"## {paper.title.replace('{', '').replace('}', '')} ({short}, {paper.year})")
        parts.append(markdown(("item", "shows", "command", "here", "the paper", "reading"), rows, words=6))
    message = ", ".join(f"{counts[reading]} {reading}" for reading in sorted(counts))
    return "\n\n".join([HEADER.rstrip(), f"{sum(counts.values())} items: {message}.", *parts]) + "\n"


def _row(name: str, one: Item, found: Mapping[str, Any] | None) -> tuple[str, ...]:
    size = "" if found is None or not found.get("count") else f" --count {found['count']}"
    own = f"`firstorder reproduce {name}{size}`" + f", {one.needs}" * bool(one.needs)
    command = one.command or ("" if one.kind == "command" else own)
    theirs = one.theirs or _figures(one.published)
    here = one.here
    reading: str = one.reading or "not computed"
    if found is not None:
        shown = list(dict.fromkeys([*one.published, *(row for claim in one.claims for row in claim.rows)]))
        here = " · ".join(
            f"{table['title']} ({table['unit']}). "
            + _figures({row: table["rows"].get(row) for row in shown}, table.get("of", {}))
            for table in found["tables"]
        )
        reading = f"{found['reading']}: {' · '.join(_claims(found))}"
    if one.reason:
        reading += f"{'.' if found else ':'} {one.reason[0].upper() + one.reason[1:] if found else one.reason}"
    return f"{one.item} (`{name}`)", one.shows, command, here, theirs, reading


def _claims(found: Mapping[str, Any]) -> list[str]:
    """What is found of the claims, a text for each table."""
    several = len(found["findings"]) > 1
    alone = not several and len(found["findings"][0]) == 1
    texts = []
    for table, own in zip(found["tables"], found["findings"], strict=True):
        parts = [_difference(one) if alone else f"{one['says']} ({one['reading']}, {_difference(one)})" for one in own]
        texts.append(f"{table['title']}: " * several + "; ".join(parts))
    return texts


def _difference(one: Mapping[str, Any]) -> str:
    """What a claim is read from: the difference, its interval, and the least that counts where it decides."""
    value, low, high = ("–" if one[key] is None else f"{round(one[key], 9):.3g}" for key in ("value", "low", "high"))
    least = one.get("least") if one["reading"] == "differs" and one["high"] > 0 else None
    return f"{value} [{low}, {high}]" + ("" if least is None else f", counts from {least:.3g}")


def _figures(rows: Mapping[str, float | None], of: Mapping[str, int] = MappingProxyType({})) -> str:
    """Figures by row; `of` is of how many units those are that not all have."""
    return "; ".join(
        f"{row}: {value:.4g}" + (f" (of {of[row]})" if row in of else "")
        for row, value in rows.items()
        if value is not None
    )
