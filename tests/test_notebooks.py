"""The notebooks: they run, give what is stored in them, and become pages."""

from __future__ import annotations

import copy
import importlib
import re
import struct
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that runs them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    return importlib.import_module("notebooks")


def same(stored: str, found: str) -> bool:
    """Whether two texts have the same words, and numbers that another processor's rounding explains.

    That is 5 % of a number, and of shares 5 points: steps of training and of attacks amplify the last bit.
    """
    if re.sub(r"\s+", " ", NUMBER.sub("#", stored)) != re.sub(r"\s+", " ", NUMBER.sub("#", found)):
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(found), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.05 * float(a), 5 if "%" in stored else 0.05) for a, b in pairs)


def compare(module: ModuleType, stored: list[list[Any]], found: list[list[Any]]) -> None:
    """Raise an AssertionError where outputs are not those that are stored."""
    assert len(stored) == len(found)
    for expected, outputs in zip(stored, found, strict=True):
        assert [one["output_type"] for one in expected] == [one["output_type"] for one in outputs]
        for one, other in zip(expected, outputs, strict=True):
            assert same(module.text(one), module.text(other)), (
                f"stored: {module.text(one)}\nfound: {module.text(other)}"
            )
            sizes = [struct.unpack(">II", png[16:24]) for png in map(module.picture, (one, other)) if png]
            assert len(sizes) in (0, 2)
            if sizes:
                assert all(abs(a - b) <= 8 for a, b in zip(*sizes, strict=True)), "pictures of different sizes"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path: Path, notebooks: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert path.stat().st_size < 100_000
    notebook = notebooks.read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = notebooks.execute(notebook)
    stored = [cell["outputs"] for cell in notebooks.code(notebook)]
    compare(notebooks, stored, found)
    changed = copy.deepcopy(stored)
    last = next(one for outputs in reversed(changed) for one in outputs if one["output_type"] == "stream")
    last["text"] = [NUMBER.sub(lambda digits: f"{float(digits[0]) * 2 + 20}", line) for line in last["text"]]
    with pytest.raises(AssertionError, match="stored"):
        compare(notebooks, changed, found)
    assert not any(tmp_path.iterdir()), "a notebook leaves no files"


def test_there_are_three() -> None:
    assert [path.stem for path in PATHS] == ["attack-and-look", "engm", "leaderboard"]


def cell(source: str, kind: str = "code") -> dict[str, Any]:
    return {"cell_type": kind, "source": source.splitlines(keepends=True)}


def test_outputs_are_those_of_jupyter(notebooks: ModuleType) -> None:
    cells = [
        cell("# words", "markdown"),
        cell("a = 2\nprint('two')\nprint(a)"),
        cell("print(a)\na + 1"),
        cell("None"),
        cell("from matplotlib import pyplot as plt\nfigure = plt.figure(figsize=(1, 1), dpi=50)"),
    ]
    printed, both, nothing, drawn = notebooks.execute({"cells": cells})
    assert [notebooks.text(one) for one in printed] == ["two\n2\n"]
    assert [notebooks.text(one) for one in both] == ["2\n", "3"]
    assert nothing == []
    (figure,) = drawn
    assert notebooks.picture(figure).startswith(b"\x89PNG")
    assert notebooks.text(figure) == ""


def test_an_error_in_a_cell_is_raised(notebooks: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError):
        notebooks.execute({"cells": [cell("a = 0"), cell("1 / a")]})


@pytest.mark.parametrize(
    ("stored", "found", "expected"),
    [
        ("robust: 70%", "robust: 71%", True),
        ("robust: 70%", "robust: 80%", False),
        ("norm 2.27", "norm 2.30", True),
        ("norm 2.27", "norm 2.87", False),
        ("equal: True", "equal: False", False),
        ("1", "1 2", False),
    ],
)
def test_texts_are_compared(stored: str, found: str, expected: bool) -> None:
    assert same(stored, found) is expected


def test_a_page_has_cells_outputs_and_pictures(notebooks: ModuleType) -> None:
    text, pictures = notebooks.page(PATHS[0])
    assert text.startswith("# Attack and look\n")
    assert "```python\nimport torch" in text
    assert "```text\n100 images of shape (1, 28, 28)" in text
    assert "{download}`attack-and-look.ipynb" in text
    assert list(pictures) == re.findall(r"!\[Figure \d\]\(([^)]+)\)", text)
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
