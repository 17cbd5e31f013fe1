"""How Sphinx makes the site: Markdown pages as they are, the reference from docstrings.

Sphinx and not a generator that reads sources alone: the classes of the hosts are made from the registry when they are
asked for, so only an import sees them and their signatures. Its search works on pages that are opened from disk.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from reference import literal

project = "firstorder"
author = "The firstorder authors"
copyright = author  # noqa: A001  # the name that Sphinx reads
release = version = installed("firstorder-attacks")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = f"firstorder {release}"
html_static_path: list[str] = []
html_show_sourcelink = False
html_copy_source = False
highlight_language = "text"
smartquotes = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Warns", "Raises")]


def _prepared(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Escape what docstrings do not mean as markup, and mark their indented blocks as code."""
    made: list[str] = []
    last, code = "", -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if code >= 0 and line.strip() and indent < code:
            code = -1
        outer = len(last) - len(last.lstrip())
        alone = bool(made) and not made[-1].strip()
        if code < 0 and line.strip() and alone and indent > outer and not _header(last):
            made += [" " * outer + "::", ""]
            code = indent
        made.append(line if code >= 0 else literal(line))
        last = line if line.strip() else last
    lines[:] = made


def _header(line: str) -> bool:
    return line.strip() in {"Args:", "Returns:", "Raises:", "Warns:", "Attributes:", "Yields:"}


def setup(app: Any) -> None:
    """Put the preparation before napoleon's."""
    app.connect("autodoc-process-docstring", _prepared, priority=100)
