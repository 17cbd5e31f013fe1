"""Curves from minimum-norm attacks: the command, its tables and its picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from firstorder.attacks import ANU, DDN
from firstorder.evaluation.bench.pairs import per_step
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import packaged
from firstorder.evaluation.reporting.curve import Run, create, norms, radii, random_targets


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_accuracy_at_every_radius() -> None:
    run = Run(model="m", attack="ddn", steps=10, norm=torch.tensor([0.0, 0.5, 1.5, math.inf]))
    assert [run.accuracy(eps) for eps in (0.0, 0.4, 0.5, 2.0)] == [0.75, 0.75, 0.5, 0.25]
    assert run.success() == 0.75
    assert run.mean() == pytest.approx(2 / 3)
    assert run.median() == 1.0
    weaker = Run(model="m", attack="ddn", steps=5, norm=torch.tensor([9.0, math.inf]))
    assert radii([run, weaker])[-1] == 1.5
    assert radii([Run(model="m", attack="ddn", steps=5, norm=torch.tensor([math.inf]))]) == [0.0]


def test_norms_are_the_attacks(tmp_path: Path) -> None:
    model, images = packaged.mnist_cnn(), packaged.mnist()
    x, y = images.x[:6], images.y[:6]
    attack = ANU(steps=20, preset="mnist")
    found = norms(attack, model, x, y, batch_size=4)
    assert ((found > 0) & found.isfinite()).all()
    torch.testing.assert_close(found, attack.run(model, x, y).norm, rtol=1e-4, atol=1e-4)
    targets = random_targets(y, 10)
    assert (targets != y).all()
    torch.testing.assert_close(
        norms(attack, model, x, targets, targeted=True),
        attack.run(model, x, targets, targeted=True).norm,
    )


def test_targets_reach_every_other_class() -> None:
    y = torch.zeros(500, dtype=torch.long)
    assert set(random_targets(y, 10).tolist()) == set(range(1, 10))


def test_attacks_by_label() -> None:
    assert create("ddn", 7, "mnist") == DDN(steps=7)
    assert create("anu", 7, "mnist") == ANU(steps=7, preset="mnist")
    expected = ANU(steps=7, preset="imagenet", annealed=False, gamma=0.3)
    assert create('anu:annealed=false,gamma=0.3,preset="imagenet"', 7, "mnist") == expected


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
        (["--model", "resnet"], "no packaged model 'resnet'"),
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
