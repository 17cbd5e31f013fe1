"""A verdict in a run: shards by themselves, then the closing stages once over all that is left of the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import evaluate_models
from firstorder.attacks import Verdict, VerdictResult
from firstorder.evaluation import evaluate
from firstorder.evaluation.reporting import summary
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.plan import plan
from firstorder.evaluation.runs.specification import specify
from firstorder.evaluation.runs.store import Run

COUNT, SHARD, EPS = 300, 80, 0.018


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    x = torch.rand(COUNT, *evaluate_models.SHAPE, generator=torch.Generator().manual_seed(0))
    y = evaluate_models.rough()(x).argmax(1)
    y[::17] = (y[::17] + 1) % evaluate_models.CLASSES
    np.savez("images.npz", x=x.numpy(), y=y.numpy())
    work._worker.cache_clear()
    return tmp_path


def keys(**given: Any) -> dict[str, Any]:
    base = {"models": "evaluate_models:rough", "data": "images.npz", "eps": EPS, "shard": SHARD, "attacks": "verdict",
            "prepare": False, "pictures": 3}  # fmt: skip
    return {**base, **given}


def run(out: str = "run", engine: Engine | None = None, **given: Any) -> Run:
    return evaluate(keys(**given), out, engine=engine).run


def rows(found: Run) -> pd.DataFrame:
    return found.table().drop(columns="seconds")


def seeded(**facts: Any) -> torch.Generator:
    text = json.dumps(facts, sort_keys=True).encode()
    return torch.Generator().manual_seed(int(hashlib.sha256(text).hexdigest()[:15], 16))


def slowly(x: Tensor, y: Tensor) -> tuple[Tensor, VerdictResult]:
    """Which examples are attacked, and what a verdict finds of them, shard by shard and then of all."""
    model, attack = evaluate_models.rough(), Verdict(eps=EPS, population=True)
    right = model(x).argmax(1) == y
    parts = []
    for start in range(0, COUNT, SHARD):
        own = right.clone()
        own[:start], own[start + SHARD :] = False, False
        parts.append(attack.explore(model, x[own], y[own], generator=seeded(seed=0, start=start)))
    found = VerdictResult.joined(parts)
    left = (found.stage < 0).nonzero()[:, 0]
    closed = attack.close(
        model, x[right][left], y[right][left], found.take(left), generator=seeded(seed=0, phase="close")
    )
    for name in ("adversarial", "success", "stage", "margin", "complete", "forwards", "gradients"):
        getattr(found, name)[left] = getattr(closed, name)
    return right, found


def test_rows_are_those_of_a_slow_computation() -> None:
    content = np.load("images.npz")
    x, y = torch.from_numpy(content["x"]), torch.from_numpy(content["y"])
    right, expected = slowly(x, y)
    found = run()
    assert [(cell.phase, cell.start, cell.stop) for cell in found.cells] == [
        ("", 0, 80), ("", 80, 160), ("", 160, 240), ("", 240, 300), ("close", 0, 300),
    ]  # fmt: skip
    table = found.table()
    assert table.example.tolist() == list(range(COUNT))
    own, rest = table[right.numpy()], table[~right.numpy()]
    stages = [expected.stages[i] if i >= 0 else None for i in expected.stage.tolist()]
    assert own.stage.fillna("").tolist() == [stage or "" for stage in stages]
    assert len([stage for stage in stages if stage and stage.startswith(("closing", "restart"))]) >= 2
    assert own.success.tolist() == expected.success.tolist()
    assert own.complete.tolist() == expected.complete.tolist()
    assert 10 < (~own.complete).sum() < 60
    for name, values in (
        ("margin", expected.margin),
        ("forwards", expected.forwards),
        ("backwards", expected.gradients),
    ):
        np.testing.assert_allclose(own[name], values.double())
    size = (expected.adversarial - x[right]).flatten(1).abs().amax(1)
    np.testing.assert_allclose(own.linf, size, rtol=1e-6)
    picture = np.frombuffer(table.adversarial[1], "<f4").reshape(1, 4, 4)
    np.testing.assert_array_equal(picture, expected.adversarial[0])
    assert table.adversarial.notna().tolist() == [True] * 3 + [False] * (COUNT - 3)
    assert (rest.stage == "input").all()
    assert rest.complete.all()
    assert rest.margin.isna().all()
    assert table.carried.isna().all()


def test_batches_do_not_matter() -> None:
    first, *others = (rows(run(f"run{size}", batch_size=size)) for size in (7, 60, 1000))
    for other in others:
        pd.testing.assert_frame_equal(first, other, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_where_it_was_stopped() -> None:
    """Its later cells are computed after what they go on from, whatever is there, in one process and in several."""
    whole = run("whole", attacks=["verdict", "fgsm"])
    table = rows(whole)
    assert [cell.phase for cell in whole.cells].count("close") == 1
    for number, gone in enumerate([(0,), (0, 8), (2, 3, 8), tuple(range(9))]):
        for i in gone:
            whole.store.path(whole.cells[i].key).unlink(missing_ok=True)
        again = run("whole", Engine(jobs=1 + number // 2, threads=1), attacks=["verdict", "fgsm"])
        assert len(again.done()) == 9
        pd.testing.assert_frame_equal(rows(again), table, check_exact=True)


def test_a_shard_that_fails_leaves_the_closing_stages_to_the_next_call(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(evaluate_models.MARKER, str(here / "marker"))
    np.savez("images.npz", **evaluate_models.arrays(30, marked=(12,)))
    words = {"models": "evaluate_models:raises_on_marked", "shard": 10, "eps": 0.1}
    found = run(**words)
    first, second = found.failures()
    assert (first.cell.start, second.cell.phase) == (10, "close")
    assert "a cell that it goes on from has failed" in second.error
    assert found.table().empty
    Path("marker").touch()
    found = run(**words)
    assert not found.failures()
    assert len(found.table()) == 30


def test_without_a_population_every_survivor_is_attacked_to_the_end() -> None:
    found = run(attacks=["verdict:population=false", "verdict:effort=2", "verdict"])
    table = found.table()
    one, dear, all_ = (
        table[table.attack == name] for name in ("verdict:population=false", "verdict:effort=2", "verdict")
    )
    assert {cell.phase for cell in found.cells if cell.attack == "verdict:population=false"} == {""}
    assert one.complete.all()
    assert not all_.complete.all()
    assert dear.backwards.sum() > one.backwards.sum() > all_.backwards.sum()
    (score,) = summary.leaderboard(summary.load(found), found.facts)
    broken = table.groupby("example").success.any()
    assert score.robust.value == pytest.approx(1 - broken.mean())
    assert len(score.attacks) == 3


def test_towards_a_class() -> None:
    table = run(targeted=True).table()
    attacked = table[table.clean_label != table.wanted]
    assert 0 < attacked.success.sum() < len(attacked)
    assert (attacked[attacked.success].adversarial_label == attacked[attacked.success].wanted).all()
    assert attacked.stage.notna().eq(attacked.success).all()


def test_keys_of_the_closing_stages() -> None:
    """They are those of everything that the closing stages go on from."""

    def key(**given: Any) -> str:
        return plan(specify(keys(**given))).cells[-1].key

    assert key() == key(attacks=["fgsm", "verdict"])
    others = [
        key(**given) for given in ({}, {"count": 299}, {"seeds": 1}, {"attacks": "verdict:effort=2"}, {"eps": 0.03})
    ]
    assert len(set(others)) == 5
