"""Tables in files and on the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.reporting.tables import csv_text, markdown
from firstorder.evaluation.reporting.terminal import table

ROOT = Path(__file__).parent.parent / "evaluation"


@given(st.lists(st.lists(st.text("ab|,\"' \n<é", min_size=1), min_size=2, max_size=2)))
def test_csv_is_read_back(rows: list[list[str]]) -> None:
    assert list(csv.reader(io.StringIO(csv_text(["a", "b"], rows)))) == [["a", "b"], *rows]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    ((cell, number, nothing),) = list(csv.reader(io.StringIO(csv_text(["a", "b", "c"], [[text, -0.5, None]]))))[1:]
    assert cell == f"'{text}"
    assert (number, nothing) == ("-0.5", "")
    assert csv_text([text, "b"], []) == csv_text([f"'{text}", "b"], [])


def test_markdown_shows_texts_as_they_are() -> None:
    text = markdown(["a|b", "n"], [["<b>", "1"], ["x\\y", "2"]])
    assert text == "| a\\|b | n |\n|---|---:|\n| &lt;b> | 1 |\n| x\\\\y | 2 |"
    assert markdown(["a", "b", "c"], [], words=2).endswith("|---|---|---:|")


def test_the_terminal_shows_texts_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(table(["[bold]a", "n"], [["[red]x[/red]", "1"]], title="t"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/red]" in shown
    assert "[bold]a" in shown


def test_texts_leave_out_columns_that_are_empty_throughout() -> None:
    columns = (Column("a"), Column("none"), Column("n", "d"), Column("nan", ".1f"))
    sheet = Sheet("x", "X", columns, [("x", None, 1, float("nan")), ("y", "", None, None)])
    assert sheet.markdown() == "| a | n |\n|---|---:|\n| x | 1 |\n| y | – |"
    assert r"\begin{tabular}{lr}" in sheet.latex()
    assert sheet.csv().splitlines()[0] == "a,none,n,nan"
    assert Sheet("x", "X", columns, []).markdown().startswith("| a | none | n | nan |")


def test_there_is_one_writer_of_csv() -> None:
    found = [path for path in ROOT.rglob("*.py") if "csv.writer" in (text := path.read_text()) or "to_csv" in text]
    assert [path.name for path in found] == ["tables.py"]
