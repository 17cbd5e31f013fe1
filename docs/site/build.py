"""Build the site into static pages, offline: `make docs`, or `python docs/site/build.py [FOLDER]`.

The pages of docs/ are copied to build/docs, the reference is written beside them, and Sphinx makes build/site of both.
A warning is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from reference import pages
from sphinx.cmd.build import main

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md")
"""Pages of the site that lie beside the README."""


def contents(index: str) -> str:
    """The tables of contents of the sidebar: a caption for every section of the index, with the pages it links to."""
    made = []
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", section) if not link.startswith("http")]
        if links:
            entries = "\n".join(dict.fromkeys(link.removesuffix(".md") for link in links))
            made.append(f"```{{toctree}}\n:hidden:\n:caption: {section.splitlines()[0]}\n\n{entries}\n```")
    return "\n\n".join(made)


def write(source: Path) -> None:
    """Write what Sphinx reads: all pages, with the reference."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("site", "__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    for path in source.rglob("*.md"):
        text = re.sub(r"\]\((?:\.\./)+((?:" + "|".join(BESIDE) + r"))", r"](/\1", path.read_text(encoding="utf-8"))
        if path.name in BESIDE:
            text = text.replace("](docs/", "](")
        if path == source / "index.md":
            text = re.sub(r"\]\(reference\.md\)", "](reference/index.rst)", text)
            text += "\n" + contents(text).replace("reference/index.rst", "reference/index") + "\n"
        path.write_text(text, encoding="utf-8")
    (source / "reference").mkdir()
    for name, text in pages().items():
        (source / "reference" / name).write_text(text, encoding="utf-8")


def build(out: Path, source: Path) -> int:
    """Sphinx's exit status."""
    write(source)
    return main(["-q", "-W", "--keep-going", "-E", "-c", str(Path(__file__).parent), str(source), str(out)])


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    sys.exit(build(folder, ROOT / "build" / "docs"))
