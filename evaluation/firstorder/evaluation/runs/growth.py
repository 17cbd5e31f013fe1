"""What a run becomes when it is called again: it keeps what it has, and gets what is new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_origin

from firstorder.evaluation.names.code import require_trust
from firstorder.evaluation.runs.cells import FORMAT, Cell
from firstorder.evaluation.runs.specification import AttackEntry, ModelEntry, Specification, specify
from firstorder.evaluation.runs.store import FACTS, Store

LISTS = tuple(name for name, field in Specification.model_fields.items() if get_origin(field.annotation) is tuple)
"""Keys of a specification that hold several values."""

NAMED = 3
"""How many pairs of a model and an attack a line names."""


class Growth(NamedTuple):
    """How a run changes beside getting what is new.

    Attributes:
        only: it becomes what is asked for, and what else it had is no part of it any more.
        remove: models and attacks, by their names in the run, that it loses.
        trust_code: whether a function that the run's folder alone names may be run.
    """

    only: bool = False
    remove: tuple[str, ...] = ()
    trust_code: bool = False


def grown(asked: Specification, had: Mapping[str, Any], growth: Growth) -> Specification:
    """The specification of a run that had the facts `had` and is called with the specification `asked`.

    Of the keys that hold several values it has those it had, then the new ones; an entry of the same name is replaced.
    Other keys are as asked.

    Raises:
        ValueError: a name to remove that it does not have, or nothing left.
    """
    values = asked.model_dump(mode="json")
    if had and not growth.only:
        before = specify(had["specification"])
        own = [entry.model for entry in before.models if entry not in asked.models]
        require_trust(own, source=FACTS, trusted=growth.trust_code)
        for key in LISTS:
            if key == "sources" and not (before.sources and asked.sources):
                continue  # one of them is all models
            merged = {_name(entry): entry for entry in getattr(before, key)}
            merged |= {_name(entry): entry for entry in getattr(asked, key)}
            values[key] = [_plain(entry) for entry in merged.values()]
    whole = specify(values)
    for name in growth.remove:
        if name not in map(_name, (*whole.models, *whole.attacks)):
            known = ", ".join(map(_name, (*whole.models, *whole.attacks)))
            raise ValueError(f"--remove {name}: the run has no such model or attack; it has {known}")
    for key in ("models", "attacks"):
        values[key] = [_plain(entry) for entry in getattr(whole, key) if _name(entry) not in growth.remove]
        if not values[key]:
            raise ValueError(f"--remove would leave no {key}; leave one, or name another folder with --out")
    return specify(values)


def left_out(now: Specification, cells: tuple[Cell, ...], had: Mapping[str, Any], store: Store) -> Iterator[str]:
    """A line on finished cells that the run had and has no more.

    Args:
        now: the specification.
        cells: those that the run has now.
        had: the facts of before.
        store: of the run.
    """
    if had.get("format", FORMAT) != FORMAT:
        yield "the run's results are of an older version: all are computed anew"
        return
    keys = {cell.key for cell in cells}
    lost = [cell for cell in map(Cell.read, had.get("cells", ())) if cell.key not in keys]
    lost = [cell for cell in lost if store.done(cell.key)]
    if not lost:
        return
    pairs = list(dict.fromkeys(f"{cell.attack} on {cell.model}" for cell in lost))
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    line = f"no part of the run any more: {len(lost)} finished cells of {', '.join(pairs[:NAMED])}{more}"
    before = specify(had["specification"])
    other = [key for key in type(now).model_fields if key not in LISTS and getattr(now, key) != getattr(before, key)]
    if other:
        line += f" ({', '.join(f'{key} was {getattr(before, key)} and is {getattr(now, key)}' for key in other)})"
    yield f"{line}; their files stay, and serve again when they are asked for"


def known(store: Store) -> tuple[dict[str, Any], list[str]]:
    """The facts of the run in a folder, empty where there are none, and a line where they are damaged."""
    try:
        return store.facts() or {}, []
    except ValueError:
        line = f"{FACTS} is damaged: what the run had beside what this call asks for is not known; its cells stay"
        return {}, [line]


def _name(entry: object) -> Any:
    return entry.label if isinstance(entry, ModelEntry | AttackEntry) else entry


def _plain(entry: Any) -> Any:
    return entry.model_dump(mode="json") if isinstance(entry, ModelEntry | AttackEntry) else entry
