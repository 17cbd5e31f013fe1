"""What a run says of whether its numbers can be trusted: diagnoses as cells, attacks against each other, the panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import firstorder.evaluation.runs.trust as diagnoses
from firstorder.evaluation import Evaluation, evaluate
from firstorder.evaluation.reporting import trust
from firstorder.evaluation.runs.diagnosis import CHECKS
from firstorder.evaluation.runs.store import read

SOFT, GOOD = "pathologies:soft", "mnist-cnn"
ASKED: dict[str, Any] = {"models": [SOFT, GOOD], "data": "mnist", "count": 12, "eps": [0.1, 0.3], "attacks": "fgsm"}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """A diagnosis adds its images and its radius."""
    asked: list[tuple[int, float]] = []
    made = diagnoses.diagnose

    def noted(model: Any, x: Any, y: Any, **words: Any) -> Any:
        asked.append((len(x), words["eps"]))
        return made(model, x, y, **words)

    monkeypatch.setattr(diagnoses, "diagnose", noted)
    return asked


def run(out: Path, **given: Any) -> Evaluation:
    return evaluate({**ASKED, **given}, out)


def test_a_model_is_diagnosed_once_and_flagged(tmp_path: Path, counted: list[tuple[int, float]]) -> None:
    done = run(tmp_path)
    assert done.trust() == {SOFT: ("probabilities as outputs",), GOOD: ()}
    assert counted == [(12, 0.3)] * 2
    run(tmp_path, attacks="pgd:steps=2")
    assert len(counted) == 2, "another attack needs no other diagnosis"
    assert len(done.table()) == 2 * 2 * 12, "a diagnosis has no rows of examples"
    run(tmp_path, eps=[0.2])
    assert len(counted) == 2
    run(tmp_path, eps=[0.4])
    assert counted[2:] == [(12, 0.4)] * 2

    path = tmp_path / "report.html"
    read(tmp_path)
    done.report()
    page, text = path.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.count("Can this number be trusted?") == 1
    assert f"{SOFT}: not to be trusted: probabilities as outputs" in page
    assert "## Can this number be trusted?" in text
    for check in CHECKS:
        assert f'<th scope="row">{check.name}</th>' in page
        assert sum(line.startswith(f"| {check.name} |") for line in text.splitlines()) == 2


def test_a_damaged_diagnosis_is_made_anew(tmp_path: Path, counted: list[tuple[int, float]]) -> None:
    done = run(tmp_path, models=GOOD)
    (cell,) = read(tmp_path).diagnoses
    path = done.run.store.path(cell.key)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert diagnoses.findings(read(tmp_path), GOOD) is None
    found = run(tmp_path, models=GOOD).run
    assert len(counted) == 2
    assert len(diagnoses.findings(found, GOOD) or ()) == len(CHECKS)


def test_without_a_diagnosis_the_page_says_how_to_make_one(
    tmp_path: Path, counted: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(tmp_path / "a", models=GOOD, diagnose=False)
    done.report()
    line = "Not diagnosed: firstorder diagnose mnist-cnn --data mnist --eps 0.3 --norm Linf."
    assert line in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    free = evaluate({**ASKED, "models": GOOD, "eps": [], "norm": "L2", "attacks": "ddn:steps=2"}, tmp_path / "b")
    assert [one.missing for one in trust.panels(free.run, _rows(free))] == ["Not diagnosed: the run has no radius."]
    assert not counted

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("<no>")

    monkeypatch.setattr(diagnoses, "diagnose", fails)
    failed = run(tmp_path / "c", models=GOOD)
    assert len(failed.table()) == 2 * 12
    failed.report()
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "The diagnosis failed: RuntimeError: &lt;no&gt;" in page


def _rows(done: Evaluation) -> pd.DataFrame:
    from firstorder.evaluation.reporting import summary

    return summary.load(done.run)


def rows(reach: dict[tuple[str, float], list[float]], **more: list[bool]) -> pd.DataFrame:
    """Rows of attacks with radii on ten examples, given the smallest radius that breaks each."""
    return pd.DataFrame(
        [
            {"model": "m", "target": "m", "clean": True, "attack": attack, "eps": eps, "example": i, "reach": size,
             "unverified": more.get("unverified", [False] * 10)[i]}
            for (attack, eps), sizes in reach.items()
            for i, size in enumerate(sizes)
        ]
    )  # fmt: skip


FACTS: dict[str, Any] = {
    "specification": {"eps": [0.1, 0.2]},
    "attacks": [
        {"name": "one", "attack": "fgsm", "kind": "bounded", "steps": None},
        {"name": "many", "attack": "pgd", "kind": "bounded", "steps": 20},
        {"name": "free", "attack": "square", "kind": "autoattack", "steps": None},
    ],
}
NONE, ALL = [9.0] * 10, [0.05] * 10


def first(count: int) -> list[float]:
    return [0.05] * count + [9.0] * (10 - count)


@pytest.mark.parametrize(
    ("reach", "warned"),
    [
        ({("one", 0.1): first(3), ("many", 0.1): first(4), ("free", 0.1): first(4)}, {}),
        ({("one", 0.1): first(4), ("many", 0.1): first(1)}, {"one step against several": "3 of 10"}),
        ({("one", 0.1): first(2), ("many", 0.1): first(1)}, {}),
        ({("many", 0.1): first(2), ("free", 0.1): first(5)}, {"without gradients against with": "3 of 10"}),
        ({("one", 0.1): first(5), ("many", 0.1): first(5), ("free", 0.1): NONE}, {}),
        ({("many", 0.1): first(6), ("many", 0.2): first(2)}, {"a larger radius": "4 of 10"}),
        ({("many", 0.1): first(2), ("many", 0.2): ALL}, {}),
        ({("one", 0.1): first(6), ("one", 0.2): first(2), ("many", 0.1): ALL, ("many", 0.2): ALL}, {}),
    ],
)
def test_attacks_against_each_other(reach: dict[tuple[str, float], list[float]], warned: dict[str, str]) -> None:
    found = list(trust.of_rows(rows(reach), FACTS, "m"))
    assert {one.check: one.figure for one in found if one.verdict == "warning"} == warned
    assert all(bool(one.remedy) == (one.verdict == "warning") for one in found)


def test_breaks_that_are_not_confirmed() -> None:
    made = rows({("many", 0.1): NONE}, unverified=[True] * 4 + [False] * 6)
    (found,) = (one for one in trust.of_rows(made, FACTS, "m") if one.verdict == "warning")
    assert (found.check, found.figure) == ("breaks that were not confirmed", "4 of 10")


def test_names_in_the_panel_are_no_markup() -> None:
    page = trust.html([trust.Panel("<b>", (), "Not diagnosed: <i>")])
    assert "<b>" not in page
    assert "<i>" not in page
