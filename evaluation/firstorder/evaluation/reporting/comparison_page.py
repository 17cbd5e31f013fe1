"""The page, the text and the table of a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from firstorder.evaluation.reporting import tables
from firstorder.evaluation.reporting.comparison import Comparison, changes, compare, differences
from firstorder.evaluation.reporting.sheets import COPYING, Sheet
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

EXPLAINED = (
    "Every line is on the same images in both runs. The difference is the second accuracy minus the first, in points; "
    "its 95 % interval is Newcombe's for paired data (1998, method 10), p is the exact p-value of McNemar's test. "
    "Lines without an attack show clean accuracy."
)


def write(runs: Mapping[str, Run], out: Path, match: Mapping[str, str] | None = None) -> list[Path]:
    """Write comparison.html and comparison.md into `out`, and the differences as CSV; returns the paths.

    Args:
        runs: the first is compared with each of the others.
        out: the folder.
        match: as in `comparison.compare`.

    Raises:
        ValueError: runs that cannot be compared.
    """
    found = compare(runs, match)
    parts = [(one, *sheets(one, i)) for i, one in enumerate(found, 1)]
    loader = PackageLoader("firstorder.evaluation")
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    page = environment.get_template("comparison.html").render(
        runs=list(runs),
        parts=[(one, [Markup(sheet.html()) for sheet in own]) for one, *own in parts],  # escapes what it holds
        explained=EXPLAINED,
        copying=Markup(COPYING),
    )
    contents = {"comparison.html": page, "comparison.md": markdown(parts)}
    contents |= {f"{sheet.name}.csv": sheet.csv() for _, *own in parts for sheet in own[:1]}
    for name, text in contents.items():
        write_text(out / name, text)
    return [out / name for name in contents]


def sheets(comparison: Comparison, number: int) -> tuple[Sheet, Sheet]:
    """The tables of the comparison that is the `number`-th of a page, from 1."""
    both = differences(comparison), changes(comparison)
    one, other = (Sheet(f"{s.name}-{number}" if number > 1 else s.name, s.title, s.columns, s.rows) for s in both)
    return one, other


def markdown(parts: Sequence[tuple[Comparison, Sheet, Sheet]]) -> str:
    """Comparisons with their tables as Markdown."""
    lines = []
    for comparison, found, changed in parts:
        lines += [f"# {tables.escaped(comparison.one)} and {tables.escaped(comparison.other)}", EXPLAINED]
        lines += [f"- {tables.escaped(note)}" for note in comparison.notes]
        lines += [f"## {tables.escaped(found.title)}", found.markdown(), f"## {tables.escaped(changed.title)}"]
        lines += [changed.markdown() if changed.rows else "Nothing."]
    return "\n\n".join(lines) + "\n"
