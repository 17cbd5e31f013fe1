"""The registries of attacks and of update rules: what installed distributions name in entry-point groups.

A distribution registers a class by naming it in its metadata:

    [project.entry-points."firstorder.attacks"]
    my-attack = "my_package:MyAttack"

    [project.entry-points."firstorder.rules"]
    my-rule = "my_package:MyRule"

An attack is a subclass of `Attack`; the name is its registry name, the class's own name its name in every host. An
update rule is a `Direction` that can be made without arguments; the name goes wherever a rule is named: "pgd+my-rule"
on the command line, `direction="my-rule"` in code. `firstorder.training` has the third group, of gradient methods.
firstorder's own are registered the same way. An entry that cannot be used is logged and listed in `failures`; it
affects no other.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar, get_args

from typing_extensions import Self

from firstorder.attacks import validation
from firstorder.attacks.base import Attack
from firstorder.attacks.directions import Direction, Scale
from firstorder.attacks.distribution import DISTRIBUTION

T = TypeVar("T")
V = TypeVar("V")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Registry(Generic[T]):
    """What is registered in one entry-point group of this environment.

    Attributes:
        noun: what an entry is, for messages.
        classes: registry name to class, sorted by name.
        failures: registry name to the reason why that entry is unusable.
        sources: registry name to the distribution that registered it.
    """

    noun: str
    classes: Mapping[str, type[T]]
    failures: Mapping[str, str]
    sources: Mapping[str, str]

    @classmethod
    def read(cls, group: str, noun: str, fault: Callable[[type], str | None]) -> Self:
        """The entries of a group: firstorder's first, then by name. Of two with one name the first stays.

        Args:
            group: the entry-point group.
            noun: what an entry is, for messages.
            fault: says why a class is none of these, None if it is one; it may raise, as loading may.
        """
        classes: dict[str, type[T]] = {}
        failures: dict[str, str] = {}
        sources: dict[str, str] = {}
        for entry in sorted(entry_points(group=group), key=lambda e: (_source(e) != DISTRIBUTION, e.name, _source(e))):
            source, key = _source(entry), entry.name
            try:
                if key in classes:
                    raise ValueError(f"the name {key!r} is taken by {sources[key]}")
                found = _load(entry, fault)
                for name, other in classes.items():
                    if other.__name__ == found.__name__:
                        raise ValueError(f"the class name {found.__name__!r} is taken by the {noun} {name!r}")
            except ValueError as reason:
                failures[f"{key} ({source})" if key in classes or key in failures else key] = str(reason)
                logger.warning("the %s %r of %s is not available: %s", noun, key, source, reason)
                continue
            classes[key], sources[key] = found, source
        return cls(noun=noun, classes=_frozen(classes), failures=_frozen(failures), sources=_frozen(sources))

    def get(self, name: str) -> type[T]:
        """The class registered as `name`.

        Raises:
            ValueError: no such entry; the message names the nearest ones, or why the entry failed.
        """
        if name in self.classes:
            return self.classes[name]
        if name in self.failures:
            raise ValueError(f"the {self.noun} {name!r} is registered but unusable: {self.failures[name]}")
        near = difflib.get_close_matches(name, self.classes, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown {self.noun} {name!r};{' did you mean ' + ', '.join(near) + '?' if near else ''}"
            f" `firstorder attacks` lists all {len(self.classes)}"
        )


@dataclass(frozen=True, kw_only=True)
class Attacks(Registry[Attack]):
    """The registered attacks, which have a second name: their class's, under which hosts offer them."""

    @property
    def attacks(self) -> Mapping[str, type[Attack]]:
        """Registry name to class, sorted by name."""
        return self.classes

    def by_class_name(self) -> dict[str, type[Attack]]:
        """Class name to class, sorted by name: the names under which hosts offer the attacks."""
        return {cls.__name__: cls for cls in sorted(self.classes.values(), key=lambda cls: cls.__name__)}

    def get(self, name: str) -> type[Attack]:
        cls = None if name in self.classes else self.by_class_name().get(name)
        return super().get(name) if cls is None else cls


@cache
def registry() -> Attacks:
    """The registered attacks, read once per process; `registry.cache_clear()` rereads them."""
    return Attacks.read("firstorder.attacks", "attack", _no_attack)


@cache
def rules() -> Registry[Direction]:
    """The registered update rules, read once per process; `rules.cache_clear()` rereads them."""
    return Registry[Direction].read("firstorder.rules", "update rule", _no_rule)


def get(name: str) -> type[Attack]:
    """The attack class registered as `name` (or carrying that class name).

    Raises:
        ValueError: no such attack; the message names the nearest ones, or why the entry failed.
    """
    return registry().get(name)


def create(name: str, **parameters: Any) -> Attack:
    """The attack registered as `name` with the given hyper-parameters, the others at their defaults."""
    return get(name)(**parameters)


def update_rule(direction: Direction | str | None) -> Direction | None:
    """The update rule that an attack's `direction` names: a name is the registered rule with its defaults.

    Raises:
        ValueError: a name that is not registered, or something that is no update rule.
    """
    if isinstance(direction, str):
        return rules().get(direction)()
    if direction is not None and (isinstance(direction, type) or not isinstance(direction, Direction)):
        raise ValueError(f"direction={direction!r} is no update rule; pass one, as in Quantised(), or its name")
    return direction


def _no_attack(cls: type) -> str | None:
    if not (issubclass(cls, Attack) and is_dataclass(cls)):
        return "is not a dataclass that subclasses firstorder.attacks.Attack"
    return None


def _no_rule(cls: type) -> str | None:
    made = cls()
    if not isinstance(made, Direction):
        return "is not a firstorder.attacks.Direction: it has no scale, init or __call__"
    if made.scale not in get_args(Scale):
        return f"has scale={made.scale!r}; it must be one of {', '.join(get_args(Scale))}"
    if made.scale == "component":
        validation.number("gamma", getattr(made, "gamma", None), low=0, above=True)
    return None


def _load(entry: EntryPoint, fault: Callable[[type], str | None]) -> Any:
    """The entry's class.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        cls = entry.load()
        reason = "is not a class" if not isinstance(cls, type) else fault(cls)
        if reason is None and inspect.isabstract(cls):
            reason = f"is abstract: it does not define {', '.join(sorted(cls.__abstractmethods__))}"
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; it must not take the others with it
        raise ValueError(f"{entry.value} cannot be used: {type(error).__name__}: {error}") from None
    if reason is not None:
        raise ValueError(f"{entry.value} {reason}")
    return cls


def _frozen(part: dict[str, V]) -> Mapping[str, V]:
    return MappingProxyType(dict(sorted(part.items())))


def _source(entry: EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else str(entry.dist.name)
