"""The command line starts at once, and a command needs the packages that it uses and no other."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from importlib.metadata import packages_distributions, requires, version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from firstorder.attacks.distribution import EXTRAS, extra_of
from firstorder.evaluation.cli import COMMANDS, app
from samples import sampled

HIDING = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
sys.argv = ["firstorder", *{words!r}]
from firstorder.evaluation.__main__ import main
main()
"""

USED = {
    "jinja2": {"report", "train-report"},
    "lightning_fabric": {"train", "train-report", "train-study"},
    "matplotlib": {"demo", "figure", "report", "train-report", "train-study", "bench", "scale-invariance"},
    "pandas": {"export", "figure", "report", "train-report", "train-study"},
    "pyarrow": {"evaluate", "export", "figure", "report"},
    "pydantic": {"evaluate", "export", "report", "train", "train-report", "train-study"},
}
"""Commands that cannot do without a package; others may need it too."""


def run(words: list[str], hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDING.format(hidden=hidden, words=words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def app_command(name: str) -> Any:
    group: Any = typer.main.get_command(app)
    return group.get_command(None, name).loaded()


def test_the_commands_in_the_order_of_use() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert done.exit_code == 0
    places = [re.search(rf"^│ {name} ", done.stdout, re.M).start() for name in COMMANDS]  # type: ignore[union-attr]
    assert places == sorted(places)
    assert "--install-completion" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_itself_what_the_list_says(name: str) -> None:
    command = app_command(name)
    assert " ".join(command.help.split("\n\n")[0].split()) == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_what_it_is_announced_as(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert done.exit_code == 0
    assert f"{name} [OPTIONS]" in done.stdout


def test_an_unknown_command_is_refused() -> None:
    done = CliRunner().invoke(app, ["atacks"])
    assert done.exit_code == 2
    assert "atacks" in done.output


def test_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout == f"firstorder {version('firstorder-attacks')}\n"


def test_help_imports_no_torch() -> None:
    words = "import sys; sys.argv = ['firstorder', '--help']\nfrom firstorder.evaluation.__main__ import main\n"
    check = "try: main()\nfinally: assert not {'torch', 'numpy', 'firstorder.attacks'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", words + check], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("words", sampled([(["--help"],), (["--version"],), (["attacks"],)], 3, lambda row: None))
def test_help_and_the_list_cost_little_more_than_torch(words: list[str]) -> None:
    """Processor time, the median of three."""

    def cost(words: list[str]) -> float:
        before = os.times()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    def median(words: list[str]) -> float:
        return statistics.median(cost(words) for _ in range(3))

    assert median(["-m", "firstorder.evaluation", *words]) <= 1.5 * median(["-c", "import torch"])


@pytest.mark.parametrize(
    "hidden", sampled([(name,) for name in sorted({m for modules in EXTRAS.values() for m in modules})], 4, len)
)
def test_the_list_needs_nothing_but_the_terminal(hidden: str) -> None:
    done = run(["attacks"], (hidden,))
    own = {re.split(r"\W", need)[0] for need in requires("typer") or ()}  # newer versions of typer need pydantic
    if hidden in ("rich", "typer") or hidden in own:
        assert done.returncode == 1
        assert f"missing: {hidden}" in done.stderr
        assert f"[{extra_of(hidden)}]" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "pqgd" in done.stdout


@pytest.mark.parametrize(
    ("hidden", "name"),
    sampled([(hidden, name) for hidden, names in USED.items() for name in sorted(names)], 9, lambda row: row[0]),
)
def test_a_missing_package_is_named_with_its_extra(hidden: str, name: str) -> None:
    done = run([name, "--help"], (hidden,))
    assert done.returncode == 1
    assert done.stderr.startswith(f"missing: {hidden}")
    assert f"[{extra_of(hidden)}]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extras_are_those_of_the_project() -> None:
    modules = packages_distributions()
    wanted: dict[str, set[str]] = {}
    for line in requires("firstorder-attacks") or ():
        name, _, extra = line.partition("extra == ")
        wanted.setdefault(extra.strip("'\""), set()).add(re.split(r"[<>=;\[ ]", name)[0].lower().replace("_", "-"))
    for extra, known in EXTRAS.items():
        for module in known:
            names = {name.lower().replace("_", "-") for name in modules.get(module, [])}
            assert not names or names & wanted[extra] or module == "autoattack", (extra, module, names)
    assert extra_of("pandas") == "evaluate"
    assert extra_of("pandas.core") == "evaluate"
    assert extra_of("another") == "all"
