"""The page of all items of the papers, made from what was computed, and the record that it is made from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstorder.evaluation.names.citations import PAPERS
from firstorder.evaluation.names.packaged import ASSETS
from firstorder.evaluation.names.papers import Item, items
from firstorder.evaluation.reporting.readings import kept, tables
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

Every table, figure, algorithm and ablation of the five papers, and what is found of it here. None of the papers' own
networks is available, so figures differ, and what is compared is which side is ahead. A paper's claim

- *agrees* where the 95 % interval of the difference lies wholly on the paper's side,
- *differs* where it lies wholly on the other side, or wholly below the least difference that counts (*counts from*).
  That is half of the paper's difference, for norms half of its relative difference. Below it there is no difference
  here, or a much smaller one,
- is *undecided* else.

An item differs if one of its claims does, and agrees if all do. Algorithms, equations, pictures and costs have no
interval. They agree where tests compare the code with a slow transcription of the paper, or where the command shows the
same. The difference in an order of several rows is that of its ends. A difference of norms is over the images for which
both sides have one. Images and seeds were added to some items that were undecided, so their intervals hold somewhat
less often than 95 times in 100.

`firstorder reproduce ITEM` computes an item, `firstorder reproduce list` prints the list, and `firstorder reproduce
record` and `firstorder reproduce page` make this page. Costs are of the command that is shown, on one core. The robust
CIFAR-10 network `nets.py:adv4` is the published *cifar10-dathathri2020-cnn-a-adv4*, trained at 4/255.
"""


def recorded() -> dict[str, dict[str, Any]]:
    """What was computed of every item, by its name."""
    found: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return found


def record(out: Path, into: Path = RECORD) -> Path:
    """Add the results in the folders of `out` to the record, but none of the smallest size.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    found = {name: kept(name, out / name) for name in items()}
    whole = {name: one for name, one in found.items() if one is not None and not one["small"]}
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
        readings = {name: _reading(one, known.get(name)) for name, one in own.items()}
        counts.update(readings.values())
        paper = PAPERS[key]
        parts.append(f"## {paper.title.replace('{', '').replace('}', '')} ({short}, {paper.year})")
        rows = [(f"[{one.item}](#{name})", one.shows, readings[name]) for name, one in own.items()]
        first = next(name for name, one in own.items() if one.kind != "command")
        parts.append(f"The links end with the names of the items, as in `firstorder reproduce {first}`.")
        parts.append(markdown(("item", "what it shows", "here"), rows, words=3))
        parts += [_section(name, one, known.get(name)) for name, one in own.items()]
    plural = {"agrees": "agree", "differs": "differ"}
    message = ", ".join(f"{counts[reading]} {plural.get(reading, reading)}" for reading in sorted(counts))
    read = sum(one["reading"] == "agrees" for one in known.values())
    message = f"{sum(counts.values())} items: {message}. Of those that agree, {read} do by an interval."
    return "\n\n".join([HEADER.rstrip(), message, *parts]) + "\n"


def _reading(one: Item, found: Mapping[str, Any] | None) -> str:
    return str(found["reading"]) if found else one.reading or "not computed"


def _section(name: str, one: Item, found: Mapping[str, Any] | None) -> str:
    """An item: what it shows, its command, its figures beside the paper's, and what they say of its claims."""
    parts = [
        f"### {name}",
        f"{one.item}: {one.shows}. **{_reading(one, found).capitalize()}.**",
        _command(name, one, found),
    ]
    rows = list(dict.fromkeys([*one.published, *(row for claim in one.claims for row in claim.rows)]))
    for table, findings in zip(found["tables"], found["findings"], strict=True) if found else ():
        parts += [f"{table['title']}:", *tables(one, table, findings, rows)]
    if one.published and not found:
        parts.append("In the paper: " + "; ".join(f"{row} {value:g}" for row, value in one.published.items()) + ".")
    parts += [_sentence(label, said) for label, said in (("Here", one.here), ("In the paper", one.theirs)) if said]
    parts += [f"{one.reason[0].upper()}{one.reason[1:]}."] if one.reason else []
    return "\n\n".join(part for part in parts if part)


def _command(name: str, one: Item, found: Mapping[str, Any] | None) -> str:
    """How to compute an item, and what that costs; empty where it is out of reach."""
    if one.command:
        return " and ".join(f"`{command}`" for command in one.command.split("; "))
    if one.kind == "command":
        return ""
    size = f" --count {found['count']}" if found and found.get("count") else ""
    option, of, what = one.needs.partition(" of ")
    needs = f" with `{option}`{of}{what}" if option else ""
    return f"`firstorder reproduce {name}{size}`{needs}; cost: {one.cost}"


def _sentence(label: str, said: str) -> str:
    return f"{label}: {said.rstrip('.')}."
