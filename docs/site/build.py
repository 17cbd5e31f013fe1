"""Build the site into static pages, offline: `make docs`, or `python docs/site/build.py [FOLDER]`.

The pages of docs/ are copied to FOLDER/docs, the reference is written beside them, and Sphinx makes FOLDER/site.
FOLDER is build/ by default. A warning is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import notebooks
from reference import pages
from sphinx.cmd.build import main

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the site that lie beside the README."""


def contents(index: str) -> str:
    """The tables of contents of the sidebar: a caption for every section of the index, with the pages it links to."""
    tables = {}
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", section) if not link.startswith("http")]
        tables[section.splitlines()[0]] = list(dict.fromkeys(link.removesuffix(".md").lstrip("/") for link in links))
    tables["Reference"] = ["reference/index"]
    toctree = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```"
    return "\n\n".join(toctree.format(caption, "\n".join(entries)) for caption, entries in tables.items())


def write(source: Path) -> None:
    """Write what Sphinx reads: all pages, with the reference."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("site", "__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    for path in source.rglob("*.ipynb"):
        text, pictures = notebooks.page(path)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        for name, png in pictures.items():
            (path.parent / name).write_bytes(png)
    for path in source.rglob("*.md"):
        text = path.read_text(encoding="utf-8").replace(".ipynb)", ".md)")
        if path.name in BESIDE:
            text = text.replace("](docs/", "](")
        for name in BESIDE:
            text = re.sub(rf"\]\((?:\.\./)+{name}", f"](/{name}", text)
        if path == source / "index.md":
            linked = text.replace("by `make docs`", "[here](reference/index.rst)")
            text = f"{linked}\n{contents(text)}\n"
        path.write_text(text, encoding="utf-8")
    (source / "reference").mkdir()
    for name, text in pages().items():
        (source / "reference" / name).write_text(text, encoding="utf-8")


def build(folder: Path) -> int:
    """Build FOLDER/site from FOLDER/docs; returns Sphinx's exit status."""
    write(folder / "docs")
    settings = str(Path(__file__).parent)
    return main(["-q", "-W", "--keep-going", "-E", "-c", settings, str(folder / "docs"), str(folder / "site")])


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build"))
