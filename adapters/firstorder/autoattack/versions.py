"""What each version of our `AutoAttack` runs, and with which parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from firstorder.attacks import validation
from firstorder.autoattack.classic import VERSIONS

AUTOATTACK = "autoattack"
"""In a list of attacks, the standard four with the budgets of version="standard"."""

FAST = "verdict"
"""What version="fast" runs."""

FIRST: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "Linf": {"pqgd": {}, "pgd": {}},
    "L2": {"anu": {"annealed": False}, "pgd": {}},
}
"""The registered attacks that version="firstorder" runs before AutoAttack's four, with the recommended options."""

Parameters = dict[str, dict[str, Any]]


def named(version: str | None, names: Sequence[str], norm: str) -> str:
    """The version that is meant: "custom" for a list of names, "standard" for nothing.

    Raises:
        ValueError: one that is not known, has no attack for the norm, or leaves no room for a list.
    """
    version = version or ("custom" if names else "standard")
    validation.choice("version", version, (*VERSIONS, "firstorder", "fast", "custom"))
    if names and version != "custom":
        raise ValueError(f"attacks_to_run={names} has no effect with version={version!r}; leave one of them out")
    if version in ("firstorder", "fast") and norm not in FIRST:
        raise ValueError(f"version={version!r} has no attack for norm={norm!r}; use version='standard'")
    return version


def base(version: str, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The version, with its list of names, that AutoAttack itself is set up as."""
    return ("standard", ()) if version in ("firstorder", "fast") or AUTOATTACK in names else (version, names)


def listed(version: str, names: Sequence[str], norm: str, own: Sequence[str]) -> list[str]:
    """The attacks that are run, in order.

    Args:
        version: as `named` gives it.
        names: the caller's list.
        norm: of the ball.
        own: AutoAttack's list as it was set up.
    """
    if version == "fast":
        return [FAST]
    if version == "firstorder":
        return [*FIRST[norm], *own]
    return [n for name in names for n in (own if name == AUTOATTACK else [name])] if AUTOATTACK in names else list(own)


def settled(
    version: str, norm: str, parameters: Mapping[str, Mapping[str, Any]] | None, effort: int | None
) -> Parameters:
    """The parameters of registered attacks, those of the version among them.

    Raises:
        ValueError: the effort is given twice.
    """
    chosen = {name: dict(words) for name, words in (parameters or {}).items()}
    if effort is not None:
        if "effort" in chosen.get(FAST, {}):
            raise ValueError(f"effort={effort} is among the parameters of {FAST!r} too; leave one of them out")
        chosen[FAST] = {**chosen.get(FAST, {}), "effort": effort}
    if version == "firstorder":
        chosen |= {name: {**words, **chosen.get(name, {})} for name, words in FIRST[norm].items()}
    return chosen


def check(parameters: Parameters, names: Sequence[str], audit: int | None) -> None:
    """Require parameters of attacks that are run, without what is the evaluation's, and an audit where it is one."""
    for name in parameters.keys() - set(names):
        raise ValueError(f"parameters[{name!r}]: that attack is not run; the list is {list(names)}")
    for name, words in parameters.items():
        if words.keys() & {"eps", "norm"}:
            raise ValueError(f"parameters[{name!r}] sets eps or norm, which are the evaluation's; leave them out")
    if audit is not None:
        validation.count("audit", audit)
        if FAST not in names:
            raise ValueError(f"audit={audit} is of what a verdict gives up; name {FAST!r} among the attacks")
