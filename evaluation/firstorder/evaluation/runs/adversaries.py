"""The attacks of a run: those of the registry, and AutoAttack's."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
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
from firstorder.evaluation.names.attacks import parse
from firstorder.evaluation.runs.specification import AttackEntry, Specification
from firstorder.hosts.description import description

AUTOATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
"""AutoAttack's own attacks, known here whether it is installed or not."""


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
        key: its registry name.
        cls: its class.
        parameters: hyper-parameters beside eps and norm, which only bounded ones have; "eps/4" is relative to eps.
        norm: of the threat model.
    """

    key: str
    cls: type[Attack]
    parameters: dict[str, Any]
    norm: str

    def build(self, eps: float) -> Attack:
        """The attack at a radius."""
        words: dict[str, Any] = {"eps": eps, "norm": self.norm} if self.bounded else {}
        return self.cls(**words, **{key: _at(value, eps) for key, value in self.parameters.items()})

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
        sources = [registry().sources[self.key]]
        rule = values.get("direction")
        sources += [rules().sources[name] for name, cls in rules().classes.items() if type(rule) is cls]
        return {
            "name": self.name,
            "attack": self.key,
            "class": self.cls.__name__,
            "paper": self.cls.paper,
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
    head = entry.attack.partition(":")[0].partition("+")[0]
    auto = _auto(entry, head, specification)
    if auto is not None:
        return auto
    cls, parameters = parse(entry.attack, without=frozenset({"eps", "norm", "memory_budget"}))
    known = {field.name for field in dataclasses.fields(cls)} - {"eps", "norm", "loss", "direction", "memory_budget"}
    for key in entry.parameters:
        if key not in known:
            raise ValueError(f"{entry.attack!r}: {head} has no parameter {key!r}; it has {', '.join(sorted(known))}")
    parameters |= entry.parameters
    if specification.norm not in cls.norms:
        known_norms = " and ".join(cls.norms)
        raise ValueError(f"{entry.label!r} knows {known_norms}, not norm={specification.norm}; leave it out")
    found = Registered(
        name=entry.label,
        key=next(name for name, known_cls in registry().attacks.items() if known_cls is cls),
        cls=cls,
        parameters=parameters,
        norm=specification.norm,
        bounded=issubclass(cls, BoundedAttack),
    )
    try:
        return _budgeted(found, specification, shape, known)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{entry.label!r}: {error}") from None


def _budgeted(found: Registered, specification: Specification, shape: tuple[int, ...], known: set[str]) -> Registered:
    """With as many steps as the budget allows, and early stopping where that can be."""
    parameters = dict(found.parameters)
    relative = [key for key, value in parameters.items() if _at(value, 1.0) is not value]
    if relative and not found.bounded:
        raise ValueError(f"{relative[0]}={parameters[relative[0]]} has no radius to refer to; write a number")
    single = {"steps": 1, "early_stop": False, "patience": None}
    words = {key: value for key, value in single.items() if key in known}
    price = _price(dataclasses.replace(found, parameters=parameters | words).build(1.0), shape)
    if "steps" in known and "steps" not in parameters and specification.budget is not None:
        if price > specification.budget:
            raise ValueError(f"a step takes {price} gradients, budget={specification.budget} allows less; raise it")
        parameters["steps"] = specification.budget // price
    if found.bounded and "early_stop" in known and "early_stop" not in parameters:
        attack = dataclasses.replace(found, parameters={**parameters, "patience": None}).build(1.0)
        assert isinstance(attack, BoundedAttack)
        wanted = specification.early_stop and not specification.transfer
        parameters["early_stop"] = wanted and attack.parts(1).oracle.at_iterate
    attack = dataclasses.replace(found, parameters=parameters).build(1.0)
    return dataclasses.replace(
        found,
        parameters=parameters,
        stops_early=bool(parameters.get("early_stop")),
        gradients=price * getattr(attack, "steps", 1),
    )


def _price(attack: Attack, shape: tuple[int, ...]) -> int:
    """The gradients of a step, counted on a linear model."""
    x = torch.full((1, *shape), 0.5)
    result: Result = attack.run(TorchModel(lambda point: -point.flatten(1)[:, :3]), x, torch.tensor([0]))
    return int(result.gradients[0])


def _auto(entry: AttackEntry, head: str, specification: Specification) -> Auto | None:
    if head not in ("autoattack", "firstorder", *AUTOATTACKS):
        return None
    import_module("firstorder.autoattack")  # says what to install
    if head != entry.attack or entry.parameters:
        raise ValueError(f"{entry.label!r}: {head} takes no parameters here; leave them out")
    if head in ("autoattack", "firstorder"):
        return Auto(name=entry.label, norm=specification.norm, version={"autoattack": "standard"}.get(head, head))
    return Auto(name=entry.label, norm=specification.norm, version="custom", attacks=(head,))


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


def _at(value: Any, eps: float) -> Any:
    """A hyper-parameter at a radius: "eps/4" is its fourth part."""
    share = re.fullmatch(r"eps(?:/([1-9][0-9]*(?:\.[0-9]+)?))?", value) if isinstance(value, str) else None
    return value if share is None else eps / float(share[1] or 1)


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
