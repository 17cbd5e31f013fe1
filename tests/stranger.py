"""A distribution of somebody else, with an attack, an update rule and a gradient method, and broken ones of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = '''
"""What a third party registers; importing it needs firstorder alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from firstorder.attacks import Constant, Direction, Identity, IterativeAttack, Schedule
from firstorder.training import Examplewise, GradientMethod


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


class PGD(Raw):
    """Has the class name of another."""


class Top:
    """The sign of the largest components alone. No dataclass, and no relative of ours."""

    scale = "radius"

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def init(self, x: Tensor) -> None:
        return None

    def __call__(self, m: Tensor, state: Any, out: Tensor) -> tuple[Tensor, Any]:
        least = self.share * m.abs().flatten(1).amax(1).reshape(-1, *[1] * (m.ndim - 1))
        return m.sign() * (m.abs() >= least), state


class Capped(Top):
    """Moves no component further than alpha gamma."""

    scale = "component"
    gamma = 0.2


class Uncapped(Top):
    scale = "component"


class Scaleless(Top):
    scale = "big"


class Demanding(Top):
    def __init__(self, share: float) -> None:
        super().__init__(share)


class Clipped(Top):
    """Has the class name of another."""


class Soft(Examplewise):
    """w_i = alpha / (alpha + ||grad L_i||)."""

    def __init__(self, model: nn.Module, *, alpha: float = 1.0) -> None:
        super().__init__(model)
        self.alpha = alpha

    @property
    def needs_norms(self) -> bool:
        return True

    def weigh(self, norms: Tensor | None, input_norms: Tensor | None) -> Tensor:
        return self.alpha / (self.alpha + norms)


class Unfinished(GradientMethod):
    pass


class Greedy(Soft):
    def __init__(self, model: nn.Module, appetite: float) -> None:
        super().__init__(model)


class Nothing:
    pass


def function() -> None:
    pass
'''

QUITS = 'raise SystemExit("no licence found")\n'

BROKEN = {
    "gone": ("stranger.missing:Nothing", "ModuleNotFoundError: No module named 'stranger.missing'"),
    "absent": ("stranger:Absent", "AttributeError"),
    "quits": ("stranger.quits:Nothing", "SystemExit: no licence found"),
    "function": ("stranger:function", "is not a class"),
}
"""What breaks in every group: name to entry and reason."""

BROKEN_ATTACKS = {
    **BROKEN,
    "no-attack": ("stranger:Nothing", "is not a dataclass that subclasses firstorder.attacks.Attack"),
    "abstract": ("firstorder.attacks:MinimumNormAttack", "is abstract: it does not define"),
    "pgd": ("stranger:Raw", "the name 'pgd' is taken by firstorder"),
    "twin": ("stranger:PGD", "the class name 'PGD' is taken by the attack 'pgd'"),
}

BROKEN_RULES = {
    **BROKEN,
    "no-rule": ("stranger:Nothing", "is not a firstorder.attacks.Direction"),
    "uncapped": ("stranger:Uncapped", "gamma=None must be a finite number greater than 0"),
    "scaleless": ("stranger:Scaleless", "has scale='big'; it must be one of radius, length, component"),
    "demanding": ("stranger:Demanding", "TypeError: Demanding.__init__() missing 1 required positional argument"),
    "sign": ("stranger:Top", "the name 'sign' is taken by firstorder"),
    "twin": ("stranger:Clipped", "the class name 'Clipped' is taken by the update rule 'clipped'"),
}

BROKEN_METHODS = {
    **BROKEN,
    "no-method": ("stranger:Nothing", "is not a subclass of firstorder.training.GradientMethod"),
    "unfinished": ("stranger:Unfinished", "is abstract: it does not define backward, weights"),
    "greedy": ("stranger:Greedy", "cannot be made from a model alone: missing a required argument: 'appetite'"),
    "engm": ("stranger:Soft", "the name 'engm' is taken by firstorder"),
}

GROUPS = {
    "firstorder.attacks": {"raw": "stranger:Raw", **{name: entry for name, (entry, _) in BROKEN_ATTACKS.items()}},
    "firstorder.rules": {
        "top": "stranger:Top",
        "capped": "stranger:Capped",
        **{name: entry for name, (entry, _) in BROKEN_RULES.items()},
    },
    "firstorder.training": {"soft": "stranger:Soft", **{name: entry for name, (entry, _) in BROKEN_METHODS.items()}},
}

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stranger"
version = "1.0"
"""


def install(source: Path, target: Path) -> dict[str, str]:
    """Install the distribution `stranger` into `target`; the environment of processes that have it.

    Args:
        source: an empty folder for its source.
        target: an empty folder.
    """
    (source / "stranger").mkdir()
    (source / "stranger" / "__init__.py").write_text(PACKAGE)
    (source / "stranger" / "quits.py").write_text(QUITS)
    groups = (
        "\n".join([f'[project.entry-points."{group}"]', *(f'{name} = "{entry}"' for name, entry in entries.items())])
        for group, entries in GROUPS.items()
    )
    (source / "pyproject.toml").write_text("\n\n".join([PYPROJECT, *groups]) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--target", str(target), str(source)], check=True)
    path = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "160"}


def run(environment: dict[str, str], *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process in that environment."""
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
