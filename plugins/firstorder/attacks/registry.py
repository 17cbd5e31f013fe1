"""The registry of attacks: the entry-point group `firstorder.attacks`.

A distribution registers an attack by naming a class, a subclass of `Attack`, in its metadata:

    [project.entry-points."firstorder.attacks"]
    my-attack = "my_package:MyAttack"

The name is the attack's registry name, the class's own name its name in every host. firstorder's attacks
are registered the same way. An entry that cannot be used is logged and listed in `failures`; it
affects no other.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

from firstorder.attacks.base import Attack
from firstorder.attacks.distribution import DISTRIBUTION

GROUP = "firstorder.attacks"

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registry:
    """What is registered in this environment.

    Attributes:
        attacks: registry name to class, sorted by name.
        failures: registry name to the reason why that entry is unusable.
        sources: registry name to the distribution that registered it.
    """

    attacks: Mapping[str, type[Attack]]
    failures: Mapping[str, str]
    sources: Mapping[str, str]

    def by_class_name(self) -> dict[str, type[Attack]]:
        """Class name to class, sorted by name: the names under which hosts offer the attacks."""
        return {cls.__name__: cls for cls in sorted(self.attacks.values(), key=lambda cls: cls.__name__)}


@cache
def registry() -> Registry:
    """The registry, read once per process; `registry.cache_clear()` rereads it."""
    attacks: dict[str, type[Attack]] = {}
    failures: dict[str, str] = {}
    sources: dict[str, str] = {}
    taken: dict[str, str] = {}
    found = entry_points(group=GROUP)
    for entry in sorted(found, key=lambda entry: (_source(entry) != DISTRIBUTION, entry.name, _source(entry))):
        source = _source(entry)
        reason = None
        if entry.name in attacks:
            reason = f"the name {entry.name!r} is taken by {sources[entry.name]}"
        else:
            cls, reason = _load(entry)
            if cls is not None and cls.__name__ in taken:
                reason = f"the class name {cls.__name__!r} is taken by the attack {taken[cls.__name__]!r}"
        if reason is not None:
            failures[entry.name if entry.name not in attacks else f"{entry.name} ({source})"] = reason
            logger.warning("the attack %r of %s is not available: %s", entry.name, source, reason)
            continue
        assert cls is not None
        attacks[entry.name], sources[entry.name], taken[cls.__name__] = cls, source, entry.name
    return Registry(_frozen(attacks), _frozen(failures), _frozen(sources))


def get(name: str) -> type[Attack]:
    """The class registered as `name` (or carrying that class name).

    Raises:
        ValueError: no such attack; the message names the nearest ones, or why the entry failed.
    """
    known = registry()
    cls = known.attacks.get(name) or known.by_class_name().get(name)
    if cls is not None:
        return cls
    if name in known.failures:
        raise ValueError(f"the attack {name!r} is registered but unusable: {known.failures[name]}")
    near = difflib.get_close_matches(name, known.attacks, n=3, cutoff=0.4)
    raise ValueError(
        f"unknown attack {name!r}; {'did you mean ' + ', '.join(near) + '?' if near else ''}"
        f" `firstorder attacks` lists all {len(known.attacks)}"
    )


def create(name: str, **parameters: Any) -> Attack:
    """The attack registered as `name` with the given hyper-parameters, the others at their defaults."""
    return get(name)(**parameters)


def _frozen(part: dict[str, T]) -> Mapping[str, T]:
    return MappingProxyType(dict(sorted(part.items())))


def _source(entry: EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else str(entry.dist.name)


def _load(entry: EntryPoint) -> tuple[type[Attack] | None, str | None]:
    """The entry's class, or the reason why it cannot be used."""
    try:
        cls = entry.load()
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; it must not take the others with it
        return None, f"{entry.value} cannot be imported: {type(error).__name__}: {error}"
    if not (isinstance(cls, type) and issubclass(cls, Attack) and is_dataclass(cls)):
        return None, f"{entry.value} is not a dataclass that subclasses firstorder.attacks.Attack"
    return cls, None
