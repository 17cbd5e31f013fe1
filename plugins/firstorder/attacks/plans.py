"""What stages a verdict is made of, by effort."""

from __future__ import annotations

from dataclasses import dataclass, replace

from firstorder.attacks.catalogue import PQGD, ClippedNGM
from firstorder.attacks.losses import CrossEntropy, Loss, Margin, ProbabilityMargin, TargetedMargin
from firstorder.attacks.squares import SquareSearch
from firstorder.attacks.stages import Annealed, Stage

CLASSES = 9
"""How many of the wrong classes are aimed at, at most."""

SEARCH, LONGEST, PER = 300, 2000, 5
"""Forwards of the closing search, and what a large population pays for: one for so many survivors, up to a largest."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages in order: those that treat every example by itself, and the closing ones."""

    first: tuple[Stage, ...]
    closing: tuple[Stage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all stages by number, after that of examples that are misclassified as they are."""
        return ("input", *(stage.name for stage in (*self.first, *self.closing)))

    def cut(self, count: int) -> Plan:
        """The first `count` stages alone, each for every example."""
        return Plan(first=(*self.first, *self.closing)[:count], closing=())


def plan(*, effort: int, loss: Loss | None, norm: str, restarts: int, targeted: bool) -> Plan:
    """The stages of a verdict.

    Args:
        effort: 0, 1 or 2.
        loss: of the stages that look for any wrong class; None leaves only stages of the label alone, with the model's
            own loss.
        norm: of the ball; attacks that do not know it are left out.
        restarts: along random directions of the logits, in the closing stages.
        targeted: leave out the stages that aim at a class.
    """
    own = Margin() if loss is None else loss
    first = [_ascent("margin", own, 20), _random("cross-entropy", CrossEntropy(), 10)]
    first += [_class(rank, 10) for rank in range(2, (2 if effort == 0 else CLASSES) + 1)]
    closing = [
        _class(2, 20, name="closing class 2", random=True),
        _random("closing cross-entropy", CrossEntropy(), 10),
        *(_restart(f"restart {r}", own) for r in range(1, restarts + 1)),
    ]
    if effort == 1:
        closing.append(_search("square search", own, SEARCH))
    if effort == 2:
        first += [*closing, *_diverse(restarts), _refined("refined", own)]
        more = [_restart(f"restart {r}", own) for r in range(restarts + 1, 2 * restarts + 1)]
        closing = [_search("square search", own), *more, _refined("closing refined", own)]
        closing += [_search("second square search", own), _search("third square search", own)]

    def possible(stage: Stage) -> bool:
        if norm not in stage.attack.norms or (targeted and stage.rank is not None):
            return False
        if isinstance(stage.attack, SquareSearch) and (loss is None or not restarts):
            return False
        return (loss is not None or stage.rank is None) and not (stage.diversify and (loss is None or not restarts))

    def adapted(stage: Stage) -> Stage:
        return stage if loss is not None else replace(stage, attack=replace(stage.attack, loss=None))

    return Plan(
        first=tuple(adapted(stage) for stage in first if possible(stage)),
        closing=tuple(adapted(stage) for stage in closing if possible(stage)),
    )


def lengthened(stages: tuple[Stage, ...], survivors: int) -> tuple[Stage, ...]:
    """Stages whose searches are as long as a population with so many survivors pays for.

    Few of a large population are closed, so that long searches cost each of its examples little.
    """
    forwards = min(survivors // PER, LONGEST)

    def longer(stage: Stage) -> Stage:
        attack = stage.attack
        if not isinstance(attack, SquareSearch) or attack.steps >= forwards:
            return stage
        return replace(stage, attack=replace(attack, steps=forwards))

    return tuple(map(longer, stages))


def _ascent(name: str, loss: Loss, steps: int) -> Stage:
    return Stage(name=name, attack=Annealed(loss=loss, steps=steps))


def _random(name: str, loss: Loss, steps: int) -> Stage:
    return Stage(name=name, attack=Annealed(loss=loss, steps=steps, random_start=True))


def _class(rank: int, steps: int, *, name: str | None = None, random: bool = False) -> Stage:
    attack = Annealed(loss=TargetedMargin(), steps=steps, random_start=random)
    return Stage(name=f"class {rank}" if name is None else name, attack=attack, rank=rank)


def _restart(name: str, loss: Loss) -> Stage:
    return Stage(name=name, attack=Annealed(loss=loss, steps=10), diversify=5)


def _refined(name: str, loss: Loss) -> Stage:
    return Stage(name=name, attack=Annealed(loss=loss, steps=20, first=0.25), resume=True)


def _search(name: str, loss: Loss, steps: int = 1000) -> Stage:
    return Stage(name=name, attack=SquareSearch(loss=loss, steps=steps), resume=True)


def _diverse(restarts: int) -> list[Stage]:
    """Stages that differ from all others in loss, class or rule."""
    entropy, margin = CrossEntropy(), Margin()
    rules: list[tuple[Loss, int]] = [(entropy, 200), (entropy, 1000), (margin, 200), (entropy, 200)]
    quantised = [
        Stage(name=f"quantised {i}", attack=PQGD(loss=loss, steps=40, b=b)) for i, (loss, b) in enumerate(rules, 1)
    ]
    directed = []
    for r in range(1, restarts // 2 + 1):
        directed += [
            _restart(f"restart {r} of cross-entropy", entropy),
            Stage(name=f"restart {r} quantised", attack=PQGD(loss=margin, steps=10, random_start=False), diversify=5),
        ]
    return [
        _random("probability margin", ProbabilityMargin(), 40),
        Stage(name="clipped", attack=ClippedNGM(loss=entropy, steps=40, scope="element", gamma=0.1)),
        *quantised,
        *(_class(rank, 20, name=f"class {rank} at random", random=True) for rank in range(1, CLASSES + 1)),
        *directed,
    ]
