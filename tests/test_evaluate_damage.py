"""Files of a run that are damaged, left behind, or cannot be written: each is named, and mended by the next call."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import evaluate_models
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import store as stores
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.seals import BLANK, MARK, seal, sealed
from firstorder.evaluation.runs.store import Run, read
from firstorder.files import clear, replacing

CALL = ("--model", "evaluate_models:linear", "--data", "images.npz", "--eps", "0.1", "--shard", "4", "--pictures", "2")
ATTACKS = ("--attack", "fgsm", "--attack", "pgd:steps=3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", **evaluate_models.arrays(12, marked=(5,)))
    monkeypatch.setenv(evaluate_models.MARKER, str(tmp_path / "marker"))
    work._worker.cache_clear()
    return tmp_path


def evaluate(*words: str, code: int = 0) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", "--trust-code", *words, "--out", "run", "-q"])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def rows(run: Run) -> pd.DataFrame:
    return run.table().drop(columns="seconds")


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, other: Path) -> None:
    """A bit of every kind of byte: the beginning, the rows, the notes of the file, the end."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def swapped(path: Path, other: Path) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, swapped])
def test_cells_are_computed_anew(here: Path, damage: Callable[[Path, Path], None]) -> None:
    evaluate(*CALL, *ATTACKS)
    run = read(Path("run"))
    whole, paths = rows(run), [run.store.path(cell.key) for cell in run.cells]
    damage(paths[1], paths[4])
    found = 2 if damage is swapped else 1
    assert len(run.damaged()) == found
    assert len(run.done()) == len(run.cells) - found
    assert len(rows(run)) == len(whole) - 4 * found  # what is there is right
    kept = {path: path.stat().st_mtime_ns for path in paths if path not in (paths[1], paths[4])}
    report = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", "run"])
    assert report.output.count("evaluate --out run computes it anew") == found
    said = evaluate()
    assert said.count("it is computed anew") == found
    cell = run.cells[1]
    where = f"({cell.attack} on {cell.model}, examples {cell.start} to {cell.stop - 1})"
    assert f"damaged: cells/{cell.key}.parquet {where}; it is computed anew" in said
    pd.testing.assert_frame_equal(rows(read(Path("run"))), whole, check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "damaged" not in evaluate()


def test_every_bit_of_a_cell_counts(here: Path) -> None:
    evaluate(*CALL, "--attack", "fgsm", "--count", "4")
    (path,) = Path("run/cells").iterdir()
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert not sealed(path, path.stem), at
    path.write_bytes(content)
    assert sealed(path, path.stem)
    assert not sealed(path, "another")


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, swapped, lambda path, other: path.unlink()])
@pytest.mark.parametrize("kind", ["x.npy", "y.npy"])
def test_data_are_written_anew(here: Path, damage: Callable[[Path, Path], None], kind: str) -> None:
    evaluate(*CALL, *ATTACKS)
    (path,) = Path("run/data").glob(f"*-{kind}")
    (other,) = set(Path("run/data").glob("*.npy")) - {path}
    whole = path.read_bytes(), other.read_bytes()
    damage(path, other)
    said = evaluate("--attack", "mi-fgsm:steps=2")
    assert "damaged: the examples in data/; they are written anew" in said
    assert (path.read_bytes(), other.read_bytes()) == whole
    assert len(read(Path("run")).done()) == 9


def test_data_that_are_damaged_are_named_where_they_are_read(here: Path) -> None:
    evaluate(*CALL, *ATTACKS)
    (path,) = Path("run/data").glob("*-x.npy")
    truncated(path, path)
    with pytest.raises(ValueError, match=r"x\.npy is damaged; firstorder evaluate --out run mends it"):
        read(Path("run")).examples(0, 12)


def test_what_a_model_was_is_written_anew(here: Path) -> None:
    evaluate(*CALL, *ATTACKS)
    (path,) = Path("run/models").iterdir()
    whole = path.read_bytes()
    flipped(path, path)
    said = evaluate("--attack", "mi-fgsm:steps=2")
    assert f"damaged: models/{path.name} (evaluate_models:linear); it is written anew" in said
    assert len(read(Path("run")).done()) == 9
    assert len(path.read_bytes()) == len(whole)


def test_a_record_of_a_failure_that_is_damaged(here: Path) -> None:
    words = (*CALL, "--model", "evaluate_models:raises_on_marked", "--attack", "fgsm")
    evaluate(*words, code=1)
    (path,) = (path for path in Path("run/failures").iterdir() if not path.stem.startswith("diagnosis-"))
    path.write_bytes(path.read_bytes()[:20])
    (failure,) = read(Path("run")).failures()
    assert failure.error == "it is not known why: the record is damaged"
    Path("marker").touch()
    evaluate()
    assert not read(Path("run")).failures()


WRITER = """
import sys, time
from pathlib import Path
from firstorder.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(600)
"""


def test_what_a_kill_leaves_is_removed_and_what_is_in_use_stays(here: Path) -> None:
    evaluate(*CALL, *ATTACKS)
    target = Path("run/cells/abc.parquet").resolve()
    child = subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    assert left.name.startswith(".abc-")
    evaluate()
    assert left.exists()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    evaluate()
    assert not left.exists()
    assert not list(Path("run").rglob(".*"))
    hidden = Path("run/cells/.keep-this")
    hidden.touch()
    with replacing(Path("run/cells/mine.parquet")) as own:
        own.write_text("x")
        clear(own.parent)
        assert own.exists()
    assert hidden.exists()


def test_a_full_disk_is_a_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **words: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stores.pq, "write_table", full)
    monkeypatch.setattr(stores, "write_text", lambda path, text: full() if path.parent.name == "failures" else None)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", *CALL, "--attack", "fgsm", "--out", "run"])
    assert "Traceback" not in done.output
    failed = [line for line in done.output.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    assert failed[0].endswith("OSError: [Errno 28] No space left on device (not recorded: No space left on device)")
    monkeypatch.setattr(stores, "write_text", full)
    done = CliRunner().invoke(app, ["evaluate", *CALL, "--attack", "fgsm", "--out", "other"])
    assert done.exit_code == 2
    assert "other cannot be written to (No space left on device)" in " ".join(done.output.split())


@pytest.mark.parametrize("text", ['{"cells": []}', '{"cells": [], "specification": "x"}', '{"format": 4, "cells": []}'])
def test_facts_without_a_specification(here: Path, text: str) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text(text)
    for words in (("report", "run"), ("transfer", "--out", "run")):
        done = CliRunner().invoke(app, list(words))
        assert (done.exit_code, "is not the description of a run" in done.stderr) == (2, True)


def test_seals(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert not sealed(path, "x")
    path.write_bytes(MARK + BLANK + b" ... " + MARK + BLANK + b"end")
    assert not sealed(path, "x")
    seal(path, "x")
    assert sealed(path, "x")
    assert path.read_bytes().startswith(MARK + BLANK)
    path.write_bytes(path.read_bytes() + b"\0")
    assert not sealed(path, "x")
