"""`make test` leaves out what is marked long and keeps a sample of it; `make test-long` runs everything, in parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import parts
from samples import require_samples, sampled

ROOT = Path(__file__).parent.parent

SETTINGS = """
[pytest]
markers = long: as in pyproject.toml
addopts = -q --strict-markers -m "not long"
"""

FIRST = """
import pathlib, pytest
@pytest.mark.parametrize("row", [0, pytest.param(1, marks=pytest.mark.long)])
def test_rows(row):
    with open("ran", "a") as file:
        file.write(f"first {row}\\n")
"""

SECOND = """
import pathlib
def test_other():
    with open("ran", "a") as file:
        file.write("second\\n")
    assert pathlib.Path("tests/mended").exists()
"""

WAIT = """    while not pathlib.Path("mended").exists():
        pass
    assert"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "tests" / "test_first.py").write_text(FIRST)
    (tmp_path / "tests" / "test_second.py").write_text(SECOND)
    return tmp_path


def ran(project: Path) -> list[str]:
    path = project / "ran"
    lines = sorted(path.read_text().splitlines()) if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_what_failed_runs_again_and_what_passed_does_not(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "state", lambda root: "the same")
    assert parts.main(project) == 1
    assert ran(project) == ["first 0", "first 1", "second"]
    text = capsys.readouterr().out
    assert "FAILED test_second.py" in text
    assert "assert False" in text, "what a failed part wrote is shown"
    assert set(json.loads((project / parts.NOTES).read_text())["passed"]) == {"test_first.py"}
    (project / "tests" / "mended").touch()
    assert parts.main(project) == 0
    assert ran(project) == ["second"]
    assert "2 parts, 1 passed before" in capsys.readouterr().out
    assert parts.main(project) == 0
    assert ran(project) == []


def test_another_state_begins_anew(project: Path) -> None:
    (project / "tests" / "mended").touch()
    assert parts.main(project) == 0
    assert ran(project) == ["first 0", "first 1", "second"]
    assert parts.main(project) == 0
    assert ran(project) == []
    (project / "plugins").mkdir()
    (project / "plugins" / "changed.py").touch()
    assert parts.main(project) == 0
    assert ran(project) == ["first 0", "first 1", "second"]


def test_a_state_is_of_the_sources_and_the_settings(project: Path) -> None:
    before = parts.state(project)
    assert parts.state(project) == before
    (project / "tests" / "__pycache__").mkdir()
    (project / "tests" / "__pycache__" / "x.pyc").touch()
    assert parts.state(project) == before
    (project / "plugins").mkdir()
    (project / "plugins" / "a.py").touch()
    changed = parts.state(project)
    assert changed != before
    (project / "pytest.ini").write_text("[pytest]\n")
    assert parts.state(project) != changed


def test_an_interrupted_call_goes_on(project: Path) -> None:
    """Stopped while the second part runs, which waits for a file that is never there."""
    (project / "tests" / "parts.py").write_bytes(Path(parts.__file__).read_bytes())
    (project / "tests" / "test_second.py").write_text(
        SECOND.replace("    assert", "    while not pathlib.Path('mended').exists(): pass\n    assert")
    )
    child = subprocess.Popen(
        [sys.executable, "tests/parts.py"],
        cwd=project,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )
    while not (project / parts.NOTES).exists():
        assert child.poll() is None
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert text.endswith("stopped; call again to go on\n")
    assert set(json.loads((project / parts.NOTES).read_text())["passed"]) == {"test_first.py"}


def test_a_long_test_without_a_sample_is_refused() -> None:
    def item(name: str, long: bool) -> Any:
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda marker: marker if long else None)

    rows = [item("a.py::test_a[0]", False), item("a.py::test_a[1]", True), item("a.py::test_b", False)]
    require_samples(["tests"], rows)
    with pytest.raises(pytest.UsageError, match=r"leave some to `make test`: a\.py::test_a$"):
        require_samples(["tests"], rows[1:])
    require_samples(["a.py::test_a[1]"], rows[1:])


def test_a_sample_has_every_group() -> None:
    rows = sampled([("a", 0), ("a", 1), ("b", 0), ("a", 2), ("b", 1), ("b", 2)], 2, lambda row: row[0])
    assert [row.values for row in rows if not row.marks] == [("a", 0), ("b", 0), ("a", 2), ("b", 2)]


def test_make_calls_it() -> None:
    done = subprocess.run(["make", "--dry-run", "test-long"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tests/parts.py" in done.stdout
