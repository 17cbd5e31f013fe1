"""`firstorder export`: a run for papers and for other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from firstorder.evaluation.names.documents import read as read_document
from firstorder.evaluation.reporting import export as exports
from firstorder.evaluation.reporting.sheets import FORMS
from firstorder.evaluation.reporting.terminal import refusing, wrote
from firstorder.evaluation.runs.store import read
from firstorder.files import write_text

MODEL_INFO = "model-info"
Format = Enum("Format", {name: name for name in (*FORMS, *exports.TEXTS, MODEL_INFO)}, type=str)  # type: ignore[misc]
Table = Enum("Table", {name: name for name in exports.TABLES}, type=str)  # type: ignore[misc]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="csv, latex (needs booktabs) and markdown of a table; json of all results, and its schema; bibtex of "
            "the attacks and of firstorder; model-info as RobustBench has it, a file for each model.",
        ),
    ] = Format["csv"],
    table: Annotated[Table, typer.Option(help="Which, in csv, latex and markdown.")] = Table["leaderboard"],
    info: Annotated[
        Path | None, typer.Option(help="YAML file with what model-info cannot know: link, authors, venue ...")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File, or folder of model-info; by default printed, RUN/model_info.")
    ] = None,
) -> None:
    """Write a run as CSV, LaTeX, Markdown, JSON, BibTeX, or RobustBench's model_info.

    It is printed where --out names no file.
    """
    with refusing():
        found = read(run)
        if form.value == MODEL_INFO:
            known = {} if info is None else read_document(info)[0]
            folder = out or run / "model_info"
            files = {folder / name: exports.written(own) for name, own in exports.model_info(found, known).items()}
        else:
            text = exports.text(found, form.value, table.value)
            if out is None:
                typer.echo(text, nl=False)
                return
            files = {out: text}
        for path, content in files.items():
            write_text(path, content)
        wrote(files)
