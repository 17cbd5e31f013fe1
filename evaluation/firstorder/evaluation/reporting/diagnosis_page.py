"""The page of a diagnosis: can a number of this model be trusted?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from firstorder.evaluation.reporting import diagnosis, document, tables
from firstorder.evaluation.runs.diagnosis import Finding
from firstorder.files import write_text

NAME = "diagnosis"


def write(findings: Sequence[Finding], folder: Path, *, model: str, facts: Mapping[str, object]) -> list[Path]:
    """Write diagnosis.html and diagnosis.md into `folder`, and return their paths.

    Args:
        findings: of the diagnosis.
        folder: is made.
        model: which it is of.
        facts: of how it was made, by name.
    """
    header, rows = ("what", "value"), [(name, str(value)) for name, value in facts.items()]
    protocol = document.Table(title="", header=header, rows=rows, words=2)
    checks = Markup(diagnosis.table_html(findings, label=f"Checks of {model}"))
    parts = [
        document.Part(anchor="checks", title="Checks", markup=checks),
        document.Part(anchor="protocol", title="Protocol", tables=[protocol]),
    ]
    page = document.write(
        folder / f"{NAME}.html",
        over="firstorder · diagnose",
        title=diagnosis.TITLE,
        lead=f"{model}: {diagnosis.summary(findings)}",
        parts=parts,
        notices=diagnosis.warnings(findings),
        name=f"{diagnosis.TITLE} {model}",
    )
    text = f"# {tables.escaped(model)}\n\n{diagnosis.markdown(findings)}\n\n{tables.markdown(header, rows, words=2)}\n"
    write_text(folder / f"{NAME}.md", text)
    return [page, folder / f"{NAME}.md"]
