"""The package is installed as `firstorder-attacks` and imported as `firstorder`; nothing says otherwise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

import installed
from firstorder.attacks.distribution import DISTRIBUTION, pip_install, versions
from samples import sampled

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
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the sdist and the wheel were built into, as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
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


def test_the_wheel_holds_what_is_needed_and_no_more(wheel: Path) -> None:
    folders = [ROOT / name for name in ("plugins", "adapters", "evaluation")]
    files = [path.relative_to(folder) for folder in folders for path in folder.rglob("*") if path.is_file()]
    ours = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = {name.partition("/")[2] for name in archive.namelist() if ".dist-info/" in name}
        licence = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        size = sum(one.file_size for one in archive.infolist())
    assert held == ours
    assert described == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    kinds = {path.suffix or path.name for path in map(Path, held)}
    assert kinds == {".py", ".typed", ".yaml", ".html", ".css", ".js", ".json", ".md", ".npz", ".safetensors"}
    assert not [name for name in held if re.search(r"(^|/)(tests?/|test_|conftest|\.)", name)]
    assert "firstorder/__init__.py" not in held, "a namespace of several distributions"
    assert 1e6 < wheel.stat().st_size < 5e6
    assert size < 7e6


def test_the_sdist_makes_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < 12e6
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"pyproject.toml", "LICENSE", "README.md", "PKG-INFO", "CHANGELOG.md", "Makefile", "tests", "docs"} <= names
    assert not {".venv", ".git", ".mypy_cache", "runs", "build", "dist"} & names
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "again")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    (again,) = (tmp_path / "again").iterdir()
    assert again.read_bytes() == wheel.read_bytes()


def test_both_are_fit_for_publication(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(built.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


CORE = [
    ("test_laws.py",),
    ("test_contract.py",),
    ("test_references.py",),
    ("test_minimum_norm.py",),
    ("test_public.py",),
    ("test_cli.py",),
    ("test_art.py",),
    ("test_training_gradients.py",),
    ("test_evaluate_cells.py",),
]
"""What the wheel has to pass where nothing else of this repository is; none of these tests reads a file of it."""


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", sampled(CORE, len(CORE), lambda row: None))
def test_the_wheel_alone_passes(part: str, wheel: Path, tmp_path: Path) -> None:
    python = installed.environment(tmp_path / "venv", wheel)
    shutil.copytree(ROOT / "tests", tmp_path / "apart" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "apart")
    where = "import firstorder.attacks; print(firstorder.attacks.__file__)"
    options = {"cwd": tmp_path / "apart", "env": installed.variables(), "capture_output": True, "text": True}
    found = subprocess.run([str(python), "-c", where], check=True, **options).stdout.strip()
    assert Path(found).is_relative_to(tmp_path / "venv")
    done = subprocess.run([str(python), "-m", "pytest", "-p", "no:cacheprovider", f"tests/{part}"], **options)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d+ passed", done.stdout, flags=re.M)


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
    python = installed.environment(tmp_path / "venv", wheel)
    done = subprocess.run(
        [str(python), "-c", SCRIPT],
        env=installed.variables(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    assert Path(found["file"]).is_relative_to(site)
    assert Path(found["folder"]) == site
    assert found["versions"] == {"firstorder": wheel.name.split("-")[1], "torch": version("torch")}
    assert found["sources"] == ["firstorder-attacks"]
    assert found["failures"] == {}
