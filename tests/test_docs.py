"""The site: the reference has every public name, the sidebar every page, and what Sphinx makes of both is whole."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest

from test_public import PACKAGES

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "site"
TOOLS = ROOT / "build" / "docs-tools"
"""Where `make docs` puts Sphinx."""


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that writes the reference."""
    monkeypatch.syspath_prepend(str(SITE))
    return importlib.import_module("reference")


def ours(value: Any) -> bool:
    """Whether a public value is no class of a host."""
    return str(getattr(value, "__module__", "")).split(".")[0] != "torchattacks"


@pytest.mark.parametrize("package", PACKAGES.values())
def test_every_public_name_is_in_the_reference(package: str, reference: ModuleType) -> None:
    module = importlib.import_module(package)
    text = reference.pages()[f"{package}.rst"] if package != "firstorder.attacks" else reference.page(package)
    directives = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: ([\w.]+)", text, flags=re.M)
    assert len(directives) == len(set(directives))
    names = [name for name in module.__all__ if ours(getattr(module, name))]
    assert sorted(directives) == sorted(f"{package}.{name}" for name in names)


def test_what_builds_the_site_is_pinned() -> None:
    lines = (SITE / "requirements.txt").read_text(encoding="utf-8").lower().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    (extra,) = re.findall(r"^docs = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    wanted = {name.lower() for name in re.findall(r'"([\w-]+)', extra)}
    assert len(wanted) == 3
    assert wanted <= pinned


def test_text_of_docstrings_keeps_its_signs(reference: ModuleType) -> None:
    assert reference.literal("mean|g| * 2 of `a*b`s") == r"mean\|g\| \* 2 of ``a*b``\ s"


def test_a_name_without_a_group_is_refused(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GROUPS", {"Losses": ("losses",)})
    with pytest.raises(ValueError, match="no group"):
        reference.page("firstorder.attacks")


def is_page(path: Path) -> bool:
    """Whether a file is a page of the site."""
    return path.suffix in {".md", ".ipynb"}


def test_the_site_is_whole(tmp_path: Path) -> None:
    """No warning, no dead link, every page and every name in the index of the search."""
    if not TOOLS.exists() and find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed; make docs installs it")
    paths = [*([str(TOOLS)] if TOOLS.exists() else []), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(SITE / "build.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {path.with_suffix("") for path in pages} >= {
        path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.*") if is_page(path)
    }
    assert len(list((site / "_downloads").rglob("*.ipynb"))) == 3
    assert len(list((site / "_images").glob("attack-and-look-*.png"))) == 2
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"#]+)', text):
            if not re.match(r"[a-z]+:", link):
                target = site / path.parent / unquote(link.partition("?")[0])
                assert target.exists(), f"{path}: {link}"
        assert not re.search(r'(?:src|<link[^>]*href)="https?://', text), f"{path} loads from the network"
    found = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(
        name in found
        for name in ("PQGD", "AdversarialTrainerENGM", "prepare", "tutorials/own-attack", "notebooks/engm")
    )
