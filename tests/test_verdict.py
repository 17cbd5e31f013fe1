"""The verdict: equal to a slow transcription, in passes too, with each of its stages needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Net, images, predicted
from firstorder.attacks import (
    PGD,
    Batched,
    LogitDirection,
    Margin,
    Quantised,
    TorchModel,
    Verdict,
    VerdictResult,
    plans,
)
from firstorder.attacks.stages import Cascade
from references_verdict import Example, Slow
from test_prepared import OPEN, POINTS, SMOOTH, Approximated, N, Noted, aims, never

EPS = {"Linf": 0.12, "L2": 0.3}
FREE: dict[str, Any] = {"bounds": None}
ROUNDING = 1e-7
"""In float64; steps under L2 let differences grow."""


def network(classes: int, scale: float) -> nn.Sequential:
    """A small net from points (N, 6) to logits, in float64."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Softplus(beta=4), nn.Linear(16, classes)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return net.requires_grad_(False)


@dataclasses.dataclass
class Setting:
    classes: int
    norm: str
    effort: int = 1
    population: bool = False
    masked: bool = False
    n: int = 24
    factor: float = 1.0
    scale: float = 0.8

    @property
    def eps(self) -> float:
        return self.factor * EPS[self.norm]

    def __post_init__(self) -> None:
        self.model = network(self.classes, self.scale)
        self.x = torch.rand(self.n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            if self.classes == 2:  # or one of them is never taken
                self.model[2].bias -= self.model(self.x).mean(0)
            self.y = self.model(self.x).argmax(1)
        self.y[::7] = (self.y[::7] + 1) % self.classes  # a few are misclassified as they are
        self.free = torch.ones_like(self.x, dtype=torch.bool)
        if self.masked:
            self.free[:, 1] = self.free[::2, 4] = False

    def fast(self) -> VerdictResult:
        attack = Verdict(eps=self.eps, norm=self.norm, effort=self.effort, population=self.population, restarts=2)
        generator = torch.Generator().manual_seed(5)
        mask = self.free if self.masked else None
        return attack.run(self.model, self.x, self.y, mask=mask, generator=generator)

    def slow(self, **changes: Any) -> list[Example]:
        examples = [Example(x, int(y), free) for x, y, free in zip(self.x, self.y, self.free, strict=True)]
        last = 2 if self.effort == 0 else 9
        generator = torch.Generator().manual_seed(5)
        changes.setdefault("searched", self.effort > 0)
        Slow(
            self.model, examples, self.eps, self.norm, 0.0, 1.0, generator, 2, min(last, self.classes - 1), **changes
        ).run(self.population)
        return examples


def alike(result: VerdictResult, examples: list[Example]) -> bool:
    """Whether the two agree in everything, example by example."""
    for i, e in enumerate(examples):
        by = result.stages[int(result.stage[i])] if result.stage[i] >= 0 else None
        passes = (int(result.forwards[i]), int(result.gradients[i]))
        if by != e.by or passes != (e.forwards, e.backwards) or bool(result.complete[i]) != e.complete:
            return False
        if not torch.allclose(result.adversarial[i], e.point, rtol=0, atol=ROUNDING):
            return False
        if abs(float(result.margin[i]) - e.nearest) > ROUNDING:
            return False
        if not torch.allclose(result.logits[i], torch.tensor(e.logits, dtype=torch.float64), rtol=0, atol=ROUNDING):
            return False
    return True


SETTINGS = {
    "two classes": Setting(2, "Linf", factor=0.6),
    "three classes": Setting(3, "Linf"),
    "nine classes": Setting(9, "Linf"),
    "twelve classes": Setting(12, "Linf"),
    "L2": Setting(5, "L2"),
    "masked": Setting(5, "Linf", masked=True, factor=1.5),
    "masked, L2": Setting(5, "L2", masked=True, factor=1.5),
    "effort 0": Setting(5, "Linf", effort=0),
    "population": Setting(5, "Linf", population=True, n=70, factor=0.4),
    "population, L2": Setting(5, "L2", population=True, n=70, factor=0.4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_as_a_slow_transcription(name: str) -> None:
    setting = SETTINGS[name]
    result = setting.fast()
    assert alike(result, setting.slow())
    assert result.success is not None
    assert torch.equal(result.success, result.stage >= 0)
    with torch.no_grad():
        assert torch.equal(result.success, setting.model(result.adversarial).argmax(1) != setting.y)
    found = {result.stages[i] for i in result.stage.tolist() if i >= 0}
    assert {"input", "margin"} <= found
    assert not result.success.all()
    assert bool(result.complete.all()) == (not setting.population)


HARD = Setting(9, "Linf", factor=0.3, scale=2.5)
"""A net so sharp that different ways lead to different places."""


@pytest.mark.parametrize("lacking", ["diversified", "random", "targets", "searched"])
def test_every_part_is_seen(lacking: str) -> None:
    """A transcription that lacks one of them differs: random starts, the steps along random weights, the targets, the
    square search.
    """
    assert not alike(HARD.fast(), HARD.slow(**{lacking: False}))


def test_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the verdict that lacks one."""
    slow = HARD.slow()
    assert alike(HARD.fast(), slow)
    pairs = Cascade._pairs
    mutants: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "no targets": (Cascade, "_pairs", lambda self, index, rank: pairs(self, index, 1)),
        "no random directions": (LogitDirection, "__call__", lambda self, z, w: 0.0 * z.sum(1)),
        "no random start": (Cascade, "_start", lambda self, attack, among, left: self._batch.x[left]),
        "a stage that never runs": (Cascade, "run", _without(3)),
    }
    for mutant, (cls, name, change) in mutants.items():
        with monkeypatch.context() as patched:
            patched.setattr(cls, name, change)
            assert not alike(HARD.fast(), slow), f"nobody notices: {mutant}"


def _without(left_out: int) -> Callable[..., None]:
    original = Cascade.run

    def run(self: Cascade, stage: Any, number: int, among: Tensor | None = None) -> None:
        if number != left_out:
            original(self, stage, number, among)

    return run


# --- closed forms


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_a_linear_model_is_broken_exactly_where_it_can_be(classes: int, norm: str) -> None:
    """The nearest boundary is at min_k (z_y - z_k) / ||w_y - w_k||_*."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 6, generator=generator, dtype=torch.float64)
    x = torch.rand(16, 6, generator=generator, dtype=torch.float64)
    y = (x @ weight.T).argmax(1)
    dual = 1 if norm == "Linf" else 2
    gaps = (x @ weight.T).gather(1, y[:, None]) - x @ weight.T
    reach = torch.linalg.vector_norm(weight[y][:, None] - weight, dual, dim=2)
    nearest = torch.where(gaps > 0, gaps / reach, torch.inf).amin(1)
    for factor, expected in ((1.01, True), (0.99, False)):
        eps = (factor * nearest)[:, None]
        result = Verdict(eps=eps, norm=norm, restarts=1).run(lambda z: z @ weight.T, x, y, bounds=None)
        assert result.success.tolist() == [expected] * 16
        if not expected:
            assert (result.margin > 0).all()
            assert (result.margin < 0.5 * gaps.where(gaps > 0, torch.inf).amin(1)).all()


# --- passes


def counted(*asked: list[list[int]]) -> Tensor:
    return torch.tensor([i for lists in asked for each in lists for i in each]).bincount(minlength=N)


@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("verify", [True, False])
def test_the_passes_are_those_of_the_model(population: bool, verify: bool) -> None:
    noted = Noted(SMOOTH)
    attack = Verdict(eps=0.08, restarts=2, population=population)
    if verify:
        result = attack.run(noted, POINTS, aims(False), mask=OPEN, **FREE)
        assert torch.equal(result.gradients, counted(noted.asked))
        assert torch.equal(result.forwards, counted(noted.asked, noted.viewed))
        left = [i for i in range(N) if result.stage[i] < 0]
        assert 0 < len(left) < N
        assert int(result.gradients[result.stage >= 0].min()) < 20, "an example leaves once it is broken"
    else:
        adversarial = attack(noted, POINTS, aims(False), mask=OPEN, **FREE)
        looks = counted(noted.viewed)
        result = attack.run(again := Noted(SMOOTH), POINTS, aims(False), mask=OPEN, **FREE)
        assert torch.equal(adversarial, result.adversarial)
        assert torch.equal(looks, counted(again.viewed) - 1), "without a verdict of its own the call is a forward less"


@pytest.mark.parametrize("size", [1, 6, 64])
def test_batches_of_the_model(size: int) -> None:
    attack, models = Verdict(eps=0.08, restarts=2), (Batched(TorchModel(SMOOTH), size), SMOOTH)
    found, expected = (attack.run(model, POINTS, aims(False), mask=OPEN, **FREE) for model in models)
    assert torch.allclose(found.adversarial, expected.adversarial, rtol=0, atol=1e-9)
    for name in ("stage", "gradients", "forwards", "complete"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def early(x: Tensor) -> Tensor:
    """A copy that takes odd examples for broken."""
    return 1e3 * (x[:, 0].round() % 2)


@pytest.mark.parametrize("shift", [early, never], ids=["too early", "never"])
def test_a_prepared_copy_decides_nothing(shift: Any) -> None:
    copied, arbiter = Noted(SMOOTH, shift=shift), Noted(SMOOTH)
    attack = Verdict(eps=0.08, restarts=2)
    result = attack.run(Approximated(copied, arbiter), POINTS, aims(False), mask=OPEN, **FREE)
    assert torch.equal(result.forwards, counted(copied.asked, arbiter.asked, arbiter.viewed))
    assert torch.equal(result.gradients, counted(copied.asked, arbiter.asked))
    with torch.no_grad():
        assert torch.equal(result.success, SMOOTH(result.adversarial).argmax(1) != aims(False))
    assert 0 < int(result.success.sum()) < N
    if shift is early:
        assert torch.equal(result.success, attack.run(SMOOTH, POINTS, aims(False), mask=OPEN, **FREE).success)


# --- one example, a batch, several batches


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_batch_is_its_examples(norm: str) -> None:
    setting = Setting(5, norm)
    attack = Verdict(eps=setting.eps, norm=norm, random_start=False, restarts=1)
    whole = attack.run(setting.model, setting.x, setting.y)
    assert not any("restart" in name for name in whole.stages)
    for i in range(setting.n):
        one = attack.run(setting.model, setting.x[i : i + 1], setting.y[i : i + 1])
        assert torch.allclose(one.adversarial[0], whole.adversarial[i], rtol=0, atol=ROUNDING)
        for name in ("stage", "gradients", "forwards", "complete"):
            assert getattr(one, name).tolist() == [int(getattr(whole, name)[i])]


@pytest.mark.parametrize("population", [False, True])
def test_exploring_and_closing_is_running(population: bool) -> None:
    setting = Setting(5, "Linf", n=40, factor=0.5)
    attack = Verdict(eps=setting.eps, population=population, restarts=2)
    whole = attack.run(setting.model, setting.x, setting.y, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    part = attack.explore(setting.model, setting.x, setting.y, generator=generator)
    assert torch.equal(part.complete, part.success)
    assert not part.success.all()
    found = attack.close(setting.model, setting.x, setting.y, part, generator=generator)
    assert found.stages == whole.stages
    for name in ("adversarial", "success", "stage", "margin", "logits", "gradients", "complete"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert torch.equal(found.forwards, whole.forwards + ~part.success)  # the survivors were looked at twice
    assert part.gradients[~part.success].max() < found.gradients.max(), "what was found before is not written over"


def test_batches_are_explored_and_closed_together() -> None:
    setting = Setting(5, "Linf", n=60, factor=0.4)
    attack = Verdict(eps=setting.eps, population=True, restarts=1)
    slices = slice(0, 20), slice(20, 45), slice(45, 60)
    parts = [attack.explore(setting.model, setting.x[at], setting.y[at]) for at in slices]
    joined = VerdictResult.joined(parts)
    assert len(joined.stage) == 60
    assert torch.equal(joined.take(torch.arange(20, 45)).adversarial, parts[1].adversarial)
    closed = attack.close(setting.model, setting.x, setting.y, joined)
    given_up = ~closed.complete
    assert given_up.any()
    assert not (given_up & closed.success).any()
    assert float(closed.margin[given_up].min()) >= float(joined.margin[closed.complete & ~joined.success].max())
    with pytest.raises(ValueError, match="found is about 60 examples, there are 20; pass the same ones"):
        attack.close(setting.model, setting.x[:20], setting.y[:20], joined)
    with pytest.raises(ValueError, match="no results to join"):
        VerdictResult.joined([])


def test_the_closing_stages_give_up_after_twenty_in_a_row() -> None:
    """Nothing falls: two blocks of ten are attacked, the nearest ones."""
    setting = Setting(5, "Linf", n=50, factor=0.01)
    y = predicted(setting.model, setting.x)
    attack = Verdict(eps=setting.eps, population=True, restarts=1)
    result = attack.run(setting.model, setting.x, y)
    near = result.margin.argsort()
    assert not result.success.any()
    assert int(result.complete.sum()) == 20
    assert result.complete[near[:20]].all()
    assert (result.gradients[near[:20]] == 20 + 10 + 3 * 10 + 20 + 10 + 15).all()
    assert (result.gradients[near[20:]] == 20 + 10 + 3 * 10).all()
    everyone = dataclasses.replace(attack, population=False).run(setting.model, setting.x, y)
    assert everyone.complete.all()


# --- modes and options


def test_targeted_leaves_out_the_other_classes() -> None:
    result = Verdict(eps=0.1, restarts=1).run(SMOOTH, POINTS, aims(True), targeted=True, mask=OPEN, **FREE)
    assert not any("class" in name for name in result.stages)
    with torch.no_grad():
        assert torch.equal(result.success, SMOOTH(result.adversarial).argmax(1) == aims(True))
    assert 0 < int(result.success.sum()) < N


def test_the_models_own_loss_alone() -> None:
    """For estimators that have the gradient of no other loss."""
    plan = Verdict(loss=None).plan()
    assert {stage.attack.loss for stage in (*plan.first, *plan.closing)} == {None}
    assert plan.names == ("input", "margin", "cross-entropy", "closing cross-entropy")
    model = TorchModel(SMOOTH, loss=Margin())
    result = Verdict(eps=0.1, loss=None).run(model, POINTS, aims(False), mask=OPEN, **FREE)
    assert result.success.any()


def test_efforts() -> None:
    plans = [Verdict(effort=effort).plan() for effort in (0, 1, 2)]
    assert [len(plan.first) for plan in plans[:2]] == [3, 10]
    gradients = [sum(stage.gradients for stage in (*p.first, *p.closing)) for p in plans]
    assert gradients[:2] == [20 + 10 + 10 + 30 + 150, 20 + 10 + 80 + 30 + 150]
    assert gradients[1] < gradients[2] < 1500
    for effort, plan in enumerate(plans):
        assert len(set(plan.names)) == len(plan.names)
        flat = Verdict(effort=effort, norm="L2").plan()
        assert all("L2" in stage.attack.norms for stage in (*flat.first, *flat.closing))
    setting = Setting(5, "Linf", factor=0.9)
    found = [
        Verdict(eps=setting.eps, effort=effort, restarts=2).run(setting.model, setting.x, setting.y).success
        for effort in (0, 1, 2)
    ]
    assert not (found[0] & ~found[1]).any()
    assert not (found[1] & ~found[2]).any()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_the_first_stages_alone(count: int, norm: str) -> None:
    """They find what the whole finds in them, for their passes alone, and close nothing else."""
    setting = Setting(5, norm, factor=0.9)
    whole = Verdict(eps=setting.eps, norm=norm, restarts=3)
    few = Verdict(eps=setting.eps, norm=norm, restarts=3, stages=count)
    assert few.plan().names == whole.plan().names[: count + 1]
    seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
    found, all_of_it = (
        one.run(setting.model, setting.x, setting.y, generator=seed, **FREE)
        for one, seed in zip((few, whole), seeds, strict=True)
    )
    early = (all_of_it.stage >= 0) & (all_of_it.stage <= count)
    assert early.any()
    assert torch.equal(found.success, early)
    assert torch.equal(found.stage, torch.where(early, all_of_it.stage, -1))
    assert found.complete.all()
    steps = sum(stage.attack.steps + stage.diversify for stage in few.plan().first)
    assert int(found.gradients.max()) <= steps + len(few.plan().first)
    assert (found.gradients[~early] < all_of_it.gradients[~early]).all() or count == 12


def test_another_rule() -> None:
    setting = Setting(5, "Linf", factor=0.6)
    one = setting.fast()
    attack = Verdict(eps=setting.eps, restarts=2, direction=Quantised(levels=50))
    other = attack.run(setting.model, setting.x, setting.y, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(one.adversarial, other.adversarial)
    assert torch.equal(
        Verdict(eps=setting.eps, direction="quantised").run(setting.model, setting.x, setting.y).adversarial,
        Verdict(eps=setting.eps, direction=Quantised()).run(setting.model, setting.x, setting.y).adversarial,
    )


def test_draws_are_the_callers() -> None:
    setting = Setting(9, "Linf", factor=0.8)
    attack = Verdict(eps=setting.eps, restarts=2)
    one, two, other = (
        attack.run(setting.model, setting.x, setting.y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one.adversarial, two.adversarial)
    assert not torch.equal(one.adversarial, other.adversarial)


def test_the_hook_sees_every_gradient() -> None:
    seen: list[int] = []
    setting = Setting(5, "Linf")
    attack = Verdict(eps=setting.eps, effort=0, restarts=1)  # a square search has steps without gradients
    result = attack.run(setting.model, setting.x, setting.y, hook=lambda t, gradient, a: seen.append(len(a)))
    assert sum(seen) == int(result.gradients.sum())


def test_a_large_population_has_longer_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a small one have the length of the plan."""
    setting = Setting(5, "Linf", population=True, factor=0.4)
    monkeypatch.setattr(plans, "SEARCH", 3)
    short = setting.fast()
    assert short.success is not None
    monkeypatch.setattr(plans, "PER", 1)
    monkeypatch.setattr(plans, "LONGEST", 8)
    long = setting.fast()
    closed = short.complete & ~short.success & long.complete & (long.stage < 0)
    assert closed.any()
    assert (long.forwards - short.forwards)[closed].tolist() == [5] * int(closed.sum())
    stages = Verdict(effort=2).plan().closing
    assert [stage.attack.steps for stage in plans.lengthened(stages, 4)] == [stage.attack.steps for stage in stages]


def test_as_sharp_as_pgd_with_restarts(model: Net) -> None:
    x = images(40)
    y = predicted(model, x)
    ours = Verdict(eps=0.02).run(model, x, y)
    theirs = PGD(eps=0.02, steps=20, restarts=3, early_stop=True).run(model, x, y)
    assert 0 < int(theirs.success.sum()) <= int(ours.success.sum()) < 40
    assert ours.adversarial[ours.success].ne(x[ours.success]).flatten(1).any(1).all()


def test_refused() -> None:
    with pytest.raises(ValueError, match="effort=3 is not known; choose 0, 1 or 2"):
        Verdict(effort=3)
    with pytest.raises(ValueError, match="effort=-1 must be an integer of at least 0"):
        Verdict(effort=-1)
    with pytest.raises(ValueError, match="early_stop=False: a verdict is done"):
        Verdict(early_stop=False)
    with pytest.raises(ValueError, match="stages=0 must be an integer of at least 1"):
        Verdict(stages=0)
    with pytest.raises(ValueError, match="population=2 must be a bool"):
        Verdict(population=2)  # type: ignore[arg-type]
    rows = torch.full((N, 5), 0.1, dtype=torch.float64)
    rows[:, 0] = 0.6
    with pytest.raises(ValueError, match="Margin is not defined for rows of probabilities"):
        Verdict()(SMOOTH, POINTS, rows, **FREE)


def test_images_on_levels(model: Net) -> None:
    x = (images(20) * 255).round() / 255
    y = predicted(model, x)
    result = Verdict(eps=6 / 255, levels=256, restarts=2).run(model, x, y)
    assert 0 < int(result.success.sum()) < 20
    stored = (result.adversarial * 255).round() / 255
    assert torch.allclose(stored, result.adversarial, rtol=0, atol=1e-6)
    assert torch.equal(predicted(model, stored) != y, result.success)
    assert float((result.adversarial - x).abs().max()) <= 6 / 255 + 1e-6
