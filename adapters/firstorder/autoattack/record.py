"""What an evaluation has found so far, on disk after every attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firstorder.attacks import VerdictResult
from firstorder.autoattack.population import spread, with_rows
from firstorder.files import seals, write_text
from firstorder.hosts.confidence import hypergeometric_upper
from firstorder.hosts.description import description
from firstorder.hosts.identity import Identity, summary

CLEAN = "clean"
"""What broke an example that is misclassified as it is."""

FORMAT = 3
"""Of the records on disk."""


class Owner(NamedTuple):
    """The evaluation that a record on disk is of.

    Attributes:
        key: all that decides its outcome beside the model, see `fingerprint`.
        model: what the model is.
    """

    key: str
    model: Identity


@dataclass
class Audit:
    """A random sample that AutoAttack was run on, and what it says of the examples it was drawn from.

    Attributes:
        asked: the size that was asked for.
        total: number N of examples in the evaluation.
        population: number of examples that the sample was drawn from.
        sample: their indices among the N.
        broken_by: which of AutoAttack's attacks broke each of the sample, None for those it left; None before it ran.
        forwards, gradients: the passes it took, summed over the sample.
    """

    asked: int
    total: int
    population: int
    sample: list[int]
    broken_by: list[str | None] | None = None
    forwards: int = 0
    gradients: int = 0

    @property
    def breaks(self) -> int:
        """How many of the sample AutoAttack broke."""
        return sum(name is not None for name in self.broken_by or [])

    @property
    def bound(self) -> float:
        """How much AutoAttack would break beside these, at most, of those that the sample was drawn from, as a share
        of all N: a bound that holds with a probability of 95 % over the draw of the sample.

        It is exact for a finite population. Of a sample of s without breaks from a large one it is
        (1 - 0.05^(1 / s)) * population / N, with breaks that of Clopper & Pearson less the breaks.
        """
        sample = 0 if self.broken_by is None else len(self.sample)
        return (hypergeometric_upper(self.breaks, sample, self.population) - self.breaks) / max(self.total, 1)


@dataclass
class Record:
    """The worst case per example over the attacks that were run.

    Attributes:
        adversarial: the adversarial example, or the clean one where none was found, shape (N, ...).
        labels: the class predicted for it, shape (N,).
        broken_by: the attack that broke each example, "clean" for a misclassified one, None for a robust one.
        run: the attacks that were run, in order.
        accuracy: robust accuracy after each of them, after "clean" too.
        gradients: backward passes by each attack, summed over the examples.
        forwards: forward passes by each attack, summed over the examples.
        unverified: by attack, how many of its examples the model classifies correctly when asked again, or
            lie outside the ball or the bounds. AutoAttack's own are counted as it counted them, those of
            registered attacks are not counted as broken.
        verdict: what the stages of a `Verdict` found of every example, if one was run: what broke it, its margin,
            whether it was attacked to the end, at how many passes. Its `adversarial` are those of the record.
        audits: the samples of what was given up that AutoAttack was run on.
    """

    adversarial: Tensor
    labels: Tensor
    broken_by: list[str | None]
    run: list[str] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    unverified: dict[str, int] = field(default_factory=dict)
    met_nan: list[int] = field(default_factory=list)
    """The examples that some attack met NaN or infinite logits or gradients on, broken by another or not."""
    by_autoattack: list[int] = field(default_factory=list)
    """The examples that one of AutoAttack's own attacks broke, whether or not another had before."""
    verdict: VerdictResult | None = None
    audits: list[Audit] = field(default_factory=list)

    @property
    def robust(self) -> Tensor:
        """Which examples no attack broke, shape (N,)."""
        return torch.tensor([name is None for name in self.broken_by], dtype=torch.bool)

    @property
    def given_up(self) -> Tensor:
        """Which robust examples the closing stages of a `Verdict` left out, shape (N,)."""
        return torch.zeros_like(self.robust) if self.verdict is None else self.robust & ~self.verdict.complete

    @property
    def bound(self) -> float | None:
        """That of the last audit, None without one; see `Audit.bound`."""
        return self.audits[-1].bound if self.audits else None

    @property
    def doubtful(self) -> Tensor:
        """Which examples, shape (N,), met NaN or infinite logits or gradients and are not counted as broken."""
        met = torch.zeros_like(self.robust)
        met[self.met_nan] = True
        return met & self.robust

    @property
    def sampled(self) -> Tensor:
        """Which examples the last audit has, shape (N,)."""
        chosen = torch.zeros_like(self.robust)
        chosen[self.audits[-1].sample] = True
        return chosen

    def enter(self, name: str, index: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Enter what an attack broke: the examples at `index` (M,), the perturbed ones (M, ...) and their classes."""
        self.adversarial[index], self.labels[index] = adversarial.cpu(), labels
        for i in index.tolist():
            self.broken_by[i] = name
        self.run.append(name)
        self.accuracy[name] = float(self.robust.float().mean())

    def add(self, found: VerdictResult, index: Tensor) -> None:
        """Enter what a verdict says of the examples at `index` (M,), after `enter`."""
        stage = torch.where(self.robust[index], -1, found.stage)
        found = replace(found, success=stage >= 0, stage=stage)
        if self.verdict is None or self.verdict.stages != found.stages:
            self.verdict = spread(found, index, self.adversarial)
        else:
            self.verdict = with_rows(self.verdict, index, found)
        self.verdict = replace(self.verdict, adversarial=self.adversarial)

    def save(self, path: Path, owner: Owner, attacks: Iterable[str]) -> None:
        """Write the record beside `path`, then AutoAttack's own state to `path`; each completely or not at all."""
        saved: dict[str, Any] = {"adversarial": self.adversarial.cpu(), "labels": self.labels.cpu()}
        facts = {name: value for name, value in vars(self).items() if name not in (*saved, "verdict")}
        facts["audits"] = [asdict(audit) for audit in self.audits]
        if self.verdict is not None:
            saved["verdict"] = {f.name: getattr(self.verdict, f.name) for f in fields(self.verdict)}
            del saved["verdict"]["adversarial"]
        saved |= {"facts": json.dumps({**facts, "key": owner.key, "format": FORMAT}), "model": owner.model.save()}
        seals.save(_examples(path), saved)
        state = {
            "_attacks_to_run": sorted({*attacks, *self.run}),
            "path": str(path),
            "_run_attacks": self.run,
            "_robust_flags": self.robust.tolist(),
            "_last_saved": "0001-01-01 00:00:00",
            "_SAVE_TIMEOUT": 60,
            "_clean_accuracy": self.accuracy[CLEAN],
        }
        write_text(path, json.dumps(state))

    @classmethod
    def load(cls, path: Path, owner: Owner) -> Record | None:
        """The record saved for `path`; None if there is none.

        Raises:
            ValueError: it is that of another evaluation, or of a version that counted otherwise; it is damaged.
        """
        if not _examples(path).exists():
            if path.exists():
                raise ValueError(f"{path} has no {_examples(path).name} beside it; delete it or name another file")
            return None
        saved = seals.load(_examples(path))
        remedy = f"delete it and {_examples(path).name} beside it, or name another file"
        if saved is None or {*saved, "verdict"} != {"adversarial", "labels", "facts", "model", "verdict"}:
            raise ValueError(f"{path} is damaged; {remedy}")
        facts = json.loads(saved["facts"])
        if facts.pop("format", 1) != FORMAT:
            raise ValueError(f"{path} is of an older version, which knew less of the model; {remedy}")
        if facts.pop("key") != owner.key:
            raise ValueError(
                f"{path} belongs to another evaluation (other examples, attacks, budgets, eps, norm, seed or batch "
                f"size); {remedy}"
            )
        differences = owner.model.differences(Identity.load(saved["model"]))
        if differences:
            raise ValueError(
                f"{path} belongs to another evaluation, of another model ({summary(differences)}); {remedy}"
            )
        facts["audits"] = [Audit(**audit) for audit in facts.get("audits", [])]
        record = cls(adversarial=saved["adversarial"], labels=saved["labels"], **facts)
        if "verdict" in saved:
            record.verdict = VerdictResult(adversarial=record.adversarial, **saved["verdict"])
        return record


def fingerprint(tensors: Iterable[Tensor], *facts: object) -> str:
    """A digest of what decides the outcome: examples, labels, settings."""
    digest = hashlib.sha256(description(facts).encode())
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _examples(path: Path) -> Path:
    return path.with_name(path.name + ".examples.pt")
