"""What an evaluation has found so far, on disk after every attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from firstorder.files import replacing, write_text
from firstorder.hosts.description import description
from firstorder.hosts.identity import Identity, told

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

    @property
    def robust(self) -> Tensor:
        """Which examples no attack broke, shape (N,)."""
        return torch.tensor([name is None for name in self.broken_by], dtype=torch.bool)

    @property
    def doubtful(self) -> Tensor:
        """Which examples, shape (N,), met NaN or infinite logits or gradients and are not counted as broken."""
        met = torch.zeros_like(self.robust)
        met[self.met_nan] = True
        return met & self.robust

    def save(self, path: Path, owner: Owner, attacks: Iterable[str]) -> None:
        """Write the record beside `path`, then AutoAttack's own state to `path`; each completely or not at all."""
        tensors = {"adversarial": self.adversarial.cpu(), "labels": self.labels.cpu()}
        facts = {name: value for name, value in vars(self).items() if name not in tensors}
        saved = {
            **tensors,
            "facts": json.dumps({**facts, "key": owner.key, "format": FORMAT}),
            "model": owner.model.save(),
        }
        with replacing(_examples(path)) as temporary:
            torch.save(saved, temporary)
        state = {
            "_attacks_to_run": sorted(attacks),
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
            ValueError: it is that of another evaluation, or of a version that counted otherwise.
        """
        if not _examples(path).exists():
            if path.exists():
                raise ValueError(f"{path} has no {_examples(path).name} beside it; delete it or name another file")
            return None
        saved = torch.load(_examples(path), weights_only=True)
        facts = json.loads(saved["facts"])
        remedy = f"delete it and {_examples(path).name} beside it, or name another file"
        if facts.pop("format", 1) != FORMAT:
            raise ValueError(f"{path} is of an older version, which knew less of the model; {remedy}")
        if facts.pop("key") != owner.key:
            raise ValueError(
                f"{path} belongs to another evaluation (other examples, attacks, budgets, eps, norm, seed or batch "
                f"size); {remedy}"
            )
        differences = owner.model.differences(Identity.load(saved["model"]))
        if differences:
            raise ValueError(f"{path} belongs to another evaluation, of another model ({told(differences)}); {remedy}")
        return cls(adversarial=saved["adversarial"], labels=saved["labels"], **facts)


def fingerprint(tensors: Iterable[Tensor], *facts: object) -> str:
    """A digest of what decides the outcome: examples, labels, settings."""
    digest = hashlib.sha256(description(facts).encode())
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _examples(path: Path) -> Path:
    return path.with_name(path.name + ".examples.pt")
