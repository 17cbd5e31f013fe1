"""The attacks of a run: those of the registry, and AutoAttack's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import Attack, Model, TorchModel, registry, rules
from firstorder.attacks.base import Result
from firstorder.attacks.batched import Batched
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.models import Wrapper
from firstorder.evaluation.names import attacks
from firstorder.evaluation.names.attacks import Line
from firstorder.evaluation.runs.specification import AttackEntry, Specification
from firstorder.hosts.description import description

GRADIENTS = 10**8
"""The most gradients per image that an attack may take; more would not end."""


class Found(NamedTuple):
    """Adversarial examples (N, ...), the passes through the model that each took, (N,) in float64, and which are
    doubtful as in `Result`, (N,).
    """

    adversarial: Tensor
    forwards: Tensor
    backwards: Tensor
    doubtful: Tensor


@dataclass(frozen=True, kw_only=True)
class Adversary(ABC):
    """An attack as a run uses it.

    Attributes:
        name: in the run.
        bounded: whether it is made for a radius; otherwise one result serves all radii.
        stops_early: whether an example's count of passes ends at its first adversarial iterate.
        gradients: the most that an example costs; None where that is not known.
    """

    name: str
    bounded: bool = True
    stops_early: bool = False
    gradients: int | None = None

    @abstractmethod
    def run(self, model: Model, module: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, size: int) -> Found:
        """Attack x (N, C, H, W) in [0, 1], classified correctly as y (N,), with at most `size` in a forward.

        Args:
            model: the prepared interface of `module`.
            module: the model itself.
            x, y: the examples.
            eps: the radius, without meaning for an attack that is not bounded.
            seed: of its random draws.
            size: examples in a forward.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What determines the attack, as plain values."""


@dataclass(frozen=True, kw_only=True)
class Registered(Adversary):
    """An attack of the registry.

    Attributes:
        line: what names it, with the hyper-parameters beside eps and norm, which only bounded ones have.
        norm: of the threat model.
    """

    line: Line
    norm: str

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The hyper-parameters; "eps/4" is relative to eps."""
        return self.line.parameters

    def build(self, eps: float) -> Attack:
        """The attack at a radius, which a minimum-norm attack does not have."""
        return self.line.build(eps=eps if self.bounded else None, norm=self.norm)

    def run(self, model: Model, module: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, size: int) -> Found:
        counted = _Counted(model, [0])
        generator = torch.Generator(x.device).manual_seed(seed)
        result: Result = self.build(eps).run(Batched(counted, size), x, y, generator=generator)
        backwards = result.gradients.double()
        assert result.doubtful is not None
        return Found(result.adversarial, backwards + counted.judged[0] / max(len(x), 1), backwards, result.doubtful)

    def facts(self) -> dict[str, Any]:
        attack = self.build(1.0)
        values = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
        left_out = {"eps", "norm", "memory_budget"}
        sources = [registry().sources[self.line.name]]
        rule = values.get("direction")
        sources += [rules().sources[name] for name, cls in rules().classes.items() if type(rule) is cls]
        return {
            "name": self.name,
            "attack": self.line.name,
            "class": self.line.cls.__name__,
            "paper": self.line.cls.paper,
            "source": ", ".join(_versioned(name) for name in dict.fromkeys(sources)),
            "kind": "bounded" if self.bounded else "minimum-norm",
            "parameters": {
                key: self.parameters[key] if isinstance(self.parameters.get(key), str) else _plain(value)
                for key, value in values.items()
                if key not in left_out
            },
            "stops_early": self.stops_early,
        }


@dataclass(frozen=True, kw_only=True)
class Auto(Adversary):
    """AutoAttack, or one of its attacks.

    Attributes:
        norm: of the threat model.
        version: of AutoAttack; "custom" for one of its attacks.
        attacks: which, with "custom".
    """

    norm: str
    version: str
    attacks: tuple[str, ...] = ()

    def run(self, model: Model, module: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, size: int) -> Found:
        from firstorder.autoattack import AutoAttack

        names = list(self.attacks)
        adversary = AutoAttack(module, self.norm, eps, seed % 2**32, False, names, self.version, device=x.device)
        adversarial = adversary.run_standard_evaluation(x, y, bs=size)
        record = adversary.record
        assert record is not None
        each = torch.ones(len(x), dtype=torch.float64)
        forwards, backwards = (sum(counts.values()) / len(x) for counts in (record.forwards, record.gradients))
        return Found(adversarial, forwards * each, backwards * each, record.doubtful)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "attack": "+".join(self.attacks) or f"AutoAttack {self.version}",
            "class": "AutoAttack",
            "paper": "Croce & Hein 2020",
            "source": _installed(),
            "kind": "autoattack",
            "parameters": {"version": self.version, "attacks": list(self.attacks)},
            "stops_early": False,
        }


def adversary(entry: AttackEntry, specification: Specification, shape: tuple[int, ...]) -> Adversary:
    """The attack that an entry names, on images of a shape (C, H, W).

    Raises:
        ValueError: no such attack or parameter, another norm, or a step that costs more than the budget.
        ModuleNotFoundError: one of AutoAttack's, and it is not installed; the message names the extra.
    """
    auto = attacks.autoattack(entry.attack, more=entry.parameters)
    if auto is not None:
        import_module("firstorder.autoattack")  # says what to install
        return Auto(name=entry.label, norm=specification.norm, version=auto.version, attacks=auto.attacks)
    line = attacks.parse(
        entry.attack, without=("eps", "norm", "memory_budget"), more=entry.parameters, data=specification.data
    )
    if specification.norm not in line.cls.norms:
        known_norms = " and ".join(line.cls.norms)
        raise ValueError(f"{entry.label!r} knows {known_norms}, not norm={specification.norm}; leave it out")
    line = dataclasses.replace(line, label=entry.label)
    found = Registered(name=entry.label, line=line, norm=specification.norm, bounded=line.bounded)
    return _budgeted(found, specification, shape)


def _budgeted(found: Registered, specification: Specification, shape: tuple[int, ...]) -> Registered:
    """With as many steps as the budget allows, and early stopping where that can be."""
    known, parameters = found.line.known, dict(found.parameters)
    single = {"steps": 1, "early_stop": False, "patience": None}
    price = _price(_with(found, {**parameters, **{k: v for k, v in single.items() if k in known}}).build(1.0), shape)
    if "steps" in known and "steps" not in parameters and specification.budget is not None:
        if price > specification.budget:
            raise ValueError(
                f"{found.name!r}: a step takes {price} gradients, budget={specification.budget} allows less; raise it"
            )
        parameters["steps"] = specification.budget // price
    if found.bounded and "early_stop" in known and "early_stop" not in parameters:
        attack = _with(found, {**parameters, "patience": None}).build(1.0)
        assert isinstance(attack, BoundedAttack)
        wanted = specification.early_stop and not specification.transfer
        parameters["early_stop"] = wanted and attack.parts(1).oracle.at_iterate
    made = _with(found, parameters)
    gradients = price * getattr(made.build(1.0), "steps", 1)
    if gradients > GRADIENTS:
        raise ValueError(
            f"{found.name!r} takes {gradients} gradients per image, which would not end; lower steps, or budget"
        )
    return dataclasses.replace(made, stops_early=bool(parameters.get("early_stop")), gradients=gradients)


def _with(found: Registered, parameters: Mapping[str, Any]) -> Registered:
    return dataclasses.replace(found, line=dataclasses.replace(found.line, parameters=parameters))


def _price(attack: Attack, shape: tuple[int, ...]) -> int:
    """The gradients of a step, counted on a linear model."""
    x = torch.full((1, *shape), 0.5)
    result: Result = attack.run(TorchModel(lambda point: -point.flatten(1)[:, :3]), x, torch.tensor([0]))
    return int(result.gradients[0])


def _versioned(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def _installed() -> str:
    for name in ("autoattack", "pyautoattack"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "autoattack"


def _plain(value: object) -> Any:
    """A value, or what tells it from others, in another process too."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else description(value)


class _Counted(Wrapper):
    """A model that counts the examples whose logits are asked for without a gradient."""

    def __init__(self, model: Model, judged: list[int]) -> None:
        super().__init__(model)
        self.judged = judged

    def logits(self, x: Tensor) -> Tensor:
        self.judged[0] += len(x)
        return super().logits(x)
