"""The package is installed as `firstorder-attacks` and imported as `firstorder`; nothing says otherwise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

from firstorder.attacks.distribution import DISTRIBUTION, pip_install, versions

ROOT = Path(__file__).parent.parent
OTHER = re.compile(
    r"(?<![\w./-])firstorder\["
    r"|\b(?:version|distribution|metadata|requires)\(\W?firstorder\W?\)"
    r"|pip3? install [^\n]*\bfirstorder\b(?!-attacks)"
)
"""An extra of, a look-up of, or a command that installs a distribution called `firstorder`."""


def test_there_is_one_name() -> None:
    assert DISTRIBUTION == "firstorder-attacks"
    assert pip_install("art") == 'pip install "firstorder-attacks[art]"'
    files = [path for folder in ("plugins", "adapters", "evaluation", "tests") for path in (ROOT / folder).rglob("*.*")]
    texts = {".py", ".md", ".html", ".js", ".yaml", ".toml", ".txt", ".json"}
    files = [path for path in (*files, *ROOT.iterdir(), *ROOT.glob("docs/**/*")) if path.is_file()]
    read = [path for path in files if (path.suffix in texts or path.name == "Makefile") and path != Path(__file__)]
    assert {"pyproject.toml", "README.md", "constraints.txt", "registry.py", "engines.py"} <= {p.name for p in read}
    found = [(path.name, match[0]) for path in read for match in OTHER.finditer(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        'pip install "firstorder[art]"',
        "pip install firstorder",
        "'firstorder[all]'",
        'version("firstorder")',
        "metadata('firstorder')",
    ],
)
def test_another_name_is_found(text: str) -> None:
    assert OTHER.search(text)
    assert not OTHER.search(text.replace("firstorder", "firstorder-attacks"))


def test_versions_are_of_what_is_installed() -> None:
    found = versions(["torch", "no-such-package"])
    assert found == {"firstorder": version("firstorder-attacks"), "torch": version("torch")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_says_so(wheel: Path) -> None:
    assert wheel.name.startswith("firstorder_attacks-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata: Message = Parser().parsestr(archive.read(path).decode())
        points = ConfigParser()
        points.read_string(archive.read(path.replace("METADATA", "entry_points.txt")).decode())
    assert {name.partition("/")[0] for name in names} == {"firstorder", path.partition("/")[0]}
    assert metadata["Name"] == "firstorder-attacks"
    required = metadata.get_all("Requires-Dist", [])
    assert any(re.match(r"jinja2\b.*extra == 'train'", value) for value in required), "an extra holds the one it names"
    assert not any(value.startswith("firstorder") for value in required)
    assert dict(points["console_scripts"]) == {"firstorder": "firstorder.evaluation.__main__:main"}
    assert points["firstorder.attacks"]["pgd"] == "firstorder.attacks.catalogue:PGD"


SCRIPT = """
import json, sys
from importlib.metadata import distribution
import firstorder.attacks
from firstorder.attacks import registry
from firstorder.attacks.distribution import DISTRIBUTION, versions
print(json.dumps({
    "file": firstorder.attacks.__file__,
    "folder": str(distribution(DISTRIBUTION).locate_file("")),
    "versions": versions(["torch"]),
    "sources": sorted(set(registry().sources.values())),
    "failures": dict(registry().failures),
}))
"""


def test_an_installed_wheel_finds_itself(wheel: Path, tmp_path: Path) -> None:
    """As a user has it: what is imported, its version and its attacks all come from the wheel."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    site = tmp_path / "site"
    assert Path(found["file"]).is_relative_to(site)
    assert Path(found["folder"]) == site
    assert found["versions"] == {"firstorder": wheel.name.split("-")[1], "torch": version("torch")}
    assert found["sources"] == ["firstorder-attacks"]
    assert found["failures"] == {}
