"""A stranger's attack, installed as a distribution of its own, is everywhere; a broken one harms nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from firstorder.attacks import Attack, create, get, registry
from firstorder.attacks.distribution import DISTRIBUTION

PACKAGE = '''
"""Raw gradient ascent, a third party's attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from firstorder.attacks import Constant, Direction, Identity, IterativeAttack, Schedule


@dataclass(frozen=True, kw_only=True)
class Raw(IterativeAttack):
    """Ascent along the raw gradient.

    Args:
        boost: factor on the step.
    """

    paper: ClassVar[str] = "A. Stranger, private note"
    boost: float = 2.0

    def rule(self) -> Direction:
        return Identity()

    def schedule(self, size: float) -> Schedule:
        return Constant(size=self.boost * size)


class NoAttack:
    pass
'''

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stranger"
version = "1.0"

[project.entry-points."firstorder.attacks"]
raw = "stranger:Raw"
broken = "stranger.missing:Nothing"
no-attack = "stranger:NoAttack"
pgd = "stranger:Raw"
"""

SCRIPT = """
import inspect, json, logging, sys
import numpy as np, torch
from torch import nn
from art.estimators.classification import PyTorchClassifier
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

import firstorder.art, firstorder.torchattacks
from firstorder.attacks import create, get, registry

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
x = torch.rand(4, 3, 2, 2); y = model(x).argmax(1)
words = dict(eps=0.1, boost=3.0)
core = create("raw", **words, alpha=0.5, steps=4)(model, x, y)
torchattacks = firstorder.torchattacks.Raw(model, **words, alpha=0.5, steps=4)(x, y)
classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 2, 2), 5, clip_values=(0, 1), device_type="cpu")
art = firstorder.art.Raw(classifier, **words, eps_step=0.5, max_iter=4, verbose=False).generate(x.numpy(), y.numpy())
try:
    get("broken")
    error = ""
except ValueError as exception:
    error = str(exception)
print(json.dumps({
    "source": registry().sources["raw"],
    "moved": float((core - x).abs().max()),
    "torchattacks": float((core - torchattacks).abs().max()),
    "art": float(np.abs(core.numpy() - art).max()),
    "signature": str(inspect.signature(firstorder.art.Raw)),
    "listed": ["Raw" in dir(firstorder.torchattacks), "Raw" in dir(firstorder.art)],
    "failures": dict(registry().failures),
    "pgd": get("pgd").__module__,
    "error": error,
}))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the distribution `stranger` is installed beside firstorder."""
    source, target = tmp_path_factory.mktemp("stranger"), tmp_path_factory.mktemp("site")
    (source / "stranger").mkdir()
    (source / "stranger" / "__init__.py").write_text(PACKAGE)
    (source / "pyproject.toml").write_text(PYPROJECT)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--target", str(target), str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(target), "COLUMNS": "160"}


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_a_third_partys_attack_is_under_every_host(stranger: dict[str, str]) -> None:
    done = run(stranger, "-c", textwrap.dedent(SCRIPT))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"] == "stranger"
    assert found["moved"] == pytest.approx(0.1, abs=1e-6)
    assert found["torchattacks"] <= 1e-6
    assert found["art"] <= 1e-6
    assert "boost=2.0" in found["signature"]
    assert "max_iter=10" in found["signature"]
    assert found["listed"] == [True, True]
    assert found["pgd"] == "firstorder.attacks.catalogue", "a stranger must not replace our attack"
    assert set(found["failures"]) == {"broken", "no-attack", "pgd (stranger)"}
    assert "stranger.missing" in found["failures"]["broken"]
    assert "registered but unusable" in found["error"]
    assert "broken" in done.stderr, "a failure is logged by name"


def test_the_command_line_lists_it(stranger: dict[str, str]) -> None:
    done = run(stranger, "-m", "firstorder.evaluation", "attacks")
    assert done.returncode == 0, done.stderr
    for word in (
        "raw",
        "Raw",
        "A. Stranger, private note",
        "boost=2.0",
        "from stranger",
        "clipped-ngm",
        "torchattacks art",
    ):
        assert word in done.stdout
    assert "broken is not available" in done.stdout
    listed = json.loads(run(stranger, "-m", "firstorder.evaluation", "attacks", "--json").stdout)
    raw = next(row for row in listed["attacks"] if row["name"] == "raw")
    assert raw["distribution"] == "stranger"
    assert raw["norms"] == ["Linf", "L2"]
    assert raw["hosts"] == ["torch", "torchattacks", "art"]
    assert raw["defaults"]["boost"] == 2.0
    assert "broken" in listed["failures"]


def test_our_attacks_are_registered_like_a_strangers() -> None:
    ours = {e.name for e in entry_points(group="firstorder.attacks") if e.dist and e.dist.name == DISTRIBUTION}
    assert ours
    assert ours <= set(registry().attacks)
    assert all(issubclass(cls, Attack) for cls in registry().attacks.values())
    assert not registry().failures


def test_lookup_by_name_and_by_class_name() -> None:
    assert get("si-ni-fgsm") is get("SINIFGSM")
    assert create("pqgd", b=7) == get("pqgd")(b=7)  # type: ignore[call-arg]


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown attack 'ni-fgms'.*ni-fgsm"):
        get("ni-fgms")


def test_the_core_imports_torch_and_no_host() -> None:
    script = (
        "import sys, firstorder.attacks as a; a.registry();"
        "bad = [m for m in ('art', 'torchattacks', 'matplotlib', 'typer', 'rich') if m in sys.modules];"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_the_namespace_has_no_init() -> None:
    root = Path(__file__).parent.parent
    for folder in ("plugins", "adapters", "evaluation"):
        assert [p.name for p in (root / folder).iterdir()] == ["firstorder"]
        assert not (root / folder / "firstorder" / "__init__.py").exists()
