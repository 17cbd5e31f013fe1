"""The script of `make cuda`, as far as it needs no GPU: set-up, counting, and what is left when time is up."""

from __future__ import annotations

import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "cuda"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, whose name is not for keeping."""
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("all")
    for name in ("all", "metadata"):
        sys.modules.pop(name, None)


@pytest.fixture
def session(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "scratch").mkdir()
    return script.Session(tmp_path / "scratch", tmp_path / "out")


def summary(session: Any) -> str:
    return (session.out / "summary.md").read_text()


def test_set_up(session: Any) -> None:
    assert session.set_up("")
    assert re.search(r"[1-9]\d* attacks, [1-9]\d* rules, [1-9]\d* methods registered", summary(session))
    assert "torch " in (session.out / "setup.txt").read_text()
    names = (session.scratch / "metadata").glob("*.dist-info/entry_points.txt")
    assert "pqgd = firstorder.attacks.catalogue:PQGD" in next(names).read_text()


def test_an_empty_registry_fails(session: Any, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        script, "CHECK", f"import importlib.metadata as m; m.entry_points = lambda **_: ()\n{script.CHECK}"
    )
    assert not session.set_up("")
    assert session.failed
    assert "set-up: failed, the registry is empty or damaged" in summary(session)


def test_wheels_are_taken_where_nothing_is_installed(session: Any, tmp_path: Path) -> None:
    for name in ("strange_thing", "torch"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}/__init__.py", "raise SystemExit(7)")
    assert session.set_up(str(tmp_path))
    assert session.python("-c", "import strange_thing").returncode == 7
    assert session.python("-c", "import torch").returncode == 0, "what is installed stays"


@pytest.mark.parametrize(
    ("lines", "total"),
    [
        (["3 passed in 0.1s", "1 failed, 2 passed, 1 skipped in 3s"], {"failed": 1, "passed": 5, "skipped": 1}),
        (["1 error in 1s", "2 skipped in 0s"], {"errors": 1, "skipped": 2}),
        (["......", "no tests ran in 0.0s"], {}),
    ],
)
def test_counts(script: Any, lines: list[str], total: dict[str, int]) -> None:
    assert {word: n for word in script.COUNTED if (n := script.counted(lines, word))} == total


GOOD = "def test_good(): pass\n"
BAD = "def test_bad(): assert 1 == 2\n"
SLOW = "import time\ndef test_slow(): time.sleep(60)\n"


@pytest.mark.parametrize(
    ("source", "seconds", "code", "text"),
    [(GOOD, 60, 0, "1 passed"), (GOOD + BAD, 60, 1, "1 failed, 1 passed"), (BAD + SLOW, 12, 1, ", cut after 12 s")],
    ids=["good", "bad", "slow"],
)
def test_tests(session: Any, tmp_path: Path, source: str, seconds: float, code: int, text: str) -> None:
    """What failed is named, also where the time was up before the last test."""
    session.environment = dict(os.environ)
    file = tmp_path / "test_source.py"
    file.write_text(source)
    began = time.monotonic()
    found = session.pytest([file], seconds)
    assert time.monotonic() - began < 40
    assert found[0] == code
    assert text in found[1]
    assert ("test_bad" in (session.out / "tests.txt").read_text()) == (BAD in source)


def test_stages_that_fail_or_last_too_long(session: Any) -> None:
    session.environment = dict(os.environ)
    (session.out / "table.md").write_text("| as far as it came |")
    session.stage("one", ["-c", "print('why'); raise SystemExit(4)"], 60, "none.md")
    session.stage("two", ["-c", "import time; time.sleep(60)"], 1, "table.md")
    session.say("end")
    assert "one: failed, the end of log.txt says why (4)" in summary(session)
    assert "two: cut after 1 s\n\n| as far as it came |" in summary(session)
    assert (session.out / "log.txt").read_text() == "why\n"
    assert session.failed
