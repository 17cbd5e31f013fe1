"""The attacks of a run: those of the registry, and AutoAttack's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import Attack, Model, registry, rules
from firstorder.attacks.base import Result
from firstorder.attacks.batched import Batched
from firstorder.attacks.bounded import IterativeAttack
from firstorder.attacks.models import Wrapper
from firstorder.evaluation.names.attacks import Line
from firstorder.hosts.description import description


class Course(NamedTuple):
    """How a verdict came to what it found of N examples.

    Attributes:
        stage: what broke each; None where nothing did.
        margin: the smallest margin found, (N,) in float64.
        complete: which were attacked to the end, (N,).
        carried: what its closing stages go on from, (N, D) in float32: the iterate, then its logits; None for nothing.
    """

    stage: list[str | None]
    margin: Tensor
    complete: Tensor
    carried: Tensor | None


class Found(NamedTuple):
    """Adversarial examples (N, ...), the passes through the model that each took, (N,) in float64, which are
    doubtful as in `Result`, and which the attack itself takes for a success, (N,); of a verdict also its course.
    """

    adversarial: Tensor
    forwards: Tensor
    backwards: Tensor
    doubtful: Tensor
    claimed: Tensor
    course: Course | None = None


@dataclass(frozen=True, kw_only=True)
class Adversary(ABC):
    """An attack as a run uses it.

    Attributes:
        name: in the run.
        bounded: whether it is made for a radius; otherwise one result serves all radii.
        stops_early: whether an example's count of passes ends at its first adversarial iterate.
        gradients: the most that an example costs; None where that is not known.
        label: its name without the number of steps that the run gives it.
        steps: its iterations; None where it makes none, or has several kinds.
    """

    name: str
    bounded: bool = True
    stops_early: bool = False
    gradients: int | None = None
    label: str = ""
    steps: int | None = None

    @property
    def later(self) -> Mapping[str, Mapping[str, Any]]:
        """The phases that follow once all shards have been attacked, in order, each with what determines it beside
        the attack, as plain values.
        """
        return {}

    def price(self, phase: str) -> int | None:
        """The most gradients that a phase takes of an example; "" is the first. None where that is not known."""
        return self.gradients

    @abstractmethod
    def run(
        self,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        """Attack x (N, C, H, W) in [0, 1], classified correctly as y (N,), with at most `size` in a forward.

        Args:
            model: the prepared interface of `module`.
            module: the model itself.
            x: the examples.
            y: their labels; in a targeted run the classes that they are to be taken for.
            eps: the radius, without meaning for an attack that is not bounded.
            seed: of its random draws.
            size: examples in a forward.
            targeted: what y means.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What determines the attack, as plain values."""

    def step_sizes(self, radii: Iterable[float], numel: int) -> dict[str, float]:
        """The first step size by radius, for images of `numel` elements; empty for an attack without one."""
        return {}


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

    def run(
        self,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        counted = _Counted(model, [0])
        generator = torch.Generator(x.device).manual_seed(seed)
        attack = self.build(eps)
        result: Result = attack.run(Batched(counted, size), x, y, targeted=targeted, generator=generator)
        backwards = result.gradients.double()
        assert result.doubtful is not None
        assert result.success is not None
        forwards = backwards + counted.asked[0] / max(len(x), 1)
        return Found(result.adversarial, forwards, backwards, result.doubtful, result.success)

    def step_sizes(self, radii: Iterable[float], numel: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for eps in radii:
            attack = self.build(eps)
            if isinstance(attack, IterativeAttack):
                size = attack.step_size(attack.chosen_rule(), numel)
                found |= {} if isinstance(size, Tensor) else {f"{eps:.4g}": size}
        return found

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

    def run(
        self,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        from firstorder.autoattack import AutoAttack

        assert not targeted
        names = list(self.attacks)
        adversary = AutoAttack(module, self.norm, eps, seed % 2**32, False, names, self.version, device=x.device)
        adversarial = adversary.run_standard_evaluation(x, y, bs=size)
        record = adversary.record
        assert record is not None
        each = torch.ones(len(x), dtype=torch.float64)
        forwards, backwards = (sum(counts.values()) / len(x) for counts in (record.forwards, record.gradients))
        return Found(adversarial, forwards * each, backwards * each, record.doubtful, ~record.robust)

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
    """A value, or what distinguishes it from others, in another process too."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else description(value)


class _Counted(Wrapper):
    """A model that counts the examples whose logits are asked for without a gradient."""

    def __init__(self, model: Model, asked: list[int]) -> None:
        super().__init__(model)
        self.asked = asked

    def logits(self, x: Tensor) -> Tensor:
        self.asked[0] += len(x)
        return super().logits(x)
