"""The package as a user has it: its wheel, and an environment in which nothing else of it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def wheel(folder: Path) -> Path:
    """Build the wheel into a folder; its path."""
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, built: Path) -> Path:
    """The interpreter of an environment with the wheel; everything else is what this interpreter has.

    What is installed editable here, this package among it, is not there: its .pth files are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(built)]
    subprocess.run(command, check=True)
    return python


def variables() -> dict[str, str]:
    """The environment of a process that is not to see this repository."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [folder for folder in folders if folder and not Path(folder).is_relative_to(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(others)}
