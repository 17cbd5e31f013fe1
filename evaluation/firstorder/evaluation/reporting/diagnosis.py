"""The panel "can this number be trusted?": what a diagnosis found, for the terminal, a page and its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from firstorder.evaluation.reporting import tables
from firstorder.evaluation.runs.diagnosis import Finding

TITLE = "Can this number be trusted?"
HEADER = ("check", "verdict", "figure", "meaning", "what to do")


def rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """The findings as rows under `HEADER`."""
    return [(f.check, f.verdict, f.figure, f.meaning, f.remedy) for f in findings]


def summary(findings: Sequence[Finding]) -> str:
    """The findings in a sentence."""
    warnings = [f.check for f in findings if f.verdict == "warning"]
    left_out = [f.check for f in findings if f.verdict == "left out"]
    made = len(findings) - len(left_out)
    said = (
        f"{len(warnings)} of {made} checks warn: {', '.join(warnings)}" if warnings else f"No warning of {made} checks"
    )
    return f"{said}; left out: {', '.join(left_out)}." if left_out else f"{said}."


def warnings(findings: Iterable[Finding]) -> list[str]:
    """A line for every check that warns: what it means, and what to do."""
    return [f"{f.check}: {f.meaning}. What to do: {f.remedy}." for f in findings if f.verdict == "warning"]


def markdown(findings: Sequence[Finding], *, level: int = 2) -> str:
    """The panel as Markdown, without a line break at its end.

    Args:
        findings: of a diagnosis.
        level: of its heading.
    """
    return f"{'#' * level} {TITLE}\n\n{tables.escaped(summary(findings))}\n\n{table_markdown(findings)}"


def table_markdown(findings: Iterable[Finding]) -> str:
    """The table of the panel alone, as Markdown."""
    return tables.markdown(HEADER, rows(findings), words=len(HEADER))


def table_html(findings: Sequence[Finding], *, label: str) -> str:
    """The table of the panel as a region of HTML; nothing of the findings is markup.

    A row's class is its verdict, "ok", "warning" or "left-out".

    Args:
        findings: of a diagnosis.
        label: of the region.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in HEADER)
    lines = []
    for finding, (check, *row) in zip(findings, rows(findings), strict=True):
        cells = zip(HEADER[1:], row, strict=True)
        texts = "".join(f'<td data-label="{escape(heading)}">{escape(cell)}</td>' for heading, cell in cells)
        kind = finding.verdict.replace(" ", "-")
        lines.append(f'<tr class="{kind}"><th scope="row">{escape(check)}</th>{texts}</tr>')
    return "\n".join(
        [
            f'<div class="wide diagnosis" tabindex="0" role="region" aria-label="{escape(label)}">',
            f"<table><thead><tr>{head}</tr></thead><tbody>",
            *lines,
            "</tbody></table></div>",
        ]
    )
