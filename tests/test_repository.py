"""Workflows, issue forms, hooks, bounds of versions: what they name is there, what is declared is tested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from test_readme import check, commands

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir() if path.stem != "config")
TEXTS = [*WORKFLOWS, *FORMS, ROOT / ".github" / "pull_request_template.md", ROOT / ".pre-commit-config.yaml"]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
LOWEST = ROOT / "constraints-lowest.txt"


def names(paths: list[Path]) -> list[Any]:
    """The paths as parameters that are called by their names."""
    return [pytest.param(path, id=path.name) for path in paths]


def read(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def jobs() -> dict[str, dict[str, Any]]:
    return {f"{path.stem}.{name}": job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}


def runs(job: dict[str, Any]) -> list[str]:
    """The command lines of a job."""
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def made(line: str) -> str:
    """The target that a line makes; an AssertionError where the Makefile lacks it or a variable of the line."""
    command, target, *variables = shlex.split(line)
    assert command == "make", line
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.M)
    assert target in phony.split(), line
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), line
    for variable in variables:
        name, _, value = variable.partition("=")
        assert f"$({name})" in MAKEFILE, line
        assert (ROOT / value).is_file(), line
    return target


def classifiers(group: str) -> list[str]:
    return re.findall(rf'^    "{group} :: (.+)",$', PROJECT, flags=re.M)


def extra(name: str) -> set[str]:
    """The packages of an extra, without bounds."""
    (found,) = re.findall(rf"^{name} = \[(.*?)\]", PROJECT, flags=re.M | re.S)
    return set(re.findall(r'"([\w-]+)', found))


def test_workflows_run_what_there_is_to_run() -> None:
    targets = {name: [made(line) for line in runs(job)] for name, job in jobs().items()}
    assert targets == {
        "tests.tests": ["test"],
        "tests.lowest": ["test"],
        "tests.lint": ["lint"],
        "tests.docs": ["docs"],
        "tests.wheel": ["dist"],
        "release.long": ["test-long"],
        "release.dist": ["dist"],
    }
    assert runs(jobs()["tests.lowest"]) == [f"make test CONSTRAINTS={LOWEST.name}"]


@pytest.mark.parametrize(
    "line", ["make tests", "make test CONSTRAINT=constraints.txt", "make test CONSTRAINTS=none.txt"]
)
def test_a_line_that_does_not_run_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        made(line)


@pytest.mark.parametrize("path", names(WORKFLOWS))
def test_a_workflow_may_read_and_no_more(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    text = path.read_text(encoding="utf-8")
    assert "secrets" not in text
    assert "upload" not in text
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        assert {step["uses"] for step in job["steps"] if "uses" in step} == {
            "actions/checkout@v4",
            "actions/setup-python@v5",
        }


def test_what_is_declared_is_what_is_tested() -> None:
    declared = [version for version in classifiers("Programming Language :: Python") if "." in version]
    matrix = jobs()["tests.tests"]["strategy"]["matrix"]["python"]
    assert matrix == declared
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"$', PROJECT, flags=re.M)
    assert matrix[0] == oldest
    used = {
        name: step["with"]["python-version"] for name, job in jobs().items() for step in job["steps"] if "with" in step
    }
    assert used.pop("tests.tests") == "${{ matrix.python }}"
    assert used.pop("tests.lowest") == oldest
    assert set(used.values()) <= set(declared)
    assert {job["runs-on"] for job in jobs().values()} == {"ubuntu-latest"}
    assert classifiers("Operating System") == ["POSIX :: Linux"]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"Python {declared[0]} to {declared[-1]}" in contributing


def test_classifiers_and_keywords_are_known_and_sorted() -> None:
    trove = pytest.importorskip("trove_classifiers")
    (block,) = re.findall(r"^classifiers = \[\n(.*?)^\]", PROJECT, flags=re.M | re.S)
    found = re.findall(r'"(.+)"', block)
    assert found == sorted(
        set(found), key=lambda text: [(len(part), part) if part[0] == "3" else (0, part) for part in text.split(" :: ")]
    )
    assert set(found) <= trove.classifiers
    (block,) = re.findall(r"^keywords = \[\n(.*?)^\]", PROJECT, flags=re.M | re.S)
    keywords = re.findall(r'"(.+?)"', block)
    assert keywords == sorted(set(keywords))
    assert {"art", "foolbox", "pytorch", "torchattacks"} < set(keywords)


@pytest.mark.parametrize("path", names(FORMS))
def test_an_issue_form_is_whole(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    assert {field["type"] for field in form["body"]} <= FIELDS
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert len({field["attributes"]["label"] for field in asked}) == len(asked)
    assert any(field["validations"]["required"] for field in asked if "validations" in field)
    assert all(field["attributes"]["value"] for field in form["body"] if field["type"] == "markdown")


@pytest.mark.parametrize("path", names(TEXTS))
def test_what_a_text_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for words in commands(text):
        if words[1] != "--version":
            check(words)
    for name in re.findall(r"\b(?:(?:docs|tests|\.github)/[\w./-]+|[A-Z]+\.md)", text):
        assert (ROOT / name).exists(), name
    assert "://" not in text, "no address of a repository that is not there"


def test_hooks_are_the_checks_of_lint() -> None:
    (source,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert source["repo"] == "local", "nothing is fetched"
    hooks = source["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    (lint,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M)
    checks = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    assert sorted(entries) == sorted(line.replace(" --check", "") for line in checks)
    assert {Path(entry.split()[0]).name for entry in entries} <= extra("dev")


def test_every_tool_of_make_is_installed_by_it() -> None:
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", MAKEFILE)) - {"python", "firstorder"}
    assert tools == {"hatchling", "mypy", "ruff", "twine"}
    assert tools <= extra("dev")


def test_the_citation_has_the_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', PROJECT, flags=re.M)
    assert str(read(ROOT / "CITATION.cff")["version"]) == version


def lower_bounds() -> dict[str, str]:
    """The oldest version of each package of ours, as pyproject.toml states it; without the developers' tools."""
    (needed,) = re.findall(r"^dependencies = (\[.*?\])", PROJECT, flags=re.M | re.S)
    (extras,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^dev = ", PROJECT, flags=re.M | re.S)
    found = set(re.findall(r'"([\w-]+)>=([\w.]+)', needed + extras))
    assert len(found) == len(dict(found)), "one bound of a package, wherever it is needed"
    return dict(found)


def test_lowest_versions_are_those_of_the_project() -> None:
    lines = [line for line in LOWEST.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    stated = dict(line.split("==") for line in lines if "==" in line)
    bounds = lower_bounds()
    assert len(bounds) > 25
    for name, bound in bounds.items():
        parts = bound.split(".")
        assert stated[name].split(".")[: len(parts)] == parts, f"{name} is at least {bound}"


def test_no_registry_is_named() -> None:
    """Where packages come from is the installer's configuration."""
    host = re.compile(r"py[p]i\.org|pytho[n]hosted|registry\.np[m]js|inde[x]-url")
    found = []
    for folder in (".ci", ".github", "plugins", "adapters", "evaluation", "tests", "docs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        found += [path for path in files if host.search(path.read_text(encoding="utf-8", errors="ignore"))]
    found += [path for path in ROOT.iterdir() if path.is_file() and host.search(path.read_text(encoding="utf-8"))]
    assert not found
