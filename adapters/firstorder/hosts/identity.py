"""Whether a model is the one that a result was found with: what it consists of, and what it does.

    known = identify(model, images)
    ...                                  # later, in another process
    identify(model, images).differences(known)     # [] for the same model

What can be known of a model is compared exactly. What cannot (a file that its forward reads, an extension in C) must
show in what it does: its logits and the gradient of its loss on a few images, within the tolerance that other numbers
of threads and other devices need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks.models import preserved
from firstorder.attacks.outputs import logits_of, require_logits
from firstorder.hosts.parts import parts

SHOWN = 3
"""How many differences a line names."""

STATE = ("weights", "buffer", "state")
"""How the names of parts begin that hold tensors of a module."""

LOGITS, GRADIENT = {"cpu": 1e-4, "other": 5e-3}, {"cpu": 1e-2, "other": 1e-1}
"""How far apart the same model's may be: the largest difference of logits relative to the largest logit, and the norm
of the difference of gradients relative to the gradient's. Convolutions on a GPU may round to 10 bits.
"""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a model is.

    Attributes:
        parts: as in `parts`, without those that a forward changes, as a counter.
        logits: (M, K), of a few images.
        gradient: of a loss of these images, (M, ...).
        random: whether two forwards of the same images differ.
        device: where it computed.
        unsteady: names of parts that are others each time the model is made, and are not compared.
    """

    parts: Mapping[str, str]
    logits: Tensor
    gradient: Tensor
    random: bool
    device: str
    unsteady: frozenset[str] = frozenset()

    @property
    def digest(self) -> str:
        """A name of what it consists of."""
        kept = {name: what for name, what in self.parts.items() if name not in self.unsteady}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def weights(self) -> str:
        """A name of its parameters, buffers and other state alone: the same wherever and in whatever code they are."""
        kept = {name: what for name, what in self.parts.items() if name.split(" ", 1)[0] in STATE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, other: Identity) -> list[str]:
        """How it differs from the `other`, in words: parts by name, else what it does; empty for the same model."""
        skipped = self.unsteady | other.unsteady
        names = sorted({*self.parts, *other.parts} - skipped)
        found = [name for name in names if self.parts.get(name) != other.parts.get(name)]
        return found or self._behaviour(other)

    def without(self, names: Iterable[str]) -> Identity:
        """The same with more `unsteady` names."""
        return replace(self, unsteady=self.unsteady | set(names))

    def save(self) -> dict[str, Any]:
        """Tensors and text, for `torch.save`."""
        facts = {"parts": dict(self.parts), "random": self.random, "device": self.device}
        text = json.dumps({**facts, "unsteady": sorted(self.unsteady)}, sort_keys=True)
        return {"facts": text, "logits": self.logits, "gradient": self.gradient}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Identity:
        """What `save` returned."""
        facts = json.loads(saved["facts"])
        unsteady = frozenset(facts.pop("unsteady"))
        return cls(**facts, unsteady=unsteady, logits=saved["logits"], gradient=saved["gradient"])

    def _behaviour(self, other: Identity) -> list[str]:
        if self.random or other.random:
            return [] if self.random == other.random else ["whether it is random"]
        where = "cpu" if self.device == other.device == "cpu" else "other"
        rounding = 4 * max(_rounding(self.logits), _rounding(other.logits))
        found = []
        if _apart(self.logits, other.logits, largest=True) > max(LOGITS[where], rounding):
            found.append("its logits on the same images")
        if _apart(self.gradient, other.gradient, largest=False) > max(GRADIENT[where], 10 * rounding):
            found.append("the gradient of its loss on the same images")
        return found


def identify(model: Any, x: Tensor, *, logits: Callable[[Tensor], Tensor] | None = None) -> Identity:
    """What a model is and does; the model stays as it is, and so do the random numbers.

    Args:
        model: a module, or a function.
        x: a few images of the evaluation, (M, ...), on the model's device.
        logits: computes logits (M, K) with the model; the model itself by default.
    """
    ask = logits or (lambda points: logits_of(model(points)))
    kept = preserved(model) if isinstance(model, nn.Module) else nullcontext()
    same_draws = torch.random.fork_rng([x.device] if x.device.type == "cuda" else [])
    with kept, same_draws:
        first = _behave(ask, x)
        before = parts(model)
        second = _behave(ask, x)
        after = parts(model, tensors=False)
    still = {name: what for name, what in before.items() if after.get(name, what) == what}
    facts: dict[str, Any] = {"parts": still, "random": False, "device": x.device.type}
    one, two = (Identity(**facts, logits=scores, gradient=slope) for scores, slope in (first, second))
    return replace(one, random=bool(one.differences(two)))


def summary(differences: list[str]) -> str:
    """Differences on a line: "code of Net.forward, constant SCALE and 3 more"."""
    more = len(differences) - SHOWN
    return ", ".join(differences[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _behave(ask: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and gradient, on the CPU; no gradient, (0,), where the logits have none."""
    with torch.enable_grad():
        points = x.detach().clone().requires_grad_()
        logits = ask(points)
        require_logits(logits, len(x))
        gradient = None
        if logits.requires_grad:
            labels = torch.arange(len(x), device=logits.device) % logits.shape[1]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, points, allow_unused=True)
    return logits.detach().cpu(), torch.zeros(0) if gradient is None else gradient.cpu()


def _rounding(logits: Tensor) -> float:
    return torch.finfo(logits.dtype).eps if logits.is_floating_point() else 0.0


def _apart(one: Tensor, other: Tensor, *, largest: bool) -> float:
    """The relative difference of two tensors; infinite where shapes or what is no number differ."""
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return torch.inf
    one, other = (part.double().nan_to_num(posinf=0, neginf=0).flatten() for part in (one, other))
    order = torch.inf if largest else 2
    size = max(float(torch.linalg.vector_norm(part, order)) for part in (one, other)) if len(one) else 0.0
    return float(torch.linalg.vector_norm(one - other, order)) / size if size > 0 else 0.0
