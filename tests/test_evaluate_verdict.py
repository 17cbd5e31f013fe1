"""A verdict in a run: shards by themselves, then the closing stages once over all that is left of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import evaluate_models
from firstorder.attacks import Verdict, VerdictResult
from firstorder.evaluation import evaluate
from firstorder.evaluation.cli import app
from firstorder.evaluation.reporting import summary, verdicts
from firstorder.evaluation.reporting.intervals import hypergeometric_upper
from firstorder.evaluation.reporting.page import write as write_report
from firstorder.evaluation.runs import limits, work
from firstorder.evaluation.runs.adversaries import Auto, Found
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.plan import plan
from firstorder.evaluation.runs.specification import specify
from firstorder.evaluation.runs.store import Run, read

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
    kept = (table.example < 3) | (table.success & right.numpy())  # the first, and those that it broke
    assert table.adversarial.notna().tolist() == kept.tolist()
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
        again = run("whole", Engine(jobs=1 + number // 3, threads=1), attacks=["verdict", "fgsm"])
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


def pretended(monkeypatch: pytest.MonkeyPatch, breaks: int) -> list[Tensor]:
    """Have AutoAttack break the first of the first samples that it is given; those that it was given."""
    asked: list[Tensor] = []

    def attack(self: Auto, model: Any, module: Any, x: Tensor, y: Tensor, *rest: Any, targeted: bool = False) -> Found:
        broken = torch.arange(len(x)) < (breaks if not asked else 0)
        asked.append(x)
        passes = torch.full((len(x),), 700.0, dtype=torch.float64)
        return Found(x.clone(), passes, passes / 7, torch.zeros_like(broken), broken)

    monkeypatch.setattr(Auto, "run", attack)
    return asked


def test_an_audit_is_of_a_random_sample_of_what_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretended(monkeypatch, 0)
    before = run().table()
    found = run(audit=10)
    table = found.table()
    assert [cell.phase for cell in found.cells[4:]] == ["close", "audit", "reopen", "audit again"]
    given_up = before.example[~before.complete].to_numpy()
    order = torch.randperm(len(given_up), generator=seeded(seed=0, phase="audit"))[:10]
    assert table.example[table.audit == 1].tolist() == sorted(given_up[order].tolist())
    np.testing.assert_array_equal(asked[0], np.load("images.npz")["x"][table.example[table.audit == 1]])
    assert len(asked) == 1
    assert (table.audit_passes[table.audit == 1] == 800).all()
    assert table.audit_passes[table.audit.isna()].isna().all()
    entered = ["audit", "audit_passes", "seconds"]
    pd.testing.assert_frame_equal(table.drop(columns=entered), before.drop(columns=entered))
    (open_,) = verdicts.verdicts(summary.load(found))
    assert open_.sample == verdicts.Sample(len(given_up), 10, 0, COUNT)
    assert open_.given_up == len(given_up)
    # of a population of 56, 10 without a break leave at most 13 others (56 choose 10, 43 choose 10)
    assert open_.sample.bound == pytest.approx(hypergeometric_upper(0, 10, len(given_up)) / COUNT)
    assert 0.6 < open_.sample.bound / ((1 - 0.05**0.1) * len(given_up) / COUNT) < 1.05
    assert "AutoAttack broke 0 of 10 drawn from" in open_.line
    table = run(audit=1000).table()  # all of them
    assert table.example[table.audit == 1].tolist() == given_up.tolist()
    (open_,) = verdicts.verdicts(summary.load(run(audit=1000)))
    assert open_.sample is not None
    assert open_.sample.bound == 0


def test_a_break_reopens_the_closing_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, 2)
    given_up = run().table().complete.eq(False)
    found = run(audit=10)
    table = found.table()
    assert table.complete[~given_up].all()
    first, second = (table[table.audit == number] for number in (1, 2))
    assert (first.stage == "autoattack").sum() == 2
    assert len(second) == 10
    assert second.stage.isna().all()
    assert table.complete.sum() == COUNT - 2  # AutoAttack's were given up
    again = table[given_up & ~(table.stage == "autoattack")]
    assert again.stage.fillna("").str.startswith(("restart", "closing")).sum() + again.stage.isna().sum() == len(again)
    assert (again.backwards[again.stage.isna()] == table.backwards[table.complete & table.stage.isna()].max()).all()
    (open_,) = verdicts.verdicts(summary.load(found))
    robust = int(table.stage.isna().sum())
    assert open_.sample == verdicts.Sample(robust - int(first.stage.isna().sum()), 10, 0, COUNT)
    assert (open_.reopened, open_.given_up, open_.robust) == (2, 0, robust)
    assert "after 2 of a first sample, which reopened" in open_.line


def test_where_nobody_was_given_up_the_sample_is_of_the_robust(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretended(monkeypatch, 1)
    found = run(audit=5, attacks="verdict:population=false")
    assert [cell.phase for cell in found.cells[4:]] == ["audit", "reopen", "audit again"]
    (open_,) = verdicts.verdicts(summary.load(found))
    assert open_.sample == verdicts.Sample(open_.robust + 1, 5, 1, COUNT)
    assert len(asked) == 1


def test_an_audit_by_autoattack_itself() -> None:
    table = run(audit=2, count=60, shard=60).table()
    own = table[table.audit == 1]
    assert len(own) == 2
    assert own.audit_passes.min() > 2 * 100 if own.stage.isna().all() else True
    assert table.success.eq(table.stage.notna()).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attacks": "pgd", "audit": 5}, "audit=5 is of what a verdict gave up; add the attack verdict"),
        ({"targeted": True, "audit": 5}, "audit=5 runs AutoAttack, which is untargeted here; leave it out"),
        ({"audit": 0}, "audit"),
        ({"limits": "none.csv"}, "limits=none.csv cannot be read"),
        ({"limits": "short.csv"}, "limits=short.csv: no column proven, broken; it needs example, eps, proven, broken"),
        ({"limits": "both.csv"}, "limits=both.csv, line 2: both proven and broken; leave out one of them"),
        ({"limits": "same.csv"}, "example 0 is proven at 0.3 in line 2 and broken at 0.3 in line 3; leave out one"),
        ({"limits": "apart.csv"}, "example 400 is proven at 0.5 in line 5 and broken at 0.2 in line 2; leave out one"),
        ({"limits": "words.csv"}, "limits=words.csv, line 3: "),
        ({"limits": "below.csv"}, "limits=below.csv, line 3: .* is no limit; write a whole number from 0"),
        ({"limits": "far.csv"}, "is about none of the images 0 to 299; name another file"),
        ({"limits": "far.csv", "models": ["evaluate_models:rough", "evaluate_models:linear"]}, "are of one model"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    Path("short.csv").write_text("example,eps\n1,0.1\n")
    header = "example,eps,proven,broken\n"
    Path("both.csv").write_text(f"{header}1,0.1,1,1\n")
    Path("same.csv").write_text(f"{header}0,0.3,1,0\n0,0.3,0,1\n")
    Path("apart.csv").write_text(f"{header}400,0.2,0,1\n1,0.1,1,0\n400,0.1,1,0\n400,0.5,1,0\n400,0.3,1,0\n")
    Path("below.csv").write_text(f"{header}0,0.3,1,0\n-1,0.1,1,0\n")
    Path("words.csv").write_text(f"{header}1,8/255,1,0\n2,0.1,yes,no\n")
    Path("far.csv").write_text(f"{header}300,0.1,1,0\n")
    with pytest.raises(ValueError, match=message):
        run(**given)
    assert not Path("run").exists()


def test_limits() -> None:
    """Distances are counted example by example; what is proven at a larger radius is proven at a smaller one."""
    table = run(skip=7).table()
    robust, fallen = (table.example[table.success == hit].tolist() for hit in (False, True))
    lines = [
        *((i, "0.03", 1, 0) for i in robust[:5]), *((i, f"{EPS}", 1, 0) for i in robust[5:9]),
        *((i, "0.01", 1, 0) for i in robust[9:12]), *((i, "0.01", 0, 1) for i in robust[12:14]),
        *((i, "0.03", 0, 1) for i in robust[14:15]), (robust[20], f"{EPS}", 0, 0),
    ]  # fmt: skip
    write(lines)
    found = run(skip=7, limits="limits.csv")
    loaded = summary.load(found)
    assert not verdicts.errors(loaded, found.facts)
    line = verdicts.notes(loaded, found.facts)[-1]
    total = COUNT - 7
    assert f"of {total} examples 9 are proven robust ({900 / total:.2f} %), others broke 2" in line
    assert f"here {len(robust)} are robust" in line
    assert f": {len(robust) - 9} above what is proven, 2 that others broke missed, {len(fallen)} broken that" in line
    Path("limits.csv").unlink()
    wrong = [i for i in fallen if table.clean_label[i] == table.label[i]][:2]
    write([*lines, *((i, f"{EPS}", 1, 0) for i in wrong)])
    said = CliRunner(env={"COLUMNS": "400"}).invoke(
        app, ["evaluate", "--trust-code", "--out", "run", "--limits", "limits.csv"]
    )
    assert said.exit_code == 0
    named = f"{wrong[0]}, {wrong[1]}"
    assert (
        f"error: verdict on evaluate_models:rough breaks examples that are proven robust at radius {EPS}: {named};"
        in said.stdout
    )
    write_report(read(Path("run")), Path("page"))
    for name in ("report.md", "report.html"):
        text = Path("page", name).read_text().replace("\\", "")
        assert f"proven robust at radius {EPS}: {named};" in text
        assert "2 that others broke missed" in text


def test_limits_of_an_image_at_several_radii() -> None:
    write([(0, "0.01", 1, 0), (0, "0.02", 1, 0), (0, "0.03", 0, 1), (0, "0.04", 0, 1)])
    found = limits.read("limits.csv", skip=7, count=1)
    assert [(found.proven(eps), found.broken(eps)) for eps in (0.02, 0.025, 0.03)] == [([0], []), ([], []), ([], [0])]


def write(lines: Sequence[tuple[int, str, int, int]]) -> None:
    """The limits, of images in the data, of which the run leaves out the first 7."""
    text = "".join(f"{i + 7},{eps},{proven},{broken}\n" for i, eps, proven, broken in lines)
    Path("limits.csv").write_text(f"example,eps,proven,broken\n{text}")
