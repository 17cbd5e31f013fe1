"""Curves from minimum-norm attacks: the command, its tables and its picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from firstorder.attacks import ANU
from firstorder.evaluation import evaluate
from firstorder.evaluation.bench.pairs import per_step
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import packaged
from firstorder.evaluation.reporting.curve import Norms, norms, radii
from firstorder.evaluation.runs.store import Run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_accuracy_at_every_radius() -> None:
    run = Norms(model="m", attack="ddn", steps=10, norm=np.array([0.0, 0.5, 1.5, math.inf]))
    assert [run.accuracy(eps) for eps in (0.0, 0.4, 0.5, 2.0)] == [0.75, 0.75, 0.5, 0.25]
    assert run.success() == 0.75
    assert run.mean() == pytest.approx(2 / 3)
    assert run.median() == 1.0
    weaker = Norms(model="m", attack="ddn", steps=5, norm=np.array([9.0, math.inf]))
    assert radii([run, weaker])[-1] == 1.5
    assert radii([Norms(model="m", attack="ddn", steps=5, norm=np.array([math.inf]))]) == [0.0]


def run(**given: Any) -> Run:
    usual = {"models": "mnist-cnn", "data": "mnist", "count": 6, "norm": "L2", "attacks": "anu", "steps": 20}
    return evaluate({**usual, "prepare": False, "pictures": 0, "batch_size": 4, "shard": 4, **given}).run


def test_norms_are_the_attacks() -> None:
    model, images = packaged.mnist_cnn(), packaged.mnist()
    x, y = images.x[:6], images.y[:6]
    (found,) = norms(run())
    assert (found.model, found.attack, found.steps) == ("mnist-cnn", "anu", 20)
    attack = ANU(steps=20, preset="mnist")
    expected = attack.run(model, x, y).norm.numpy()
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(found.norm, expected, rtol=1e-4, atol=1e-4)


def test_targeted_norms_lead_to_the_class_that_is_wanted() -> None:
    model, images = packaged.mnist_cnn(), packaged.mnist()
    x, y = images.x[:6], images.y[:6]
    done = run(targeted=True, steps=60)
    table = done.table()
    wanted = torch.from_numpy(table["wanted"].to_numpy().copy())
    assert ((wanted != y) & (wanted >= 0) & (wanted < 10)).all()
    shift = torch.randint(1, 10, (6,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(wanted, (y + shift) % 10)
    (found,) = norms(done)
    expected = ANU(steps=60, preset="mnist").run(model, x, wanted, targeted=True).norm.numpy()
    np.testing.assert_allclose(found.norm, expected, rtol=1e-4, atol=1e-4)
    assert table["success"].any()
    assert (table["success"] == (table["adversarial_label"] == table["wanted"])).all()


def test_targets_reach_every_other_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "zeros.npz", x=packaged.mnist().x[:200].numpy(), y=np.zeros(200, np.int64))
    words = {"attacks": "fgsm", "eps": 0.1, "norm": "Linf", "steps": [], "count": 200, "shard": 70}
    table = run(data=str(tmp_path / "zeros.npz"), targeted=True, **words).table()
    assert set(table["wanted"]) == set(range(1, 10))


def test_attacks_that_aim_at_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="'apgd-ce' is untargeted here; leave it out, or leave out targeted"):
        run(attacks="apgd-ce", eps=0.1, targeted=True, steps=[])


def test_the_command(tmp_path: Path) -> None:
    words = ["curve", "--model", "mnist-cnn", "--count", "5", "--out", str(tmp_path)]
    words += ["--steps", "80", "--steps", "30", "--attack", "ddn", "--attack", "anu", "--attack", "anu:annealed=false"]
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "anu:annealed=false" in done.output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary, curve, single = (rows(tmp_path / f"{name}.csv") for name in ("summary", "curve", "norms"))
    assert [(row["attack"], row["steps"]) for row in summary] == [
        (attack, steps) for attack in ("ddn", "anu", "anu:annealed=false") for steps in ("30", "80")
    ]
    assert len(single) == 3 * 2 * 5
    for row in summary:
        key = (row["attack"], row["steps"])
        found = [float(r["norm"]) for r in single if (r["attack"], r["steps"]) == key]
        broken = [value for value in found if math.isfinite(value)]
        assert float(row["success"]) == pytest.approx(len(broken) / 5)
        assert broken or row["steps"] == "30"
        if broken:
            assert float(row["mean_norm"]) == pytest.approx(sum(broken) / len(broken), rel=1e-4)
        for point in (p for p in curve if (p["attack"], p["steps"]) == key):
            low, high = (sum(v > float(point["eps"]) * slack for v in found) / 5 for slack in (1 + 1e-5, 1 - 1e-5))
            assert low - 1e-6 <= float(point["robust_accuracy"]) <= high + 1e-6
    for key in {(p["attack"], p["steps"]) for p in curve}:
        values = [float(p["robust_accuracy"]) for p in curve if (p["attack"], p["steps"]) == key]
        assert values == sorted(values, reverse=True)


def test_all_targets_of_every_image(tmp_path: Path) -> None:
    words = [
        "curve",
        "--model",
        "mnist-cnn-natural",
        "--count",
        "3",
        "--all-targets",
        "--steps",
        "20",
        "--attack",
        "ddn",
    ]
    done = CliRunner(env={"COLUMNS": "140"}).invoke(app, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "towards every class" in done.output
    (row,) = rows(tmp_path / "summary.csv")
    assert row["examples"] == "30"  # three images of others for each of ten classes
    assert float(row["seconds"]) > 0
    single = [float(one["norm"]) for one in rows(tmp_path / "norms.csv")]
    broken = [norm for norm in single if math.isfinite(norm)]
    assert len(single) == 30
    assert float(row["mean_norm"]) == pytest.approx(sum(broken) / len(broken), rel=1e-4)
    assert len(list(tmp_path.glob("toward-*"))) == 10
    both = CliRunner().invoke(app, [*words, "--targeted", "--out", str(tmp_path)])
    assert "two goals; leave out one of them" in both.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "pgd"], "pgd stays within a given ball"),
        (["--attack", "anv"], "unknown attack 'anv'"),
        (["--attack", "anu:levels=abc"], "levels=abc is not JSON"),
        (["--attack", "anu:preset=mnist"], "in quotes"),
        (["--attack", 'anu:annealed="no"'], "must be a bool"),
        (["--attack", "anu:b=3"], "no parameter 'b'"),
        (["--attack", "anu:gamma=2"], "gamma=2"),
        (["--model", "resnet"], "unknown model 'resnet'; name one of"),
        (["--model", "fashion-cnn"], "fashion-cnn brings no images; name some with --data"),
        (["--skip", "500"], "has no image after the first 500"),
    ],
)
def test_one_line_for_a_mistake(words: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["curve", *words, "--out", str(out)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_the_benchmark_of_the_minimum_norm_attacks() -> None:
    images = packaged.mnist()
    x, y = images.x[:4], images.y[:4]
    costs = per_step(packaged.mnist_cnn(), x, y, family="minimum-norm", steps=3, rounds=1)
    assert {cost.name for cost in costs} >= {
        "bare step",
        "firstorder.torchattacks DDN",
        "firstorder.torchattacks ANU",
        "foolbox DDNAttack",
    }
    done = CliRunner().invoke(app, ["bench", "--family", "l0"])
    assert done.exit_code == 2
    assert "family='l0'" in done.stderr
