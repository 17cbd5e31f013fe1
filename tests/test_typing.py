"""What a user's type checker makes of an installed wheel: every package is typed, and a strict client has no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import installed

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "tests" / "typing" / "client.py"
FOLDERS = [ROOT / name / "firstorder" for name in ("plugins", "adapters", "evaluation")]
PACKAGES = sorted(path.parent.name for folder in FOLDERS for path in folder.glob("*/__init__.py"))

pytestmark = pytest.mark.timeout(1200)


def test_every_package_is_typed() -> None:
    typed = sorted(path.parent.name for folder in FOLDERS for path in folder.glob("*/py.typed"))
    assert typed == PACKAGES
    assert len(PACKAGES) > 12
    loose = [path for folder in FOLDERS for path in folder.glob("*.py")]
    assert not loose, "a module outside a package cannot be marked as typed"


def test_the_client_uses_every_package() -> None:
    text = CLIENT.read_text(encoding="utf-8")
    used = set(re.findall(r"^from firstorder\.(\w+)", text, flags=re.M))
    (together,) = re.findall(r"^from firstorder import (.+)$", text, flags=re.M)
    assert sorted(used | set(together.split(", "))) == PACKAGES


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    return installed.environment(folder / "venv", installed.wheel(folder))


def checked(command: list[str], folder: Path) -> str:
    """What a checker says of the client in a folder that has nothing else of this repository."""
    shutil.copy(CLIENT, folder)
    words = [sys.executable, "-m", *command, CLIENT.name]
    done = subprocess.run(words, cwd=folder, env=installed.variables(), capture_output=True, text=True)
    return done.stdout + done.stderr


def test_mypy(python: Path, tmp_path: Path) -> None:
    cache = ROOT / ".mypy_cache" / "client"
    command = ["mypy", "--strict", f"--python-executable={python}", f"--cache-dir={cache}"]
    assert checked(command, tmp_path) == "Success: no issues found in 1 source file\n"


def test_pyright(python: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("needs node on the PATH")
    settings = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": True}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = json.loads(checked(["pyright", "--outputjson", "--pythonpath", str(python)], tmp_path))
    assert found["summary"]["filesAnalyzed"] == 1
    assert found["generalDiagnostics"] == []
