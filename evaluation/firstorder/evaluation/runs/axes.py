"""The attacks of a run: every entry of the specification, for every number of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch

from firstorder.attacks import Attack, TorchModel, Verdict, registry
from firstorder.attacks.base import Result
from firstorder.attacks.bounded import BoundedAttack
from firstorder.evaluation.names.attacks import RECOMMENDED, autoattack, parse
from firstorder.evaluation.runs.adversaries import Adversary, Auto, Registered
from firstorder.evaluation.runs.specification import AttackEntry, Specification
from firstorder.evaluation.runs.verdicts import Cascade

ALL = "all"
"""Means every registered attack that knows the norm, and the recommended options; without verdicts, which are
made of attacks and have a price of their own.
"""

GRADIENTS = 10**8
"""The most gradients per image that an attack may take; more would not end."""


class BudgetError(ValueError):
    """A step of the attack costs more than the budget."""


class Attacks(NamedTuple):
    """The attacks of a run, and the names of those that `ALL` left out, as a step of theirs exceeds the budget."""

    found: tuple[Adversary, ...]
    left_out: tuple[str, ...]


def attacks(specification: Specification, shape: tuple[int, ...]) -> Attacks:
    """The attacks that a specification names, on images of a shape (C, H, W).

    Raises:
        ValueError: as `adversary`, or two attacks of one name.
        ModuleNotFoundError: likewise.
    """
    found: dict[str, Adversary] = {}
    left_out: list[str] = []
    for entry, dear in _every(specification):
        for stepped in _stepped(entry, specification):
            try:
                one = dataclasses.replace(adversary(stepped, specification, shape), label=entry.label)
            except BudgetError:
                if not dear:
                    raise
                left_out.append(entry.label)
                continue
            known = found.setdefault(one.name, one)
            if dataclasses.replace(known, label=one.label) != one:
                raise ValueError(f"two attacks are called {one.name!r}; give one of them another name")
    if specification.audit is not None and not any(isinstance(one, Cascade) for one in found.values()):
        raise ValueError(f"audit={specification.audit} is of what a verdict gave up; add the attack verdict")
    if not found:
        raise ValueError(f"no attack has a step within budget={specification.budget}; raise it")
    return Attacks(tuple(found.values()), tuple(left_out))


def _every(specification: Specification) -> Iterator[tuple[AttackEntry, bool]]:
    """The entries, and whether they may be left out where they cost too much."""
    for entry in specification.attacks:
        if entry.attack != ALL:
            yield entry, False
            continue
        known = [name for name, cls in registry().attacks.items() if not cls.needs]
        for label in sorted([*known, *RECOMMENDED.values()]):
            cls = parse(label).cls
            if specification.norm in cls.norms and not issubclass(cls, Verdict):
                yield AttackEntry(attack=label, name=""), True


def _stepped(entry: AttackEntry, specification: Specification) -> Iterator[AttackEntry]:
    """The entry for each number of steps of the run, if the attack iterates and does not name its own."""
    if not specification.steps or autoattack(entry.attack) is not None:
        yield entry
        return
    line = parse(entry.attack, more=entry.parameters)
    if "steps" not in line.known or "steps" in line.parameters:
        yield entry
        return
    for steps in specification.steps:
        name = entry.name and f"{entry.name}, {steps} steps"
        yield AttackEntry(attack=entry.attack, name=name, steps=steps, **(entry.model_extra or {}))  # type: ignore[call-arg]


def adversary(entry: AttackEntry, specification: Specification, shape: tuple[int, ...]) -> Adversary:
    """The attack that an entry names, on images of a shape (C, H, W).

    Raises:
        ValueError: no such attack or parameter, another norm, or a step that costs more than the budget.
        ModuleNotFoundError: one of AutoAttack's, and it is not installed; the message names the extra.
    """
    auto = autoattack(entry.attack, more=entry.parameters)
    if auto is not None:
        import_module("firstorder.autoattack")  # says what to install
        if specification.targeted:
            raise ValueError(f"{entry.label!r} is untargeted here; leave it out, or leave out targeted")
        _needs_radius(entry, specification)
        return Auto(name=entry.label, norm=specification.norm, version=auto.version, attacks=auto.attacks)
    line = parse(entry.attack, without=("eps", "norm", "memory_budget"), more=entry.parameters, data=specification.data)
    if specification.norm not in line.cls.norms:
        known_norms = " and ".join(line.cls.norms)
        raise ValueError(f"{entry.label!r} knows {known_norms}, not norm={specification.norm}; leave it out")
    line = dataclasses.replace(line, label=entry.label)
    found = Registered(name=entry.label, line=line, norm=specification.norm, bounded=line.bounded)
    if found.bounded:
        _needs_radius(entry, specification)
    if issubclass(line.cls, Verdict):
        return _verdict(found, specification)
    return _budgeted(found, specification, shape)


def _verdict(found: Registered, specification: Specification) -> Cascade:
    """A verdict, which has stages of its own length; over the population of the run unless it says otherwise."""
    if specification.carried_to or specification.defences:
        raise ValueError(
            f"{found.name!r} is done with an example once it is broken, so targets and defences cannot be "
            "evaluated; leave it out"
        )
    if specification.audit is not None:
        import_module("firstorder.autoattack")  # says what to install
        if specification.targeted:
            raise ValueError(f"audit={specification.audit} runs AutoAttack, which is untargeted here; leave it out")
    line = dataclasses.replace(found.line, parameters={"population": True, **found.parameters})
    made = Cascade(name=found.name, line=line, norm=found.norm, stops_early=True, audit=specification.audit)
    prices = [made.price(phase) for phase in ("", *made.later)]
    return dataclasses.replace(made, gradients=sum(price for price in prices if price is not None))


def _budgeted(found: Registered, specification: Specification, shape: tuple[int, ...]) -> Registered:
    """With as many steps as the budget allows, and early stopping where that can be."""
    known, parameters = found.line.known, dict(found.parameters)
    single = {"steps": 1, "early_stop": False, "patience": None}
    price = _price(_with(found, {**parameters, **{k: v for k, v in single.items() if k in known}}).build(1.0), shape)
    if "steps" in known and "steps" not in parameters and specification.budget is not None:
        if price > specification.budget:
            raise BudgetError(
                f"{found.name!r}: a step takes {price} gradients, budget={specification.budget} allows less; raise it"
            )
        parameters["steps"] = specification.budget // price
    if found.bounded and "early_stop" in known and "early_stop" not in parameters:
        attack = _with(found, {**parameters, "patience": None}).build(1.0)
        assert isinstance(attack, BoundedAttack)
        wanted = specification.early_stop and not (specification.carried_to or specification.defences)
        parameters["early_stop"] = wanted and attack.parts(1).oracle.at_iterate
    made = _with(found, parameters)
    steps = getattr(made.build(1.0), "steps", None)
    gradients = price * (steps or 1)
    if gradients > GRADIENTS:
        raise ValueError(
            f"{found.name!r} takes {gradients} gradients per image, which would not end; lower steps, or budget"
        )
    stops = bool(parameters.get("early_stop"))
    return dataclasses.replace(made, stops_early=stops, gradients=gradients, steps=steps)


def _with(found: Registered, parameters: Mapping[str, Any]) -> Registered:
    return dataclasses.replace(found, line=dataclasses.replace(found.line, parameters=parameters))


def _price(attack: Attack, shape: tuple[int, ...]) -> int:
    """The gradients of a step, counted on a linear model."""
    x = torch.full((1, *shape), 0.5)
    result: Result = attack.run(TorchModel(lambda point: -point.flatten(1)[:, :3]), x, torch.tensor([0]))
    return int(result.gradients[0])


def _needs_radius(entry: AttackEntry, specification: Specification) -> None:
    if not specification.eps:
        raise ValueError(f"{entry.label!r} stays within a radius, and the run has none; add eps, as 8/255")
