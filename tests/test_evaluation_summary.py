"""What is read off the rows of a run, against loops over single rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation_runs import MINIMUM_NORM, facts, make, table
from firstorder.evaluation.reporting import summary
from firstorder.evaluation.reporting.summary import Curve, Rate
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import Store, read

Row = dict[str, Any]
EPS, MODELS, ATTACKS = (0.1, 0.2), ("a", "b"), ("PGD-40", "AutoAttack", MINIMUM_NORM)


class Rows:
    """Stands for a run: its facts and some rows."""

    def __init__(self, found: dict[str, Any], rows: Sequence[Row]) -> None:
        self.facts, self.rows = found, list(rows)

    def table(self, columns: Sequence[str]) -> pd.DataFrame:
        assert "adversarial" not in columns
        return table({key: [row[key] for row in self.rows] for key in self.rows[0]}).select(list(columns)).to_pandas()


def draw(seed: int) -> Rows:
    """Random rows: two seeds, a part of the cells, sizes on a grid around the radii."""
    random = np.random.default_rng(seed)
    count, norm = int(random.integers(1, 7)), str(random.choice(["Linf", "L2"]))
    found = facts(MODELS, ATTACKS, EPS, (0, 1), count, norm=norm, shard=3, transfer=True)
    labels = random.integers(0, 3, count)
    clean = {model: np.where(random.random(count) < 0.7, labels, (labels + 1) % 3) for model in MODELS}
    rows: list[Row] = []
    for cell in random.permutation(np.array(found["cells"], dtype=object))[: random.integers(1, len(found["cells"]))]:
        for target in MODELS:
            for i in range(cell["start"], cell["stop"]):
                attacked = clean[cell["model"]][i] == labels[i]
                hit = bool(random.random() < 0.6) if attacked else bool(clean[target][i] != labels[i])
                size, other = (random.choice([0.05, 0.1, 0.15, 0.2, 0.3], 2) * attacked).tolist()
                if cell["eps"] is not None:
                    size = min(size, cell["eps"])
                rows.append({
                    "model": cell["model"], "target": target, "attack": cell["attack"], "eps": cell["eps"],
                    "seed": cell["seed"], "example": i, "label": int(labels[i]), "clean_label": int(clean[target][i]),
                    "success": hit, "doubtful": False, "unverified": False,
                    "linf": size if norm == "Linf" else other, "l2": size if norm == "L2" else other,
                    "forwards": float(random.integers(1, 9)), "backwards": float(random.integers(1, 9) * attacked),
                    "seconds": float(random.random()),
                })  # fmt: skip
    return Rows(found, rows)


def breaks(run: Rows, row: Row, eps: float) -> bool:
    size = row["linf"] if run.facts["specification"]["norm"] == "Linf" else row["l2"]
    return bool(row["success"] and size <= eps * (1 + 1e-5) + 1e-6)


def load(run: Any) -> pd.DataFrame:
    return summary.load(run)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def own(run: Rows, model: str, attack: str | None, eps: float, target: str | None = None) -> list[Row]:
    """An attack's rows at a radius; of all attacks, those at smaller radii too."""
    found = [row for row in run.rows if row["model"] == model and row["target"] == (target or model)]
    if attack is None:
        return [row for row in found if row["eps"] is None or row["eps"] <= eps]
    return [row for row in found if row["attack"] == attack and row["eps"] in (None, eps)]


def standing(run: Rows, rows: Sequence[Row], eps: float, *, worst: bool = False) -> tuple[float, int]:
    """The mean over examples of the share of their rows, or in the worst case all, that do not break them."""
    examples = sorted({row["example"] for row in rows})
    shares = []
    for example in examples:
        held = [not breaks(run, row, eps) for row in rows if row["example"] == example]
        shares.append(float(all(held)) if worst else mean(held))
    return mean(shares), len(examples)


def near(rate: Rate, expected: tuple[float, int]) -> bool:
    return rate.count == expected[1] and rate.value == pytest.approx(expected[0])


def at(curve: Curve, x: float) -> float:
    return float(curve.robust[np.searchsorted(curve.at, x, side="right") - 1])


seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_leaderboard(seed: int) -> None:
    run = draw(seed)
    board = summary.leaderboard(load(run), run.facts)
    expected = [(eps, m) for eps in EPS for m in MODELS if any(own(run, m, attack, eps) for attack in ATTACKS)]
    assert [(line.eps, line.model) for line in board] == expected
    for line in board:
        everything = own(run, line.model, None, math.inf)
        first = {row["example"]: row["clean_label"] == row["label"] for row in everything}
        assert near(line.clean, (mean(list(first.values())), len(first)))
        assert near(line.robust, standing(run, own(run, line.model, None, line.eps), line.eps, worst=True))
        assert {result.attack for result in line.attacks} == {a for a in ATTACKS if own(run, line.model, a, line.eps)}
        strengths = [result.robust.value for result in line.attacks]
        assert strengths == sorted(strengths)
        for result in line.attacks:
            rows = own(run, line.model, result.attack, line.eps)
            assert near(result.robust, standing(run, rows, line.eps))
            assert near(result.worst, standing(run, rows, line.eps, worst=True))
            assert set(result.seeds) == {row["seed"] for row in rows}
            for number, rate in result.seeds.items():
                assert near(rate, standing(run, [row for row in rows if row["seed"] == number], line.eps))
            attacked = [row for row in rows if row["clean_label"] == row["label"]]
            succeeded = [row for row in attacked if row["success"]]
            for name, over, reduce in (
                ("forwards", attacked, np.mean), ("backwards", attacked, np.mean), ("seconds", rows, np.mean),
                ("linf", succeeded, np.median), ("l2", succeeded, np.median),
            ):  # fmt: skip
                values = [row[name] for row in over]
                assert getattr(result, name) == pytest.approx(reduce(values) if values else math.nan, nan_ok=True)


@given(seeds)
def test_radius_curves(seed: int) -> None:
    run = draw(seed)
    rows = load(run)
    for model in MODELS:
        curves = {curve.attack: curve for curve in summary.radius_curves(rows, run.facts, model)}
        present = {row["attack"] for row in own(run, model, None, math.inf)}
        assert list(curves) == [*(attack for attack in ATTACKS if attack in present), *([None] if present else [])]
        for attack, curve in curves.items():
            free = MINIMUM_NORM in (present if attack is None else [attack])
            assert curve.stairs == free
            assert curve.at[0] == 0
            assert (np.diff(curve.at) > 0).all()
            evaluated = own(run, model, attack, math.inf) if free or attack is None else None
            for eps in (0.03, 0.05, 0.12, 0.15, 0.25, 0.3, 9.0) if free else ():
                here = own(run, model, attack, eps)
                if len({row["example"] for row in here}) == len({row["example"] for row in evaluated or ()}):
                    assert at(curve, eps) == pytest.approx(standing(run, here, eps, worst=attack is None)[0])
            for eps in EPS:
                here = own(run, model, attack, eps)
                complete = not free or {row["example"] for row in here} == {row["example"] for row in evaluated or ()}
                if complete and (free or eps in curve.at):
                    assert at(curve, eps) == pytest.approx(standing(run, here, eps, worst=attack is None)[0])


@given(seeds)
def test_query_curves(seed: int) -> None:
    run = draw(seed)
    rows = load(run)
    for model in MODELS:
        for eps in EPS:
            curves = summary.query_curves(rows, run.facts, model, eps)
            shown = [attack for attack in ATTACKS if own(run, model, attack, eps)]
            assert [curve.attack for curve in curves] == [*shown, *([None] if shown else [])]
            for curve in curves:
                here = own(run, model, curve.attack, eps)
                assert curve.exact == ((curve.attack or shown) in ("PGD-40", ["PGD-40"]))
                costs = [(row["forwards"] + row["backwards"]) * (row["clean_label"] == row["label"]) for row in here]
                assert curve.at[-1] == max(costs)
                for q in (0, 1, 3, 6.5, 8, 16, 100):
                    fallen: dict[int, list[bool]] = {}
                    for row, cost in zip(here, costs, strict=True):
                        fallen.setdefault(row["example"], []).append(breaks(run, row, eps) and cost <= q)
                    shares = [float(any(hits)) if curve.attack is None else mean(hits) for hits in fallen.values()]
                    assert at(curve, q) == pytest.approx(1 - mean(shares))
                    assert curve.count == len(shares)


@given(seeds, st.integers(0, 3))
def test_overlap(seed: int, most: int) -> None:
    run = draw(seed)
    rows = load(run)
    for model in MODELS:
        for eps in EPS:
            sets: dict[int, set[str]] = {}
            broken = Counter[str]()
            for attack in ATTACKS:
                for example in {
                    row["example"] for row in own(run, model, attack, eps) if row["clean_label"] == row["label"]
                }:
                    mine = [row for row in own(run, model, attack, eps) if row["example"] == example]
                    sets.setdefault(example, set())
                    if any(breaks(run, row, eps) for row in mine):
                        sets[example].add(attack)
                        broken[attack] += 1
            counts = Counter(tuple(attack for attack in ATTACKS if attack in hits) for hits in sets.values())
            alive = counts.pop((), 0)
            found = summary.overlap(rows, run.facts, model, eps, most=most)
            assert found.robust == alive
            assert {attack: count for attack, count in found.broken.items() if count} == broken
            assert all(counts[chosen] == count for chosen, count in found.sets)
            sizes = sorted(counts.values(), reverse=True)
            assert [count for _, count in found.sets] == sizes[:most]
            assert found.rest == (sum(sizes[most:]), len(sizes[most:]))


@given(seeds)
def test_transfer(seed: int) -> None:
    run = draw(seed)
    rows = load(run)
    for attack in ATTACKS:
        for eps in EPS:
            matrix = summary.transfer(rows, run.facts, attack, eps)
            for line, model in zip(matrix, MODELS, strict=True):
                right = {
                    row["example"] for row in own(run, model, None, math.inf) if row["clean_label"] == row["label"]
                }
                for found, target in zip(line, MODELS, strict=True):
                    pair = [row for row in own(run, model, attack, eps, target) if row["example"] in right]
                    pair = [row for row in pair if row["clean_label"] == row["label"]]
                    assert (found is None) == (not pair)
                    if found is not None:
                        held, count = standing(run, pair, eps)
                        assert near(found, (1 - held, count))


def one(*rows: Row, norm: str = "Linf", **options: Any) -> Rows:
    """Rows of one model and attack that are right and broken at no cost where they do not say otherwise."""
    plain = {
        "model": "a", "target": "a", "attack": "PGD-40", "eps": 0.1, "seed": 0, "label": 1, "clean_label": 1,
        "success": True, "doubtful": False, "unverified": False, "linf": 0.1, "l2": 0.1, "forwards": 2.0,
        "backwards": 1.0, "seconds": 1.0,
    }  # fmt: skip
    found = facts(["a"], ["PGD-40", MINIMUM_NORM], options.get("eps", [0.1]), [0], len(rows), norm=norm)
    return Rows(found, [{**plain, "example": i, **row} for i, row in enumerate(rows)])


def test_a_perturbation_may_be_larger_than_the_radius_by_rounding_only() -> None:
    sizes = (0.1 * (1 + 0.9e-5), 0.1 * (1 + 1e-5) + 0.9e-6, 0.1 * (1 + 1e-5) + 1.2e-6, 0.1 * (1 + 3e-5))
    for norm in ("Linf", "L2"):
        other = {"Linf": {"l2": 0.0}, "L2": {"linf": 0.0}}[norm]
        name = norm.lower()
        run = one(*({"attack": MINIMUM_NORM, "eps": None, **other, name: size} for size in sizes), norm=norm)
        (line,) = summary.leaderboard(load(run), run.facts)
        assert line.robust == line.attacks[0].robust == Rate(0.5, 4)


def test_all_attacks_together_break_what_any_breaks_at_a_smaller_radius() -> None:
    run = one(
        {"eps": 0.1, "example": 0}, {"eps": 0.2, "example": 0, "success": False},
        {"eps": 0.1, "example": 1, "success": False}, {"eps": 0.2, "example": 1, "success": False},
        eps=[0.2, 0.1],
    )  # fmt: skip
    low, high = summary.leaderboard(load(run), run.facts)
    assert (low.eps, low.robust.value, low.attacks[0].robust.value) == (0.1, 0.5, 0.5)
    assert (high.eps, high.robust.value, high.attacks[0].robust.value) == (0.2, 0.5, 1.0)


def test_the_mean_over_seeds_and_the_worst_of_them() -> None:
    hits = {0: (True, False, False, False), 1: (True, True, False, False), 2: (True, False, True, False)}
    run = one(*({"seed": s, "example": i, "success": hit} for s, own in hits.items() for i, hit in enumerate(own)))
    ((result,),) = (line.attacks for line in summary.leaderboard(load(run), run.facts))
    assert result.robust.value == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert result.robust.count == 4
    assert result.worst == Rate(0.25, 4)
    assert result.seeds == {0: Rate(0.75, 4), 1: Rate(0.5, 4), 2: Rate(0.5, 4)}
    low, high = stats.binomtest(1, 4).proportion_ci(method="wilson")
    assert result.worst.interval == pytest.approx((low, high))


def test_a_minimum_norm_attack_falls_where_its_perturbations_end() -> None:
    sizes = (0.3, 0.1, 0.2, 0.1)
    wrong: Row = {"clean_label": 0, "linf": 0.0, "backwards": 0.0}
    rows: list[Row] = [*({"linf": size} for size in sizes), wrong, {"success": False}]
    run = one(*({"attack": MINIMUM_NORM, "eps": None, **row} for row in rows))
    curve, together = summary.radius_curves(load(run), run.facts, "a")
    assert curve.at == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-5)
    assert curve.robust == pytest.approx([5 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert (together.at == curve.at).all()
    assert (together.robust == curve.robust).all()


def test_the_large_sets_and_the_rest(tmp_path: Path) -> None:
    names = [f"attack {i}" for i in range(6)]
    found = facts(["a"], names, [0.1], [0], 64)
    rows = one(
        *(
            {"attack": name, "example": i, "success": bool(i >> k & 1)}
            for i in range(64)
            for k, name in enumerate(names)
        )
    )
    shared = summary.overlap(load(Rows(found, rows.rows)), found, "a", 0.1)
    assert len(shared.sets) == 15
    assert shared.rest == (63 - 15, 63 - 15)
    assert shared.robust == 1
    assert shared.broken == dict.fromkeys(names, 32)


def test_a_model_that_is_always_wrong() -> None:
    run = one({"clean_label": 0, "linf": 0.0, "backwards": 0.0})
    rows = load(run)
    (line,) = summary.leaderboard(rows, run.facts)
    assert (line.clean, line.robust) == (Rate(0.0, 1), Rate(0.0, 1))
    assert math.isnan(line.attacks[0].forwards)
    shared = summary.overlap(rows, run.facts, "a", 0.1)
    assert (shared.sets, shared.rest, shared.robust) == ([], (0, 0), 0)


def test_a_run_in_which_nothing_is_finished(tmp_path: Path) -> None:
    found = facts(MODELS, ATTACKS, EPS, [0], 5, transfer=True)
    Store(tmp_path).write(found)
    rows = load(read(tmp_path))
    assert summary.leaderboard(rows, found) == []
    assert summary.radius_curves(rows, found, "a") == summary.query_curves(rows, found, "a", 0.1) == []
    assert summary.transfer(rows, found, "PGD-40", 0.1) == [[None, None], [None, None]]
    assert summary.overlap(rows, found, "a", 0.1).sets == []


def test_an_unfinished_run_says_how_many_examples_there_are(tmp_path: Path) -> None:
    found = facts(["a"], ["PGD-40", "AutoAttack"], [0.1], [0], 10, shard=4)
    second = next(cell["key"] for cell in found["cells"] if cell["attack"] == "AutoAttack" and cell["start"] == 4)
    run = make(tmp_path, found, unfinished=[second])
    run.store.fail(next(Cell(**cell) for cell in found["cells"] if cell["key"] == second), "out of memory")
    (line,) = summary.leaderboard(load(run), found)
    assert {result.attack: result.robust.count for result in line.attacks} == {"PGD-40": 10, "AutoAttack": 6}
    assert line.robust.count == line.clean.count == 10
    assert [(failure.cell.key, failure.error) for failure in run.failures()] == [(second, "out of memory")]
