"""One attack of an evaluation: AutoAttack's own, a registered one, a verdict, or AutoAttack on a sample."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firstorder.attacks import (
    Attack,
    BoundedAttack,
    TorchModel,
    Verdict,
    VerdictResult,
    broken,
    get,
    predicted,
    registry,
)
from firstorder.attacks.outputs import logits_of
from firstorder.autoattack import audit as audits
from firstorder.autoattack.classic import NAMES, ClassicAutoAttack
from firstorder.autoattack.conditions import asked_in
from firstorder.autoattack.population import Parts, Population
from firstorder.autoattack.record import Record

TOLERANCE = 1e-6
"""How far rounding may carry an example beyond the ball, in half precision one unit of it."""

STEPS = 40
"""Steps of a registered attack where none are given."""


class Attacked(NamedTuple):
    """An attack's examples (N, ...), the classes (N,) it saw for them, which it broke and which are doubtful, (N,).

    Where it knows them, the forwards and backwards it took; a verdict says more.
    """

    adversarial: Tensor
    classes: Tensor
    broken: Tensor
    doubtful: Tensor
    verdict: VerdictResult | None = None
    passes: tuple[int, int] | None = None


class Running(ClassicAutoAttack):
    """An AutoAttack that runs attacks by name.

    Attributes:
        parameters: registry name to hyper-parameters.
        auditor: AutoAttack's standard four for samples, if there are any.
    """

    parameters: dict[str, dict[str, Any]]
    auditor: ClassicAutoAttack | None

    def get_logits(self, x: Tensor) -> Tensor:
        """The model's logits (N, K) at x (N, C, H, W)."""
        return logits_of(self.model(x))

    def _found(self, name: str, index: Tensor, x: Tensor, y: Tensor, bs: int, record: Record, parts: Parts) -> Attacked:
        """What the attack finds of the examples at `index`, which are x with labels y."""
        if name in audits.NAMES:
            assert self.auditor is not None
            state = None if parts.folder is None else parts.folder / "state.json"
            audit = record.audits[-1]
            there = audits.attacked(self.auditor, x, y, audit, bs=bs, state_path=state)
            hits = torch.tensor([by is not None for by in audit.broken_by or []])
            passes = audit.forwards, audit.gradients
            return Attacked(there.adversarial.to(x.device), there.labels, hits, there.doubtful, passes=passes)
        if name in NAMES:
            return self._original(name, x, y, bs)
        if name == audits.REOPENED or self._is_verdict(name):
            return self._verdict(name, index, x, y, bs, record, parts)
        return self._registered(name, x, y, bs)

    def _original(self, name: str, x: Tensor, y: Tensor, bs: int) -> Attacked:
        """One of AutoAttack's attacks, in its own loop; its verdict is that of its own forward.

        An example that is misclassified without being changed is not broken: the loop begins with a clean pass,
        which a randomised model may fail.
        """
        names = self.attacks_to_run
        if "fab-t" in names[: names.index(name)] and name == "fab":
            self.fab.n_restarts = 1  # what fab-t leaves behind, also where it ran before an interruption
        try:
            self.attacks_to_run = [name]
            with asked_in(self, x.dtype):
                adversarial, labels = super().run_standard_evaluation(x.float(), y, bs, True)
        finally:
            self.attacks_to_run = names
        labels = labels.cpu()
        changed = (adversarial != x.float()).flatten(1).any(1)
        adversarial = torch.where(changed.reshape(-1, *[1] * (x.ndim - 1)), adversarial.to(x.dtype), x)
        changed = changed.cpu()
        return Attacked(adversarial, labels, (labels != y.cpu()) & changed, torch.zeros_like(changed))

    def _registered(self, name: str, x: Tensor, y: Tensor, bs: int) -> Attacked:
        attack = self._build(name)
        model = TorchModel(self.get_logits, module=self._module(), mode="keep")
        generator = torch.Generator(self.device).manual_seed(int(self.get_seed()))
        found, doubtful = [], []
        for part, labels in zip(x.split(bs), y.split(bs), strict=True):
            result = attack.run(model, part.to(self.device), labels.to(self.device), generator=generator)
            found.append(result.adversarial.to(x.device))
            assert result.doubtful is not None
            doubtful.append(result.doubtful.cpu())
        adversarial = torch.cat(found)
        if not isinstance(attack, BoundedAttack):  # a larger perturbation than eps is no failure, but none of ours
            inside = self._feasible(adversarial, x).to(x.device)
            adversarial = torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), adversarial, x)
        labels = self._predict(adversarial, bs).cpu()
        return Attacked(adversarial, labels, broken(labels, y.cpu()), torch.cat(doubtful))

    def _verdict(
        self, name: str, index: Tensor, x: Tensor, y: Tensor, bs: int, record: Record, parts: Parts
    ) -> Attacked:
        """A verdict over all examples, or its closing stages for those that it gave up."""
        reopened = name == audits.REOPENED
        attack = self._build(next(filter(self._is_verdict, self.attacks_to_run)) if reopened else name)
        assert isinstance(attack, Verdict)
        model = TorchModel(self.get_logits, module=self._module(), mode="keep")
        generator = torch.Generator(self.device).manual_seed(int(self.get_seed()))
        population = Population(attack, model, torch.device(self.device), bs, parts)
        if reopened:
            assert record.verdict is not None
            before = record.verdict.take(index)
            result = population.reopened(x, y, before, generator)
            forwards, backwards = result.forwards - before.forwards, result.gradients - before.gradients
        else:
            result = population.run(x, y, generator)
            forwards, backwards = result.forwards, result.gradients
        assert result.success is not None
        assert result.doubtful is not None
        return Attacked(
            result.adversarial.to(x.device),
            y.cpu(),  # not its classes: it is asked again
            result.success,
            result.doubtful,
            verdict=result,
            passes=(int(forwards.sum()), int(backwards.sum())),
        )

    def _build(self, name: str) -> Attack:
        cls = get(name)
        fields = {field.name for field in dataclasses.fields(cls)}
        if self.norm not in cls.norms:
            raise ValueError(f"{name} knows {' and '.join(cls.norms)}, not norm={self.norm!r}; leave it out")
        words: dict[str, Any] = {"steps": STEPS} if "steps" in fields else {}
        if issubclass(cls, BoundedAttack):
            words |= {"eps": self.epsilon, "norm": self.norm}
        if issubclass(cls, Verdict):
            words["population"] = True
        return cls(**(words | self.parameters.get(name, {})))

    def _is_verdict(self, name: str) -> bool:
        return name not in NAMES and issubclass(get(name), Verdict)

    def _check_names(self) -> None:
        for name in self.attacks_to_run:
            if name in NAMES:
                continue
            try:
                self._build(name)
            except ValueError as error:
                if name in registry().attacks:
                    raise
                raise ValueError(f"{error}; AutoAttack's own are {', '.join(NAMES)}") from None

    def _feasible(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Whether each example is in the ball and the bounds, shape (N,), on the CPU."""
        wide = torch.promote_types(x.dtype, torch.float32)
        delta, flat = (adversarial.to(wide) - x.to(wide)).flatten(1), adversarial.flatten(1)
        rounding = max(TOLERANCE, torch.finfo(x.dtype).eps / 4)  # of numbers up to 1
        order = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[self.norm]
        near = torch.linalg.vector_norm(delta, order, dim=1) <= self.epsilon + rounding
        feasible: Tensor = near & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
        return feasible.cpu()

    def _predict(self, x: Tensor, bs: int) -> Tensor:
        """The predicted classes (N,), `UNDECIDED` where the logits are NaN or infinite."""
        with torch.no_grad():
            return torch.cat([predicted(self.get_logits(part.to(self.device))) for part in x.split(bs)])

    def _module(self) -> nn.Module | None:
        return self.model if isinstance(self.model, nn.Module) else None
