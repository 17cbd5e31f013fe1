"""The comparison with other packages: who takes part, what is measured of them, and the files."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firstorder.evaluation.bench import comparison, contenders, report, worker
from firstorder.evaluation.bench.comparison import Steps, Verdict, Verdicts
from firstorder.evaluation.bench.pairs import Cost
from firstorder.evaluation.bench.scenes import ART, FOOLBOX, SCENES, TORCHATTACKS, Case, Scene, Setting, quick
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import memory

TINY = Scene(
    name="mnist-cnn",
    step=Setting(eps=76.5, alpha=10, steps=2, images=4),
    verdicts=(Setting(eps=102, alpha=12, steps=6, images=12, rivals=(TORCHATTACKS,)),),
)
CASE = TINY.case(TINY.verdicts[0])


# --- memory


def test_the_peak_does_not_fall() -> None:
    block = np.ones(2**24)
    grown = memory.resident()
    assert grown > block.nbytes
    del block
    assert memory.resident() > 0.95 * grown


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [OSError(), TypeError(), AttributeError("mallopt")])
def test_no_glibc(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", Failing(error))
    assert memory.keep_memory() is False


def test_the_allocator_gets_three_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[int, int] = {}

    class Library:
        def mallopt(self, what: int, value: int) -> int:
            options[what] = value
            return int(accepted)

    accepted = True
    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    assert memory.keep_memory() is True
    assert set(options) == {-1, -2, -3}
    assert all(2**28 <= value < 2**31 for value in options.values())
    accepted = False
    assert memory.keep_memory() is False


# --- processes


def holding(count: int) -> Any:
    block = np.ones(count)
    return lambda: float(block.sum())


@pytest.fixture(autouse=True)
def _few_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IMPORTS", ("torch",))


def identified() -> Any:
    return os.getpid


def failing(when: str) -> Any:
    if when == "build":
        raise ValueError("cannot be built")
    return partial(divmod, 1, 0)


def test_a_process_of_its_own() -> None:
    with worker.Worker(identified, threads=1) as one, worker.Worker(partial(holding, 2**22), threads=1) as two:
        assert one.run() == one.run() != os.getpid()
        assert two.run() == 2**22
        assert 0.9 * 2**25 < two.peak() < 2**27
        assert one.peak() < 2**23


@pytest.mark.parametrize(("when", "message"), [("build", "ValueError: cannot be built"), ("run", "ZeroDivisionError")])
def test_what_fails_there_is_reported_here(when: str, message: str) -> None:
    def go() -> None:
        with worker.Worker(partial(failing, when), threads=1) as one:
            one.run()

    with pytest.raises(RuntimeError, match=message):
        go()


# --- contenders


@pytest.mark.parametrize("name", contenders.STEPS)
def test_every_contender_takes_its_steps(name: str) -> None:
    if contenders.missing(name) is not None:
        pytest.skip(f"compares with {name}, which is not installed")
    counts = []
    for steps in (2, 5):
        case = CASE._replace(steps=steps)
        forwards = [0]
        run = contenders.STEPS[name](case)
        backward = torch.autograd.grad, torch.Tensor.backward

        def counted(original: Any, *arguments: Any, forwards: list[int] = forwards, **options: Any) -> Any:
            forwards[0] += 1
            return original(*arguments, **options)

        torch.autograd.grad = partial(counted, backward[0])
        torch.Tensor.backward = lambda self, *a, **k: counted(backward[1], self, *a, **k)  # noqa: B023
        try:
            run()
        finally:
            torch.autograd.grad, torch.Tensor.backward = backward
        counts.append(forwards[0])
    assert counts == [2, 5]


def test_the_weight_of_a_contender_that_is_not_there() -> None:
    assert contenders.missing("firstorder PGD") is None
    assert contenders.missing(TORCHATTACKS) is None
    assert contenders.NEEDS[contenders.ADV_LIB] == "adv_lib"
    assert set(contenders.NEEDS) & set(contenders.STEPS) == {TORCHATTACKS, ART, FOOLBOX, contenders.ADV_LIB}


@pytest.mark.parametrize("name", contenders.VERDICTS)
def test_every_verdict_is_true(name: str) -> None:
    if contenders.missing(name) is not None:
        pytest.skip(f"compares with {name}, which is not installed")
    found = contenders.VERDICTS[name](CASE)
    adversarial = torch.from_numpy(found.adversarial)
    true = contenders.verified(CASE, adversarial).numpy()
    assert found.broken.dtype == bool
    assert 0 < found.broken.sum() < 12
    assert np.array_equal(found.broken & true, found.broken)
    assert 1 <= found.gradients <= 6
    assert (found.gradients < 6) == name.startswith("firstorder")


def test_what_is_verified() -> None:
    class Bright(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    x = torch.full((4, 1, 2, 2), 0.45)
    case = Case(Bright(), x, torch.zeros(4, dtype=torch.long), 0.1, 0.1, 1)
    adversarial = torch.stack([x[0], x[1] + 0.08, x[2] + 0.2, x[3] + 0.08])
    adversarial[3, 0, 0, 0] = -0.01
    assert contenders.verified(case, adversarial).tolist() == [False, True, False, False]


# --- the comparison


def test_who_takes_part() -> None:
    setting = TINY.verdicts[0]
    names = comparison.entered(setting, everything=False)
    assert names == [contenders.PLAIN, contenders.PREPARED, contenders.PATIENT, TORCHATTACKS]
    everyone = comparison.entered(setting, everything=True)
    assert set(names) < set(everyone) <= set(contenders.VERDICTS)
    for scene in SCENES:
        assert all(TORCHATTACKS in each.rivals for each in scene.verdicts), "the unit of speed"
        assert all(set(each.rivals) <= set(contenders.VERDICTS) for each in scene.verdicts)


class Inline:
    """In place of a process: the contender itself, which takes as long as its name says."""

    def __init__(self, build: Any, *, threads: int) -> None:
        self.name, self.build = build.args[-1], build

    def __enter__(self) -> Inline:
        self.contender = self.build()
        return self

    def __exit__(self, *_: object) -> None:
        return

    def run(self) -> Any:
        CLOCK[0] += SECONDS.get(self.name, 1.0)
        return self.contender()

    def peak(self) -> float:
        return 10.0 if self.name in (TORCHATTACKS, contenders.BARE) else 25.0


SECONDS = {TORCHATTACKS: 4.0, contenders.BARE: 2.0}
CLOCK = [0.0]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "Worker", Inline)
    monkeypatch.setattr(time, "perf_counter", lambda: CLOCK[0])


@pytest.mark.usefixtures("inline")
def test_speed_is_counted_in_runs_of_torchattacks() -> None:
    seen: list[str] = []
    found = comparison.verdicts(TINY, TINY.verdicts[0], rounds=2, threads=1, everything=False, progress=seen.append)
    rows = {row.name: row for row in found.rows}
    assert sorted(seen) == sorted([*rows] * 2)
    assert rows[TORCHATTACKS].speed == rows[TORCHATTACKS].memory == 1.0
    assert rows[contenders.PLAIN].speed == 4.0
    assert rows[contenders.PLAIN].memory == 2.5
    assert all(row.verified == 1.0 for row in found.rows)
    assert found.differing == 0.0
    assert rows[contenders.PLAIN].robust == rows[contenders.PREPARED].robust
    assert rows[contenders.PATIENT].robust >= rows[contenders.PREPARED].robust


@pytest.mark.usefixtures("inline")
def test_steps_are_counted_in_bare_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "STEPS", {n: contenders.STEPS[n] for n in (contenders.BARE, contenders.PLAIN)})
    found = comparison.steps(TINY, rounds=2, threads=1, progress=lambda name: None)
    costs = {cost.name: cost for cost in found.costs}
    assert costs[contenders.BARE].median == 1.0
    assert costs[contenders.PLAIN].median == 0.5
    assert found.memory == {contenders.BARE: 1.0, contenders.PLAIN: 2.5}


def test_false_claims_are_counted() -> None:
    broken = np.array([True, True] + [False] * 10)
    unchanged = contenders.Found(broken, CASE.x.numpy(), 1.0)
    assert comparison._verified(CASE, unchanged) == 0.0
    assert comparison._verified(CASE, unchanged._replace(broken=np.zeros(12, dtype=bool))) == 1.0


def test_quick() -> None:
    small = quick(SCENES[1])
    assert small.name == SCENES[1].name
    assert [each.images for each in small.verdicts] == [10, 10]
    assert [each.steps for each in small.verdicts] == [10, 10]
    assert small.step.images >= 2 <= small.step.steps


def test_enlarged_images_have_the_models_own_labels() -> None:
    scene = SCENES[2]
    case = scene.case(Setting(eps=1, alpha=1, steps=1, images=2))
    assert case.x.shape == (2, 3, 224, 224)
    assert case.x.min() >= 0
    assert case.x.max() <= 1
    with torch.no_grad():
        assert torch.equal(case.module(case.x).argmax(1), case.y)


# --- files

FOUND = report.Comparison(
    steps=[
        Steps(
            scene=TINY,
            costs=[Cost(name="bare step", median=1.0, low=0.9, high=1.1), Cost(name="b", median=0.75, low=0.7, high=2)],
            memory={"bare step": 1.0, "b": 1.5},
        )
    ],
    verdicts=[
        Verdicts(
            scene=TINY,
            setting=TINY.verdicts[0],
            rows=[
                Verdict(name="a", speed=12.34, robust=0.5, gradients=math.nan, verified=1.0, memory=2.0),
                Verdict(name=TORCHATTACKS, speed=1.0, robust=0.75, gradients=6.0, verified=0.99, memory=1.0),
            ],
            differing=0.01,
        )
    ],
    threads=2,
    step_rounds=5,
    verdict_rounds=1,
)


def test_files(tmp_path: Path) -> None:
    paths = report.write(FOUND, tmp_path / "out")
    assert sorted(path.name for path in paths) == [
        "bench.html",
        "bench.md",
        "bench.png",
        "results.json",
        "steps.csv",
        "verdicts.csv",
    ]
    page = (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")
    assert "| b | 0.75 | 0.70-2.00 | 1.50 |" in page
    assert "| a | 12.3 | 50.0 % |  | 100 % | 2.00 |" in page
    assert "differ on 1.0 %" in page
    assert "one round" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["verdicts"][0]["rows"][0]["gradients"] is None
    assert results["verdicts"][0]["setting"]["eps"] == 102
    assert results["steps"][0]["costs"][1]["median"] == 0.75
    assert results["threads"] == 2
    with (tmp_path / "out" / "verdicts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], float(row["speed"]), float(row["robust"])) for row in rows] == [
        ("a", 12.34, 0.5),
        (TORCHATTACKS, 1.0, 0.75),
    ]
    with (tmp_path / "out" / "steps.csv").open(encoding="utf-8") as file:
        (first, second) = csv.DictReader(file)
    assert (first["model"], second["contender"], second["memory"]) == ("mnist-cnn", "b", "1.5")
    assert (tmp_path / "out" / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_only_what_was_measured_is_in_the_files(tmp_path: Path) -> None:
    from dataclasses import replace

    for part in (replace(FOUND, steps=[]), replace(FOUND, verdicts=[])):
        (sheet,) = report.sheets(part)
        assert len(sheet.rows) == 2
        assert all(len(row) == len(sheet.headings) for row in sheet.rows)
        report.write(part, tmp_path)


# --- the command


@pytest.mark.usefixtures("inline")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstorder.evaluation.commands.bench.SCENES", (TINY,))
    out = tmp_path / "out"
    done = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["bench", "--rounds", "1", "--threads", "1", "--measure", "verdict", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "to verdict, mnist-cnn" in done.output
    assert contenders.PATIENT in done.output
    assert (out / "bench.png").exists()


def test_a_family_as_before() -> None:
    words = ["--family", "prepared", "--batch-size", "4", "--steps", "1", "--rounds", "1"]
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["bench", *words, "--model", "mnist-cnn", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "firstorder PGD, prepared" in done.output
    assert "median of 1" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet"], "model='resnet' is not part of the comparison"),
        (["--measure", "memory"], "measure='memory'"),
        (["--family", "bounded", "--model", "a", "--model", "b"], "takes one --model, not a, b"),
        (["--family", "bounded", "--model", "resnet"], "model='resnet' is not part of the comparison"),
    ],
)
def test_one_line_for_a_mistake(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", *words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
