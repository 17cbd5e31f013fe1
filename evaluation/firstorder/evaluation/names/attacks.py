"""Attacks on one line, NAME[+RULE][:KEY=VALUE,...], as in "pgd", "si-ni-fgsm:m=3", "pgd+quantised:alpha=eps/10".

This is the only reader of such lines: every command, specification and function of Python's has it from here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from firstorder.attacks import Attack, BoundedAttack, get, registry, rules
from firstorder.attacks.minimum_norm import PRESETS
from firstorder.evaluation.names.data import family
from firstorder.evaluation.names.numbers import number, short

RECOMMENDED = {
    "anu": "anu:annealed=false",
    "clipped-ng": 'clipped-ng:gamma=0.1,scope="element"',
    "clipped-ngm": 'clipped-ngm:gamma=0.1,scope="element"',
}
"""Options that measured better than the papers' defaults (docs/attacks.md), by the attack's name. A command that runs
one of these attacks without being asked for it runs both."""

AUTOATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
"""AutoAttack's own attacks, known here whether it is installed or not."""

VERSIONS = {"autoattack": "standard", "firstorder": "firstorder"}
"""AutoAttack's versions by their names among attacks."""

LONGEST = 1000
"""Characters of a line."""

MOST = {
    "memory_budget": 2**62,
    "steps": 10**7,
    "patience": 10**7,
    "restarts": 1000,
    "m": 1000,
    "N": 1000,
    "len_kernel": 1000,
}
"""The largest whole numbers that hyper-parameters may have."""

OTHERS = 10**6
"""The largest of those that are not in `MOST`."""

_RELATIVE = re.compile(r"eps(?:/(.+))?")


@dataclass(frozen=True, kw_only=True)
class Line:
    """An attack as a line names it.

    Attributes:
        label: the line.
        name: the attack's registry name.
        cls: its class.
        parameters: hyper-parameters that were given, the update rule as `direction`, and the data set's preset;
            "eps/4" is relative to the radius.
        known: the names of the hyper-parameters that it takes here.
    """

    label: str
    name: str
    cls: type[Attack]
    parameters: Mapping[str, Any]
    known: frozenset[str]

    @property
    def bounded(self) -> bool:
        """Whether it stays within a given radius."""
        return issubclass(self.cls, BoundedAttack)

    def build(self, *, eps: float | None = None, **defaults: Any) -> Attack:
        """The attack with the parameters of the line.

        Args:
            eps: the radius; a minimum-norm attack has none, and only resolves eps/4 with it.
            defaults: hyper-parameters for which the line has no value; those that the attack does not have are left
                out.

        Raises:
            ValueError: values that it does not take, or none of the radius where one is needed.
        """
        fields = {one.name for one in dataclasses.fields(self.cls)}
        words = {**{key: value for key, value in defaults.items() if key in fields}, **self.parameters}
        try:
            words = {key: at(value, eps, key) for key, value in words.items()}
            if self.bounded and eps is not None:
                words["eps"] = eps
            return self.cls(**words)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{short(self.label)}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Auto:
    """AutoAttack, or one of its attacks.

    Attributes:
        version: of AutoAttack; "custom" for one of its attacks.
        attacks: which, with "custom".
    """

    version: str
    attacks: tuple[str, ...] = field(default=())


def parse(
    label: str,
    *,
    without: Iterable[str] = (),
    more: Mapping[str, Any] | None = None,
    data: str = "",
) -> Line:
    """The attack that `label` names and the hyper-parameters it gives.

    Args:
        label: registry name, optionally "+" and the name of an update rule, optionally ":" and KEY=VALUE, ..., with
            values in JSON, or as 8/255, or relative to the radius as eps/10.
        without: hyper-parameters that the caller sets itself.
        more: hyper-parameters beside those of the line, as a file has them.
        data: the images, as in `data.stream`: an attack with presets for data sets takes theirs.

    Raises:
        ValueError: no such attack, rule or parameter, one given twice, or a value that is none.
    """
    head, words = _split(label)
    name, _, rule = head.partition("+")
    cls = get(name)
    if cls.needs:
        raise ValueError(
            f"{short(label)}: {name} needs {' and '.join(cls.needs)}, which cannot be written on a line; take another "
            f"attack here, or {cls.__name__}({cls.needs[0]}=...) from Python"
        )
    fields = {one.name for one in dataclasses.fields(cls)}
    known = frozenset(fields - {"direction"} - set(without))
    parameters: dict[str, Any] = {}
    if rule:
        if "direction" not in fields:
            raise ValueError(f"{short(label)}: {name} takes no update rule; leave out +{rule}")
        try:
            parameters["direction"] = rules().get(rule)()
        except ValueError as error:
            raise ValueError(f"{short(label)}: {error}") from None
    given = options(label, words, known)
    for key, found in (more or {}).items():
        _known(label, key, known)
        if key in given:
            raise ValueError(f"{short(label)}: {key} is given twice; leave out one of them")
        given[key] = checked(label, key, number_or(found))
    if "preset" in known - given.keys() and family(data) in PRESETS:
        parameters["preset"] = family(data)
    registered = next((key for key, one in registry().attacks.items() if one is cls), name)
    return Line(label=label, name=registered, cls=cls, parameters=parameters | given, known=known)


def autoattack(label: str, *, more: Mapping[str, Any] | None = None) -> Auto | None:
    """AutoAttack, or one of its attacks, if `label` names one; None for another name.

    Raises:
        ValueError: parameters, which these do not take here.
    """
    head, words = _split(label)
    head = head.partition("+")[0]
    if head not in (*VERSIONS, *AUTOATTACKS):
        return None
    if head != label or words or more:
        raise ValueError(f"{short(label)}: {head} takes no parameters here; leave them out")
    return Auto(version=VERSIONS[head]) if head in VERSIONS else Auto(version="custom", attacks=(head,))


def at(value: Any, eps: float | None, key: str = "alpha") -> Any:
    """A hyper-parameter at a radius: "eps/4" is its fourth part, another value itself.

    Raises:
        ValueError: a value relative to the radius where there is none.
    """
    if not relative(value):
        return value
    if eps is None:
        raise ValueError(f"{key}={value} has no radius to refer to; write a number")
    return eps / (number(value[4:]) if value[4:] else 1.0)


def relative(value: object) -> bool:
    """Whether a hyper-parameter is written relative to the radius, as "eps/4"."""
    found = _RELATIVE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return False
    try:
        return number(found[1] or "1") > 0
    except ValueError:
        return False


def options(label: str, words: str, known: Iterable[str], *, plain: Collection[str] = ()) -> dict[str, Any]:
    """The KEY=VALUE, ... of `words`: values in JSON, or as 8/255, or as eps/10.

    Args:
        label: what they belong to, for messages.
        words: as in "m=3,decay=0.9"; may be empty.
        known: the keys there are.
        plain: words that need no quotes.

    Raises:
        ValueError: another key, one that is there twice, or a value that is none.
    """
    known, found = frozenset(known), dict[str, Any]()
    rest: str | None = words or None
    while rest is not None:
        key, _, after = rest.partition("=")
        _known(label, key, known)
        if key in found:
            raise ValueError(f"{short(label)}: {key} is given twice; leave out one of them")
        text, rest = _value(after)
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            read = text if relative(text) or text in plain else number_or(text)
            if isinstance(read, str) and not relative(read) and read not in plain:
                raise ValueError(
                    f"{short(label)}: {key}={short(text)[1:-1]} is not JSON; write a number, 8/255, eps/10, true, "
                    'false, null or "text" in quotes'
                ) from None
        found[key] = checked(label, key, read)
    return found


def number_or(value: object) -> object:
    """A number that is written as text, "8/255", as the number it is; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return number(value)
    except ValueError:
        return value


def checked(label: str, key: str, found: object) -> object:
    """A hyper-parameter's value, if it is of a size that can be computed with.

    Raises:
        ValueError: a number that is infinite, NaN, or a whole one beyond all use.
    """
    for one in found if isinstance(found, list | tuple) else [found]:
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{short(label)}: {key}={one} is not finite; write a number")
        most = MOST.get(key, OTHERS)
        if isinstance(one, int) and abs(one) > most:
            raise ValueError(f"{short(label)}: {key}={short(one)} is too large; at most {most} is possible")
    return found


def _split(label: str) -> tuple[str, str]:
    """What is before the colon, and after it."""
    if len(label) > LONGEST:
        raise ValueError(f"{short(label)} has {len(label)} characters; an attack is named with at most {LONGEST}")
    head, _, words = label.partition(":")
    return head, words


def _known(label: str, key: str, known: frozenset[str]) -> None:
    if key not in known:
        name = label.partition(":")[0].partition("+")[0]
        raise ValueError(f"{short(label)}: {name} has no parameter {key!r}; it has {', '.join(sorted(known))}")


def _value(text: str) -> tuple[str, str | None]:
    """The text of the first value, and what is after its comma, None without one.

    A comma within quotes or brackets parts nothing.
    """
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        end = 0
    if end and text[end : end + 1] in ("", ","):
        return text[:end], text[end + 1 :] if text[end:] else None
    first, comma, rest = text.partition(",")
    return first, rest if comma else None
