"""Do adversarial examples of one model fool others? Sources x targets x attacks, as papers on transfer report.

Every cell (source, attack, eps, number of steps) is crafted on the source and judged on every target, bare and behind
every defence, on images that all models classify correctly. Finished cells are kept on disk and never made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from firstorder.attacks import UNDECIDED, BoundedAttack, Ensemble, broken
from firstorder.evaluation.names.attacks import parse
from firstorder.evaluation.names.defences import Defence, Judged, judged
from firstorder.evaluation.runs.measure import predictions
from firstorder.files import write_text

FORMAT = 2
"""Of the files of cells; a part of every key."""

CLEAN = "clean"
"""The name of the attack that changes nothing, against which defences are measured."""

DEFENCE_SEED = 2**31
"""Added to a cell's seed for the draws of defences, which must not be the attack's."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Examples crafted on one source.

    Attributes:
        source: the model, or the models of an ensemble joined by "+".
        attack: its label; `CLEAN` for the images as they are.
    """

    source: str
    attack: str
    eps: float
    steps: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A cell judged.

    Attributes:
        fooled: for every target, and every "target | defence", the share of draws in which each image fooled it, (N,).
        doubtful: for each of these, how many images met NaN or infinite logits or gradients, when they were made or
            judged, and did not fool it in every draw: whether they can is not sure.
    """

    cell: Cell
    fooled: dict[str, Tensor]
    doubtful: dict[str, int] = field(default_factory=dict)

    def rate(self, target: str) -> float:
        """The share of images that fooled the target."""
        return float(self.fooled[target].double().mean())


def create(label: str, *, eps: float, steps: int) -> BoundedAttack:
    """The bounded attack that `label` names, with T = `steps` where it iterates.

    Raises:
        ValueError: no such attack or parameter, or an attack without a radius.
    """
    line = parse(label, without=("eps", "steps", "early_stop"))
    if not line.bounded:
        raise ValueError(f"{label!r} has no radius to stay in, and transfer is judged at a given eps; name another")
    attack = line.build(eps=eps, steps=steps)
    assert isinstance(attack, BoundedAttack)
    return attack


def together(models: Mapping[str, nn.Module], source: str) -> nn.Module:
    """The model called `source`, or the ensemble in logits of those joined by "+"."""
    names = source.split("+")
    return models[source] if len(names) == 1 else Ensemble([models[name] for name in names])


def correct(models: Mapping[str, nn.Module], x: Tensor, y: Tensor, *, batch_size: int = 20) -> Tensor:
    """Which images x (N, ...) every model classifies as y (N,), shape (N,)."""
    hits = [predictions(model, x, batch_size=batch_size) == y for model in models.values()]
    return torch.stack(hits).all(0)


class Study:
    """Models, images and defences of a transfer table, and the folder in which its cells are kept.

    Args:
        models: every source and target by name, in evaluation mode; their weights are laid out channels last, in place.
        targets: names of the models that judge.
        defences: what stands before every target, besides nothing, by name.
        x, y: images (N, C, H, W) in [0, 1] that every model classifies correctly, and their labels (N,).
        draws: how often a random defence is drawn.
        folder: where finished cells are kept; None keeps none.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        targets: Sequence[str],
        x: Tensor,
        y: Tensor,
        *,
        defences: Mapping[str, Defence] | None = None,
        draws: int = 5,
        folder: Path | None = None,
        batch_size: int = 20,
    ) -> None:
        if not len(x):
            raise ValueError("no image is classified correctly by all models; choose others")
        channels_last = torch.channels_last  # what convolutions on the CPU like best
        self.models = {name: model.to(memory_format=channels_last) for name, model in models.items()}  # type: ignore[call-overload]
        self.targets, self.defences = tuple(dict.fromkeys(targets)), dict(defences or {})
        self.x, self.y = x.contiguous(memory_format=channels_last), y
        self.draws, self.folder, self.batch_size = draws, folder, batch_size
        self._data = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()

    def run(self, cell: Cell, *, progress: Callable[[int], None] = lambda count: None) -> Outcome:
        """Craft and judge a cell, or read what an earlier run found.

        Args:
            progress: called after every batch with the number of images done.
        """
        path = None if self.folder is None else self.folder / f"{self._key(cell)}.json"
        if path is not None and path.is_file():
            progress(len(self.x))
            kept = json.loads(path.read_text(encoding="utf-8"))
            fooled = {name: torch.tensor(values) for name, values in kept["fooled"].items()}
            return Outcome(cell=cell, fooled=fooled, doubtful=kept["doubtful"])
        found: dict[str, list[Tensor]] = {}
        doubtful: dict[str, int] = {}
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            crafted, lost = self._craft(cell, x, y)
            for name, (rates, undecided) in self._judge(crafted, y, cell.seed).items():
                found.setdefault(name, []).append(rates)
                doubtful[name] = doubtful.get(name, 0) + int(((lost | undecided) & (rates < 1)).sum())
            progress(len(x))
        outcome = Outcome(
            cell=cell, fooled={name: torch.cat(rates) for name, rates in found.items()}, doubtful=doubtful
        )
        if path is not None:
            shares = {name: rates.tolist() for name, rates in outcome.fooled.items()}
            write_text(path, json.dumps({**vars(cell), "fooled": shares, "doubtful": doubtful}))
        return outcome

    def _craft(self, cell: Cell, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The examples made of x (N, ...), and which of them are doubtful, (N,)."""
        if cell.attack == CLEAN:
            return x, torch.zeros_like(y, dtype=torch.bool)
        attack = create(cell.attack, eps=cell.eps, steps=cell.steps)
        generator = torch.Generator().manual_seed(cell.seed)
        result = attack.run(together(self.models, cell.source), x, y, generator=generator)
        assert result.doubtful is not None
        return result.adversarial, result.doubtful

    def _judge(self, x: Tensor, y: Tensor, seed: int) -> dict[str, Judged]:
        shares = {}
        for name in self.targets:
            model = self.models[name]
            classes = predictions(model, x, batch_size=self.batch_size)
            shares[name] = Judged(broken(classes, y).float(), classes == UNDECIDED)
            for label, defence in self.defences.items():
                shares[f"{name} | {label}"] = judged(
                    defence, model, x, y, draws=self.draws, seed=seed + DEFENCE_SEED, batch_size=self.batch_size
                )
        return shares

    def _key(self, cell: Cell) -> str:
        """All that determines the cell's outcome, hashed."""
        models = {name: _digest(self.models[name]) for name in {*cell.source.split("+"), *self.targets}}
        attack = "" if cell.attack == CLEAN else repr(create(cell.attack, eps=cell.eps, steps=cell.steps))
        facts = [vars(cell), attack, sorted(models.items()), self.targets, repr(self.defences)]
        text = json.dumps([FORMAT, facts, self.draws, self.batch_size, self._data], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def _digest(model: nn.Module) -> str:
    """A hash of the model's class and weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
