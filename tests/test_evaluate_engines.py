"""Engines of `firstorder evaluate`: processes that are killed, stopped, or two at once leave what one leaves."""

from __future__ import annotations

import os
import random
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import evaluate_models
from evaluate_models import MARKER, process
from firstorder.evaluation.runs import engines
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import Run, read

TESTS = str(Path(__file__).parent)
ATTACKS = ["fgsm", "pgd:random_start=true,steps=5", "mi-fgsm:steps=5", "daa-blob:steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a specification of 2 models x 4 attacks x 2 radii x 3 shards."""
    folder = tmp_path_factory.mktemp("runs")
    np.savez(folder / "images.npz", **evaluate_models.arrays(25, marked=(12,)))
    models = ["evaluate_models:slow", "evaluate_models:dies_on_marked"]
    (folder / "spec.yaml").write_text(
        yaml.safe_dump({"models": models, "data": "images.npz", "eps": [0.05, 0.1], "attacks": ATTACKS, "shard": 10})
    )
    (folder / "there").touch()
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> pd.DataFrame:
    """What one process finds that nothing happens to."""
    child = start(place, "whole")
    child.join()
    assert child.exitcode == 0, (place / "log").read_text()
    table = read(place / "whole").table()
    assert len(table) == 2 * 4 * 2 * 25
    assert table.success.any()
    assert not table.success.all()
    return table


def start(place: Path, out: str, *words: str, marker: str = "there") -> Any:
    path = os.pathsep.join(filter(None, (TESTS, os.environ.get("PYTHONPATH"))))
    environment = {MARKER: str(place / marker), "PYTHONPATH": path}
    child = process(place, "evaluate", "spec.yaml", "--trust-code", "--out", out, *words, **environment)
    child.start()
    return child


def cells(folder: Path) -> int:
    return len(list(folder.glob("cells/[!.]*.parquet")))


def reach(child: Any, folder: Path, count: int) -> None:
    """Wait until the folder holds so many cells."""
    while child.is_alive() and cells(folder) < count:
        time.sleep(0.001)


def equal(run: Run, whole: pd.DataFrame) -> None:
    assert len(run.done()) == len(run.cells) == 48
    assert not run.failures()
    pd.testing.assert_frame_equal(run.table().drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True)
    assert cells(run.store.folder) == 48


@pytest.mark.parametrize("moments", [2, pytest.param(11, marks=pytest.mark.long)])
def test_killed_at_some_moments_and_resumed(place: Path, whole: pd.DataFrame, moments: int) -> None:
    name = f"killed {moments} times"
    draws, out = random.Random(7), place / name
    for i in range(moments):
        child = start(place, name)
        before = cells(out)
        if i:
            reach(child, out, before + draws.randrange(1, 5))
        time.sleep(draws.uniform(0, 0.05 if i else 0.3))
        assert child.is_alive(), "it finished too early"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert i == 0 or before < cells(out) < 48
        if (out / "run.json").exists():
            done = read(out).table()  # what is there is whole
            assert len(done) == sum(cell.stop - cell.start for cell in read(out).done())
    child = start(place, name)
    child.join()
    assert child.exitcode == 0
    equal(read(out), whole)
    assert not list(out.rglob(".*"))


def test_two_processes_on_one_folder(place: Path, whole: pd.DataFrame) -> None:
    children = [start(place, "shared") for _ in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0], (place / "log").read_text()
    equal(read(place / "shared"), whole)
    left = [path.name for path in (place / "shared").rglob("*") if path.name.startswith(".")]
    assert not left


def test_stopped_by_the_keyboard(place: Path, whole: pd.DataFrame) -> None:
    log = place / "log"
    log.unlink(missing_ok=True)
    child = start(place, "a run")
    reach(child, place / "a run", 5)
    os.killpg(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 130
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("stopped; "))
    count = cells(place / "a run")
    assert 5 <= count < 48
    assert f"{count} of 48 cells are done and kept" in line
    assert "Traceback" not in log.read_text()
    words = shlex.split(line.partition("Go on with: ")[2])
    assert words == ["firstorder", "evaluate", "--out", "a run", "--trust-code"]
    again = process(place, *words[1:], **{MARKER: str(place / "there")})
    again.start()
    again.join()
    assert again.exitcode == 0
    equal(read(place / "a run"), whole)


def test_two_jobs_of_which_one_is_killed(place: Path, whole: pd.DataFrame) -> None:
    child = start(place, "jobs", "--jobs", "2", "--threads", "1", marker="joblib")
    child.join()
    assert child.exitcode == 0, (place / "log").read_text()
    assert (place / "joblib").exists(), "no worker died"
    equal(read(place / "jobs"), whole)


def test_ray_with_two_workers_of_which_one_is_killed(place: Path, whole: pd.DataFrame) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'firstorder-attacks[ray]'")
    child = start(place, "ray", "--engine", "ray", "--jobs", "2", "--threads", "1", marker="raylet")
    child.join()
    assert child.exitcode == 0, (place / "log").read_text()
    assert (place / "raylet").exists(), "no worker died"
    equal(read(place / "ray"), whole)


def some(count: int) -> list[Cell]:
    return [Cell(f"{i}", "model", "attack", 0.1, 0, i, i + 1) for i in range(count)]


@pytest.mark.parametrize("guilty", [3, pytest.param(0, marks=pytest.mark.long)])
def test_the_cell_that_kills_its_process_is_left_out_alone(tmp_path: Path, guilty: int) -> None:
    def work(cell: Cell) -> Any:
        """Takes long enough that others are under way when the guilty one dies."""
        with (tmp_path / cell.key).open("a") as file:
            file.write("x")
        time.sleep(0.05 if cell.start == guilty else 0.15)
        if cell.start == guilty:
            os.kill(os.getpid(), signal.SIGKILL)
        return SimpleNamespace(cell=cell, error=None)

    def fail(cell: Cell, error: str) -> Any:
        return SimpleNamespace(cell=cell, error=error)

    found = list(engines.local(some(7), work, fail, jobs=2, threads=1))  # type: ignore[arg-type]
    assert sorted(report.cell.start for report in found) == list(range(7))
    (failed,) = (report for report in found if report.error is not None)
    assert failed.cell.start == guilty
    assert "died 3 times" in str(failed.error)
    assert (tmp_path / f"{guilty}").read_text() == "x" * engines.DEATHS


def test_workers_that_are_killed_twice(tmp_path: Path) -> None:
    def work(cell: Cell) -> Any:
        marker = tmp_path / cell.key
        if cell.start in (2, 5) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return SimpleNamespace(cell=cell, error=None)

    found = list(engines.local(some(9), work, lambda cell, error: None, jobs=2, threads=1))  # type: ignore[arg-type]
    assert sorted(report.cell.start for report in found) == list(range(9))
    assert len(list(tmp_path.iterdir())) == 2


def test_jobs_share_the_cells_and_the_processor(tmp_path: Path) -> None:
    def work(cell: Cell) -> Any:
        time.sleep(0.05)
        return SimpleNamespace(cell=cell, error=None, pid=os.getpid(), threads=os.environ.get("OMP_NUM_THREADS"))

    found: list[Any] = list(engines.local(some(12), work, lambda cell, error: None, jobs=2, threads=1))  # type: ignore
    assert len({report.pid for report in found}) == 2
    assert os.getpid() not in {report.pid for report in found}
    assert {report.threads for report in found} == {"1"}
    alone: list[Any] = list(engines.local(some(3), work, lambda cell, error: None, jobs=1, threads=1))  # type: ignore
    assert {report.pid for report in alone} == {os.getpid()}
    assert [report.cell.start for report in alone] == [0, 1, 2]
