"""How figures look and are written: for light and dark pages, wide and narrow ones, the same bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from firstorder.files import replacing, write_text

INK = "#1c1f24"
"""Text and lines; in an SVG the text's colour of the page instead."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "axes.spines.right": False, "axes.spines.top": False, "axes.linewidth": 0.8, "axes.labelsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False, "font.size": 9,
    "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "firstorder",
}  # fmt: skip
"""Names of models and attacks are never formulas, and nothing in the files is random."""

BOTH = f"<style>:root {{ color: {INK} }} @media (prefers-color-scheme: dark) {{ :root {{ color: #e8eaed }} }}</style>"
WIDTH, NARROW = 4.6, 3.7
"""Of a figure in inches: in files and on wide pages, and on a page of 360 pixels, where 8 points are 9 pixels."""


def style() -> Any:
    """The context in which figures are made and saved."""
    return matplotlib.rc_context(STYLE)


def both(draw: Callable[[float], Figure], folder: Path, name: str) -> tuple[Markup, float]:
    """Write a figure's files; returns the SVGs to put into a page, drawn narrow and as usual, and the usual width.

    Args:
        draw: the figure at a width in inches; one that has a width of its own returns the same figure.
        folder, name: where NAME.png and NAME.svg are written.
    """
    usual, narrow = draw(WIDTH), draw(NARROW)
    found = save(usual, folder, name)
    if narrow is not usual:
        narrow.draw_without_rendering()
        narrow.set_layout_engine("none")
        found = _inline(_svg(narrow), f"{name}-narrow", narrow, "narrow") + found
    return Markup(found), usual.get_figwidth()  # matplotlib escapes text in SVG


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.png, on white, and NAME.svg, for light and dark pages; returns the SVG to put into a page."""
    with replacing(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=160, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # what was just computed stays
    svg = _svg(figure)
    write_text(folder / f"{name}.svg", re.sub(r"(<svg [^>]*>)", rf"\1{BOTH}", svg, count=1))
    return _inline(svg, name, figure, "usual")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(INK, "currentColor")


def _inline(svg: str, name: str, figure: Figure, kind: str) -> str:
    """The SVG as a part of a page."""
    svg = re.sub(r"^.*?(?=<svg )|<metadata>.*?</metadata>", "", svg, flags=re.S)
    for mark in (' id="', 'href="#', "url(#"):  # ids are unique in a page, not only in a figure
        svg = svg.replace(mark, f"{mark}{name}-")
    return svg.replace("<svg ", f'<svg class="{kind}" style="--width: {figure.get_figwidth():g}" ', 1)
