"""The audit of what was given up: its bound covers, a planted defect is found as often as predicted, it resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from firstorder.attacks import Verdict, VerdictResult
from firstorder.attacks import verdict as verdict_module
from firstorder.attacks.plans import Plan
from firstorder.autoattack import Audit, AutoAttack, Record
from firstorder.autoattack.audit import NAMES, REOPENED, drawn, rounds
from firstorder.evaluation.names import packaged
from firstorder.evaluation.reporting.intervals import clopper_pearson_upper, hypergeometric_upper
from firstorder.robustbench import benchmark
from test_autoattack import Killed, small
from test_autoattack_fast import recorded, same, verdict

SIMULATED = 1000


# --- the statistics


@cache
def slow_upper(hits: int, sample: int, population: int) -> int:
    """By all samples of a population of which the first are hits."""
    plausible = 0
    for number in range(population + 1):
        draws = list(combinations(range(population), sample))
        fewer = sum(sum(i < number for i in draw) <= hits for draw in draws)
        possible = hits <= number <= population - sample + hits
        if possible and Fraction(fewer, len(draws)) > Fraction(1, 20):
            plausible = number
    return plausible


@pytest.mark.parametrize("population", [1, 4, 9])
def test_the_finite_bound_by_all_samples(population: int) -> None:
    for sample in range(population + 1):
        for hits in range(sample + 1):
            assert hypergeometric_upper(hits, sample, population) == slow_upper(hits, sample, population)


@pytest.mark.parametrize(("hits", "sample"), [(0, 1), (0, 100), (1, 30), (3, 100), (99, 100), (40, 5000)])
def test_clopper_and_pearson(hits: int, sample: int) -> None:
    expected = scipy.stats.beta.ppf(0.95, hits + 1, sample - hits)
    assert clopper_pearson_upper(hits, sample) == pytest.approx(expected, rel=1e-9)
    large = 10**6
    assert hypergeometric_upper(hits, sample, large) / large == pytest.approx(expected, rel=5e-3)


def test_closed_forms() -> None:
    for sample in (1, 20, 100, 300):
        assert clopper_pearson_upper(0, sample) == pytest.approx(1 - 0.05 ** (1 / sample))
    assert round(100 * 0.55 * clopper_pearson_upper(0, 100), 1) == 1.6
    assert round(100 * 0.55 * clopper_pearson_upper(0, 300), 2) == 0.55
    assert clopper_pearson_upper(5, 5) == clopper_pearson_upper(0, 0) == 1
    assert hypergeometric_upper(2, 9, 9) == 2
    assert hypergeometric_upper(0, 0, 9) == 9
    assert hypergeometric_upper(0, 100, 5500) <= 5500 * clopper_pearson_upper(0, 100)
    assert hypergeometric_upper(0, 20, 100, level=0.5) < hypergeometric_upper(0, 20, 100, level=0.99)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, 2, 9), "hits=3 are more than the sample of 2"),
        ((0, 10, 9), "sample=10 is more than the population of 9"),
        ((-1, 2, 9), "hits=-1"),
        ((0, 2, 9, 1.0), r"level=1\.0"),
    ],
)
def test_values_that_mean_nothing(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hypergeometric_upper(*values)


def simulated(population: int, breakable: int, size: int, seed: int) -> Audit:
    """An audit of examples of which AutoAttack breaks every one below `breakable`."""
    audit = drawn(torch.arange(population), size, total=300, seed=seed)
    audit.broken_by = ["apgd-t" if i < breakable else None for i in audit.sample]
    return audit


def exactly(population: int, breakable: int, size: int, covers: Callable[[int], bool]) -> float:
    """The probability of a number of breaks that `covers`."""
    ways = [comb(breakable, b) * comb(population - breakable, size - b) for b in range(size + 1)]
    return sum(w for b, w in enumerate(ways) if covers(b)) / comb(population, size)


@pytest.mark.parametrize("breakable", [0, 1, 4, 6, 11, 40])
def test_simulated_audits_cover(breakable: int) -> None:
    """What AutoAttack would still break is within the bound in 95 of 100 audits, at least, and in as many as predicted.

    165 of 300 were given up, 60 are drawn.
    """
    population, size = 165, 60

    def covers(breaks: int) -> bool:
        return breakable <= hypergeometric_upper(breaks, size, population)

    audits = [simulated(population, breakable, size, seed) for seed in range(SIMULATED)]
    found = [breakable - a.breaks <= round(300 * a.bound) for a in audits]
    exact = exactly(population, breakable, size, covers)
    assert exact >= 0.95
    assert abs(sum(found) / SIMULATED - exact) < 4 * (0.05 * 0.95 / SIMULATED) ** 0.5
    assert all(covers(a.breaks) == one for a, one in zip(audits, found, strict=True))
    binomial = [breakable / population <= clopper_pearson_upper(a.breaks, size) for a in audits]
    assert sum(binomial) >= sum(found), "the bound for a population without end is the larger one"
    assert all(a.bound <= clopper_pearson_upper(a.breaks, size) * population / 300 for a in audits)


def test_a_bound_that_is_too_small_is_seen() -> None:
    """The simulation is one that fails: without the confidence, a sample without breaks says that there is nothing."""
    audits = [simulated(165, 6, 60, seed) for seed in range(SIMULATED)]
    assert sum(a.breaks >= 6 * 60 / 165 for a in audits) / SIMULATED < 0.9


def test_every_example_is_drawn_equally_often() -> None:
    pool = torch.arange(7, 27, 2)
    counts = torch.zeros(30, dtype=torch.long)
    for seed in range(SIMULATED):
        sample = drawn(pool, 4, total=30, seed=seed).sample
        assert sample == sorted(set(sample))
        counts[sample] += 1
    assert counts.sum() == 4 * SIMULATED == counts[pool].sum()
    assert scipy.stats.chisquare(counts[pool].numpy()).pvalue > 1e-4
    whole = drawn(pool, 100, total=30, seed=0)
    assert whole.sample == pool.tolist()
    assert (whole.asked, whole.population, whole.bound) == (100, 10, 10 / 30)  # before it is attacked
    with pytest.raises(ValueError, match="size=0"):
        drawn(pool, 0, total=30, seed=0)


# --- both rounds


def given_up(total: int, number: int) -> Record:
    """A record of robust examples, the last of which a verdict gave up."""
    x, none = torch.zeros(total, 1), torch.zeros(total, dtype=torch.long)
    record = Record(x, none.clone(), [None] * total)
    complete = torch.arange(total) < total - number
    record.verdict = VerdictResult(
        adversarial=x,
        success=none.bool(),
        gradients=none,
        doubtful=none.bool(),
        stages=("input",),
        stage=none - 1,
        margin=x[:, 0],
        logits=x,
        forwards=none,
        complete=complete,
    )
    return record


class Procedure:
    """Both rounds on examples of which AutoAttack breaks some and the closing stages others."""

    def __init__(self, record: Record, breakable: Tensor, closable: Tensor) -> None:
        self.record, self.breakable, self.closable = record, breakable, closable

    def attack(self, name: str) -> None:
        record = self.record
        assert name not in record.run
        if name == REOPENED:
            index = (record.given_up & self.closable).nonzero()[:, 0]
            assert record.verdict is not None
            record.verdict = replace(record.verdict, complete=torch.ones(len(self.breakable), dtype=torch.bool))
        else:
            audit = record.audits[-1]
            assert bool(record.robust[audit.sample].all())
            audit.broken_by = ["square" if self.breakable[i] else None for i in audit.sample]
            index = (record.sampled & self.breakable).nonzero()[:, 0]
        record.enter(name, index, record.adversarial[index], record.labels[index])

    def run(self, size: int, seed: int) -> Record:
        rounds(self.record, size, seed, attack=self.attack, save=lambda: None)
        return self.record


def test_a_break_reopens_and_a_fresh_sample_is_drawn() -> None:
    total, number = 60, 40
    breakable, closable = torch.zeros(2, total, dtype=torch.bool)
    quiet = Procedure(given_up(total, number), breakable, closable).run(10, seed=0)
    assert quiet.run == ["audit"]
    assert quiet.bound == quiet.audits[0].bound == hypergeometric_upper(0, 10, 40) / 60
    breakable[20:], closable[::2] = True, True
    record = Procedure(given_up(total, number), breakable, closable).run(10, seed=0)
    assert record.run == [*NAMES[:1], REOPENED, *NAMES[1:]]
    first, second = record.audits
    assert min(first.sample) >= 20, "of those given up"
    assert first.breaks == 10
    assert not {*first.sample} & {*second.sample}, "a fresh one"
    left = 20 + sum(i % 2 == 1 and i not in first.sample for i in range(20, 60))
    assert second.population == left, "of all that are robust by now"
    assert record.bound == second.bound
    assert [by == "audit" for by in record.broken_by] == [i in first.sample for i in range(total)]
    with pytest.raises(ValueError, match="audit=9: the state holds an audit of 10"):
        rounds(record, 9, 0, attack=lambda name: None, save=lambda: None)


def test_where_nobody_was_given_up_all_are_sampled() -> None:
    every = torch.ones(30, dtype=torch.bool)
    record = Procedure(given_up(30, 0), every, every).run(10, seed=0)
    assert record.run == ["audit"], "there is nothing to reopen"
    assert record.audits[0].population == 30
    broken = given_up(30, 0)
    broken.broken_by = ["pgd"] * 30
    assert Procedure(broken, every, every).run(10, seed=0).bound is None


@pytest.mark.parametrize("closed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("breakable", [6, 11, 40])
def test_both_rounds_cover(breakable: int, closed: float) -> None:
    """The last bound holds in 90 of 100, at least: each of the two samples errs with at most 5 %."""
    total, number, size, covered = 300, 165, 60, 0
    for seed in range(300):
        chosen = torch.randperm(number, generator=torch.Generator().manual_seed(10_000 + seed))[:breakable] + 135
        can = torch.zeros(total, dtype=torch.bool)
        can[chosen] = True
        falls = can.clone()
        falls[chosen[round(closed * breakable) :]] = False
        record = Procedure(given_up(total, number), can, falls).run(size, 2 * seed)
        left = int((record.robust & can).sum())
        assert record.bound is not None
        covered += left <= round(total * record.bound)
    assert covered / 300 >= 0.9 - 2 * (0.1 * 0.9 / 300) ** 0.5


# --- a planted defect

EPS = 0.32


@pytest.fixture
def defective(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor, Tensor]:
    """A verdict of one stage of two steps that gives up at the first example that stays robust."""
    plan = Verdict.plan

    def short(self: Verdict, **words: Any) -> Plan:
        whole = plan(self, **words)
        first = whole.first[0]
        return replace(whole, first=(replace(first, attack=replace(first.attack, steps=2)),))

    monkeypatch.setattr(Verdict, "plan", short)
    monkeypatch.setattr(verdict_module, "BLOCK", 1)
    monkeypatch.setattr(verdict_module, "QUIET", 1)
    images = packaged.mnist()
    return packaged.mnist_cnn(), images.x[:40], images.y[:40]


def audited(model: Any, size: int | None, **words: Any) -> AutoAttack:
    words = {"parameters": {"verdict": {"restarts": 2}}, "seed": 0, **words}
    adversary = AutoAttack(model, eps=EPS, version="fast", verbose=False, audit=size, **words)
    if adversary.auditor is not None:
        small(adversary.auditor)
    return adversary


def test_a_planted_defect_is_found_as_often_as_predicted(defective: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = defective
    pool = recorded(audited(model, None), x, y).given_up.nonzero()[:, 0]
    everyone = recorded(small(AutoAttack(model, eps=EPS, seed=0, verbose=False)), x[pool], y[pool])
    falls = {int(i): by is not None for i, by in zip(pool, everyone.broken_by, strict=True)}
    number, size = sum(falls.values()), 5
    assert 2 <= number < len(pool)
    found = sum(any(falls[i] for i in drawn(pool, size, total=40, seed=s).sample) for s in range(SIMULATED))
    predicted = 1 - comb(len(pool) - number, size) / comb(len(pool), size)
    assert 0.2 < predicted < 0.98
    assert abs(found / SIMULATED - predicted) < 4 * (predicted * (1 - predicted) / SIMULATED) ** 0.5


def test_an_audit_from_end_to_end(defective: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A defect is found, the closing stages see everyone, and what is reported holds."""
    model, x, y = defective
    before = recorded(audited(model, None), x, y, bs=16)
    record = recorded(audited(model, 20), x, y, bs=16)
    assert record.run == ["verdict", "audit", "verdict reopened", "second audit"]
    first, second = record.audits
    assert first.population == int(before.given_up.sum()) > first.breaks > 0
    assert all(bool(before.given_up[i]) for i in first.sample)
    for i, by in zip(first.sample, first.broken_by or [], strict=True):
        assert (record.broken_by[i] == "audit") == (by is not None)
    by_reopened = torch.tensor([by == "verdict reopened" for by in record.broken_by])
    assert by_reopened.any(), "they were given up too early"
    assert (before.given_up & by_reopened).sum() == by_reopened.sum()
    assert not record.given_up.any()
    kept = verdict(record)
    assert (kept.stage[by_reopened] >= 2).all()
    assert (kept.margin[by_reopened] < 0).all()
    assert kept.complete[by_reopened].all()
    more = kept.gradients - verdict(before).gradients
    assert int(more.sum()) == record.gradients["verdict reopened"]
    assert int((kept.forwards - verdict(before).forwards).sum()) == record.forwards["verdict reopened"]
    assert (record.gradients["audit"], record.forwards["audit"]) == (first.gradients, first.forwards)
    assert second.population == int(record.robust.sum()) + second.breaks - sum(
        bool(record.robust[i]) for i in first.sample
    )
    assert record.bound == second.bound == (second.population - len(second.sample)) / 40 * (second.bound > 0)
    with torch.no_grad():
        assert torch.equal(model(record.adversarial).argmax(1) == y, record.robust)
    assert (record.adversarial - x).abs().max() <= EPS + 1e-6
    accuracy = list(record.accuracy.values())
    assert accuracy == sorted(accuracy, reverse=True)


@pytest.mark.parametrize("at", range(1, 7))
def test_killed_and_resumed_within_an_audit(
    at: int, defective: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any attack: the verdict, AutoAttack's on the first sample, the reopened stages, those on the second."""
    model, x, y = defective
    expected = recorded(audited(model, 8), x, y, bs=16)
    assert expected.run == ["verdict", "audit", "verdict reopened", "second audit"]
    state, attack, count = tmp_path / "state.json", AutoAttack._attack, 0

    def killed(self: AutoAttack, *args: Any) -> None:
        nonlocal count
        attack(self, *args)
        count += 1
        if count == 2 * at:
            raise Killed

    monkeypatch.setattr(AutoAttack, "_attack", killed)
    with pytest.raises(Killed):
        recorded(audited(model, 8), x, y, bs=16, state_path=state)
    monkeypatch.setattr(AutoAttack, "_attack", attack)
    resumed = recorded(audited(model, 8), x, y, bs=16, state_path=state)
    assert same(resumed, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.json.examples.pt"]


def test_an_audit_may_be_asked_for_afterwards(defective: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = defective
    state = tmp_path / "state.json"
    assert recorded(audited(model, None), x, y, state_path=state).bound is None
    record = recorded(audited(model, 8), x, y, state_path=state)
    assert same(record, recorded(audited(model, 8), x, y))
    with pytest.raises(ValueError, match="audit=9: the state holds an audit of 8; ask for that, or name another file"):
        recorded(audited(model, 9), x, y, state_path=state)
    assert same(recorded(audited(model, None), x, y, state_path=state), record)


def test_an_audit_in_the_benchmark(
    defective: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = defective
    build = AutoAttack.__init__

    def cheap(self: AutoAttack, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        small(self)

    monkeypatch.setattr(AutoAttack, "__init__", cheap)
    words: dict[str, Any] = {"x": x, "y": y, "eps": EPS, "seed": 0, "details": True, "batch_size": 16}
    words["parameters"] = {"verdict": {"restarts": 2}}
    _, robust, record = benchmark(model, attacks=["verdict"], audit=8, **words)
    assert robust == record.accuracy["second audit"]
    assert len(record.audits) == 2
    with pytest.raises(ValueError, match="audit=8 is of what a verdict gives up"):
        benchmark(model, attacks=["pgd"], audit=8, **{**words, "parameters": None})
