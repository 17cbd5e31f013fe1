"""Attacks written on one line, as on the command line: "pgd", "si-ni-fgsm:m=3", "mi-fgsm+quantised:decay=0.9"."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from firstorder.attacks import Attack, get, rules

RECOMMENDED = {
    "anu": "anu:annealed=false",
    "clipped-ng": 'clipped-ng:gamma=0.1,scope="element"',
    "clipped-ngm": 'clipped-ngm:gamma=0.1,scope="element"',
}
"""Options that measured better than the papers' defaults (docs/attacks.md), by the attack's name. A command that runs
one of these attacks without being asked for it runs both."""


def parse(label: str, *, without: frozenset[str] = frozenset()) -> tuple[type[Attack], dict[str, Any]]:
    """The attack class that `label` names and the hyper-parameters it gives.

    Args:
        label: registry name, optionally "+" and the name of an update rule, optionally ":" and KEY=VALUE, ...,
            with values in JSON.
        without: fields that the caller sets itself.

    Raises:
        ValueError: no such attack, rule or parameter, or a value that is not JSON.
    """
    head, _, words = label.partition(":")
    name, _, rule = head.partition("+")
    cls = get(name)
    fields = {field.name for field in dataclasses.fields(cls)} - {"loss", "direction"} - without
    parameters: dict[str, Any] = {}
    if rule:
        if "direction" not in cls.__dataclass_fields__:
            raise ValueError(f"{label!r}: {name} takes no update rule; leave out +{rule}")
        try:
            parameters["direction"] = rules().get(rule)()
        except ValueError as error:
            raise ValueError(f"{label!r}: {error}") from None
    return cls, parameters | options(label, words, fields)


def options(label: str, words: str, known: Iterable[str]) -> dict[str, Any]:
    """The KEY=VALUE, ... of `words`, values in JSON.

    Args:
        label: what they belong to, for messages.
        words: as in "m=3,decay=0.9"; may be empty.
        known: the keys there are.

    Raises:
        ValueError: another key, or a value that is not JSON.
    """
    found: dict[str, Any] = {}
    for word in words.split(",") if words else ():
        key, _, value = word.partition("=")
        if key not in known:
            name = label.partition(":")[0].partition("+")[0]
            raise ValueError(f"{label!r}: {name} has no parameter {key!r}; it has {', '.join(sorted(known))}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                f'{label!r}: {key}={value} is not JSON; write a number, true, false, null or "text" in quotes'
            ) from None
    return found
