"""The signature under which a host offers an attack.

The parameters are the attack's own fields in the host's words, then the host's own parameters. Where
the host has a class for the same attack, the parameters the two share keep its order and its defaults, so
that swapping the import keeps the call and its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from inspect import signature as inspect_signature
from typing import Any

from firstorder.attacks import Attack, IterativeAttack

COMMON = frozenset(f.name for f in dataclasses.fields(IterativeAttack))
"""Fields that every iterative attack has; all others belong to the attack's paper."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host's words.

    Attributes:
        first: its name for the model, always the first parameter; None where attacks are made without one.
        renames: core field to the host's name for it; None hides the field.
        order: the host's names that may be given by position, in its order; "*" is where the fields
            that belong to the attack's paper.
        extras: the host's own parameters with their defaults.
    """

    first: str | None
    renames: Mapping[str, str | None] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    def word(self, name: str) -> str | None:
        """The host's name for a core field, None where it has none."""
        return self.renames.get(name, name)


def signature(host: Host, attack: type[Attack], peer: type | None = None, **defaults: Any) -> Signature:
    """The signature of `attack` in `host`.

    Args:
        host: the host's words.
        attack: the attack class.
        peer: the host's own class for the same attack, if it has one.
        defaults: defaults in the host's terms that depend on the attack.
    """
    own = {f.name: f for f in dataclasses.fields(attack) if f.init}
    values = {word: _default(f) for name, f in own.items() if (word := host.word(name)) is not None}
    values |= {**host.extras, **defaults}
    order = [
        name
        for word in host.order
        for name in ([n for n in own if n not in COMMON] if word == "*" else [word])
        if name in values
    ]
    if peer is not None:
        theirs = inspect_signature(peer).parameters
        values |= {name: p.default for name, p in theirs.items() if name in values}
        order = [name for name in theirs if name in values] + [name for name in order if name not in theirs]
    first = [] if host.first is None else [Parameter(host.first, Parameter.POSITIONAL_OR_KEYWORD)]
    return Signature(
        first
        + [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=values[name]) for name in order]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=v) for name, v in values.items() if name not in order]
    )


def _default(f: dataclasses.Field[Any]) -> Any:
    """A field's default, `Parameter.empty` if it is required."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return Parameter.empty if f.default is dataclasses.MISSING else f.default
