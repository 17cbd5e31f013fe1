"""Writes the metadata that an installation of this tree would have, so that entry points exist without one.

python tests/cuda/metadata.py FOLDER    FOLDER is then put on PYTHONPATH with plugins, adapters and evaluation
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under another name
    import tomli as tomllib


def write(folder: Path) -> Path:
    """The folder of the metadata within `folder`."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    made = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = {**project.get("entry-points", {}), "console_scripts": project.get("scripts", {})}
    text = "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in groups.items()
    )
    (made / "entry_points.txt").write_text(text, encoding="utf-8")
    return made


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))  # noqa: T201
