"""`firstorder reproduce`: the items of the papers, how claims are read, and every item at its smallest size."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from firstorder.evaluation.cli import COMMANDS, app
from firstorder.evaluation.commands import reproduce as command
from firstorder.evaluation.names.papers import Claim, Item, item, items
from firstorder.evaluation.reporting import intervals, paper_page, paper_tables, readings
from firstorder.evaluation.reporting.paper_tables import Row, Table
from firstorder.evaluation.reporting.readings import read, together
from firstorder.evaluation.runs import seals
from samples import sampled

COMPUTED = [name for name, one in items().items() if one.kind != "command"]
COUNTS = {
    "liu2020sharper": 15, "lin2020nesterov": 12, "ngm2024provable": 12, "liu2021selfadaptive": 15,
    "dabouei2022revisiting": 20,
}  # fmt: skip


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["reproduce", *map(str, words)])


def table(binary: bool = True, **rows: list[float]) -> Table:
    return Table("t", "accuracy, %", tuple(Row(name, np.array(values)) for name, values in rows.items()), binary)


def shares(right: int, n: int = 100) -> list[float]:
    return [100.0] * right + [0.0] * (n - right)


# --- the items


def test_every_item_is_there() -> None:
    assert Counter(one.paper for one in items().values()) == COUNTS
    assert len({(one.paper, one.item) for one in items().values()}) == len(items())
    for name, one in items().items():
        assert re.fullmatch(r"(qg|nag|ngm|anu|engm)-[a-z0-9-]+", name)
        assert one.kind == "command" or (one.cost and (one.published or one.theirs)), name


@pytest.mark.parametrize("name", [name for name, one in items().items() if one.command])
def test_commands_of_items_exist(name: str) -> None:
    for words in (part.split() for part in items()[name].command.split("; ")):
        if words[0] == "pytest":
            assert all(Path(path).exists() for path in words[1:])
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]) is not None
        else:
            assert words[0] == "firstorder"
            assert words[1] in COMMANDS


def test_items_that_do_not_fit() -> None:
    given: dict[str, Any] = {"paper": "liu2020sharper", "item": "Fig. 1", "shows": "something"}
    claim = {"says": "a", "more": "x", "than": "y"}
    for wrong, message in (
        ({}, "name a command, or the reason"),
        ({"command": "firstorder demo", "reading": "differs"}, "give the reason"),
        ({"kind": "run", "claims": [claim]}, "has a specification and claims"),
        ({"kind": "run", "claims": [claim], "specification": {"data": "mnist"}, "command": "a"}, "no command"),
        ({"command": "a", "paper": "nobody"}, "not among the citations"),
    ):
        with pytest.raises(ValidationError, match=message):
            Item(**{**given, **wrong})
    for wrong_claim in ({"says": "a"}, {"says": "a", "more": "x"}, {**claim, "rising": ["x", "y"]}):
        with pytest.raises(ValidationError, match="more and than"):
            Claim(**wrong_claim)
    with pytest.raises(ValueError, match="no item 'qg-fig44'; did you mean qg-fig4"):
        item("qg-fig44")


# --- readings


def test_larger_agrees_differs_or_is_undecided() -> None:
    rows = table(a=shares(90), b=shares(50), c=shares(89))
    for more, than, reading in (("a", "b", "agrees"), ("b", "a", "differs"), ("a", "c", "undecided")):
        found = read(Claim(says="x", more=more, than=than), rows)
        assert found.reading == reading
        assert found.low <= found.value <= found.high
    found = read(Claim(says="x", more="a", than="b"), rows)
    low, high = intervals.paired(50, 40, 0, 10)
    assert (found.value, found.low, found.high) == pytest.approx((40, 100 * low, 100 * high))


def test_equal_needs_an_interval_within_the_bounds() -> None:
    first = [float(i % 7) for i in range(200)]
    rows = table(False, a=first, b=[x + 0.1 * (-1) ** i for i, x in enumerate(first)], c=[x + 3 for x in first])
    assert read(Claim(says="x", same="a", within=0.1, **{"as": "b"}), rows).reading == "agrees"
    assert read(Claim(says="x", same="a", within=0.01, **{"as": "b"}), rows).reading == "undecided"
    assert read(Claim(says="x", same="a", within=1, **{"as": "c"}), rows).reading == "differs"


def test_a_difference_that_does_not_count() -> None:
    first = [float(i % 7) for i in range(200)]
    rows = table(False, a=first, b=[x - 0.05 + 0.1 * (-1) ** i for i, x in enumerate(first)])
    high = 0.05 + intervals.student(199) * 0.1 * math.sqrt(200 / 199) / math.sqrt(200)
    back = Claim(says="x", more="b", than="a")
    assert read(Claim(says="x", more="a", than="b", least=5), rows).reading == "agrees"  # however small it is
    noise = table(False, a=first, b=[x + 0.1 * (-1) ** i for i, x in enumerate(first)])
    assert read(Claim(says="x", more="a", than="b"), noise).reading == "undecided"
    for least, reading in ((0.013, "undecided"), (0.015, "differs")):
        found = read(Claim(says="x", more="a", than="b", least=least), noise)
        assert (found.reading, found.least) == (reading, least)
        assert found.high == pytest.approx(high - 0.05)
    for theirs, least in ((0.04, 0.02), (0.02, 0.01)):
        found = read(back, noise, {"b": 1 + theirs, "a": 1.0})
        assert found.least == pytest.approx(least)
        assert found.reading == ("differs" if least == 0.02 else "undecided")
    assert read(back, noise, {"b": 1.0, "a": 2.0}).least is None  # the paper's own figures say otherwise
    assert read(back, noise, {"b": 1.0}).least is None
    for claim in (Claim(says="x", rising=("a", "c", "b")), Claim(says="x", falling=("b", "c", "a"))):
        assert claim.smallest({"a": 1.0, "b": 4.0}) == 1.5
        assert claim.smallest({"a": 4.0, "b": 1.0}) is None
    assert Claim(says="x", more=("a", "b"), than=("c", "d")).smallest({"a": 9, "b": 1, "c": 5, "d": 3}) == 3
    assert Claim(says="x", more=10, than="a").smallest({"a": 4}) == 3
    assert Claim(says="x", same="a", within=1, **{"as": "b"}).smallest({"a": 4, "b": 1}) is None


def test_norms_are_in_proportion_to_the_papers() -> None:
    one = items()["anu-table1-imagenet"]
    theirs = one.published["DDN, 50 steps"] - one.published["ANU, 50 steps"]
    values = {name: [value / 2, value / 2 + 0.01] for name, value in one.published.items()}
    found = readings.result(one, [table(False, **values)], small=False, version="0")
    share = sum(map(sum, values.values())) / 2 / sum(one.published.values())
    assert found.findings[0][0]["least"] == pytest.approx(theirs / 2 * share)
    assert 0.5 < share < 0.6


def test_orders() -> None:
    rows = table(a=shares(10), b=shares(50), c=shares(90), d=shares(49))
    assert read(Claim(says="x", rising=("a", "b", "c")), rows).reading == "agrees"
    assert read(Claim(says="x", falling=("c", "b", "a")), rows).reading == "agrees"
    assert read(Claim(says="x", falling=("a", "b", "c")), rows).reading == "differs"
    assert read(Claim(says="x", rising=("a", "c", "b")), rows).reading == "differs"  # the ends agree
    assert read(Claim(says="x", rising=("a", "b", "d")), rows).reading == "agrees"  # b and d are the same to chance
    assert read(Claim(says="x", rising=("b", "d")), rows).reading == "undecided"


def test_differences_of_differences() -> None:
    rows = table(a=shares(90), b=shares(50), c=shares(90), d=shares(85))
    assert read(Claim(says="x", more=("a", "b"), than=("c", "d")), rows).reading == "agrees"
    assert read(Claim(says="x", more=("c", "d"), than=("a", "b")), rows).reading == "differs"


def test_a_number_in_place_of_a_row() -> None:
    rows = table(False, a=[8.0, 9.0, 8.5], b=[8.0, 9.0, 14.0])
    assert read(Claim(says="x", more=10, than="a"), rows).reading == "agrees"
    assert read(Claim(says="x", more="a", than=10), rows).reading == "differs"
    assert read(Claim(says="x", more=10, than="b"), rows).reading == "undecided"
    assert Claim(says="x", more=10, than="a").rows == ["a"]


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no row 'z'; it has a, b"):
        read(Claim(says="x", more="a", than="z"), table(a=[1.0], b=[2.0]))


def test_intervals_of_few_units_are_students() -> None:
    value, low, high = readings.interval(np.array([3.0, 5.0, 4.0]), np.zeros(3))
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)  # the quantile of two degrees of freedom in closed form
    assert (value, low, high) == pytest.approx((4, 4 - half, 4 + half))
    assert intervals.student(10**7) == pytest.approx(intervals.Z, rel=1e-6)
    assert readings.interval(np.array([3.0]), np.array([1.0])) == (2.0, -math.inf, math.inf)
    missing = readings.interval(np.array([3.0, math.nan, 5.0]), np.array([1.0, 2.0, math.nan]))
    assert missing == (2.0, -math.inf, math.inf)


def test_shares_that_are_all_the_same_have_an_interval() -> None:
    both = [100.0] * 20 + [50.0] * 10 + [0.0] * 10
    value, low, high = readings.interval(np.array(both), np.array(both), binary=True)
    one, other = intervals.paired(20, 0, 0, 20)
    assert (value, low, high) == pytest.approx((0, 100 * one, 100 * other))
    assert 2 < high < 6
    rows = table(a=both, b=both)
    assert read(Claim(says="x", same="a", within=1, **{"as": "b"}), rows).reading == "undecided"


def test_a_mean_says_of_how_many_where_not_all_have_a_value() -> None:
    one = items()["anu-fig3"]
    values = {row: [1.0, 2.0, 4.0] for claim in one.claims for row in claim.rows}
    tables = [table(False, **{**values, "DDN, 20 steps": [1.0, math.nan, 2.0]})]
    found = readings.result(one, tables, small=False, version="0")
    assert found.tables[0]["of"] == {"DDN, 20 steps": 2}
    assert found.findings[0][0]["value"] == -1  # over the two that both have
    text = readings.text("anu-fig3", one, found)
    assert "| DDN, 20 steps | 1.5 (of 2) |" in text
    assert "| ANU, 20 steps | 2.333 |" in text


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_reading_of_the_opposite_is_the_opposite(pairs: list[tuple[bool, bool]]) -> None:
    rows = table(a=[100.0 * a for a, _ in pairs], b=[100.0 * b for _, b in pairs])
    one = read(Claim(says="x", more="a", than="b"), rows).reading
    other = read(Claim(says="x", more="b", than="a"), rows).reading
    assert {"agrees": "differs", "differs": "agrees", "undecided": "undecided"}[one] == other


def test_together() -> None:
    assert together(["agrees", "agrees"]) == "agrees"
    assert together(["agrees", "differs", "undecided"]) == "differs"
    assert together(["agrees", "undecided"]) == together([]) == "undecided"


# --- computing


def kind(row: tuple[Any, ...]) -> str:
    return items()[row[0]].kind


def in_percent(unit: str, row: str) -> bool:
    return "%" in unit and not row.endswith(("overfitting", "seconds", "like the raw"))


@pytest.mark.parametrize("name", sampled([(name,) for name in COMPUTED], every=20, group=kind))
def test_an_item_at_its_smallest_size(name: str, tmp_path: Path) -> None:
    done = invoke(name, "--small", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    one, folder = items()[name], tmp_path / name
    found = json.loads((folder / "reading.json").read_text())
    assert found["small"]
    assert found["reading"] in ("agrees", "differs", "undecided")
    for own, kept in zip(found["findings"], found["tables"], strict=True):
        assert [finding["says"] for finding in own] == [claim.says for claim in one.claims]
        assert set(one.published) <= set(kept["rows"])
        assert all(
            value is None or 0 <= value <= 100 for row, value in kept["rows"].items() if in_percent(kept["unit"], row)
        )
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "reading.md").read_text()
    assert all(claim.says in text for claim in one.claims)
    with pytest.raises(ValueError, match="holds no results"):
        paper_page.record(tmp_path)


def minutes(cost: str) -> float:
    number, unit = re.match(r"(\d+) (s|min)\b", cost).groups()  # type: ignore[union-attr]
    return float(number) / (60 if unit == "s" else 1)


SHORT = [
    name for name in paper_page.recorded() if not items()[name].needs and re.match(r"\d", items()[name].cost)
    and minutes(items()[name].cost) < 10
]  # fmt: skip


@pytest.mark.parametrize("name", sampled([(name,) for name in SHORT], every=len(SHORT), group=len))
def test_what_is_published_is_found_again(name: str, tmp_path: Path) -> None:
    """The items that take less than ten minutes, on the packaged models and images."""
    kept = paper_page.recorded()[name]
    done = invoke(name, *(("--count", kept["count"]) if kept.get("count") else ()), "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / name / "reading.json").read_text())
    assert found["reading"] == kept["reading"]
    for own, before in zip(found["tables"], kept["tables"], strict=True):
        assert own["title"] == before["title"]
        assert own["rows"] == pytest.approx(before["rows"], rel=0.03, abs=0.01)


def test_a_run_goes_on_and_takes_other_models_and_images(tmp_path: Path) -> None:
    words = ("qg-sec45", "--small", "--out", tmp_path, "--model", "mnist-cnn-natural", "--count", 5)
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    assert "qg-sec45: mnist-cnn-natural, 5 images of MNIST\n" in first.output
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "qg-sec45").rglob("*.parquet")}
    assert cells
    assert invoke(*words).output.count("examples/s") == 0
    assert {path: path.stat().st_mtime_ns for path in cells} == cells


def test_the_worst_of_several_runs_in_both_senses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    right = {0: [1, 1, 0, 0], 1: [1, 0, 0, 0], 2: [0, 1, 1, 1]}
    rows = [
        {"model": "m", "attack": "a", "eps": 0.3, "seed": seed, "example": i, "clean": True, "success": not value}
        for seed, values in right.items()
        for i, value in enumerate(values)
    ]
    facts = {
        "specification": {"eps": [0.3], "seeds": [0, 1, 2]}, "models": [{"name": "m"}], "attacks": [{"name": "a"}],
        "data": {"count": 4, "name": "d"},
    }  # fmt: skip
    monkeypatch.setattr(paper_tables.summary, "load", lambda run: pd.DataFrame(rows))
    (found,) = paper_tables.accuracies(type("Run", (), {"facts": facts})(), worst=True)  # type: ignore[arg-type]
    means = {row.name: row.mean for row in found.rows}
    assert means == pytest.approx({"a": 100 * 6 / 12, "a, lowest run": 25, "a, merged": 0})
    assert found.title == "m, 4 images of d, 3 seeds"


def test_mistakes_are_one_line() -> None:
    for words, message in (
        (("qg-fig4x",), "error: the papers have no item 'qg-fig4x'; did you mean qg-fig4?"),
        (("qg-table4",), "error: qg-table4 needs --data fashion-mnist:DIR; add it"),
        (("qg-sec35",), "error: qg-sec35 is shown by a command of its own: firstorder bench --family bounded"),
        (("engm-table4",), "error: engm-table4 is out of reach: weeks of a GPU"),
    ):
        done = invoke(*words)
        assert (done.exit_code, done.stderr.strip()) == (2, message)


# --- the list and the page


def result(reading: str, small: bool = False) -> dict[str, Any]:
    one = items()["qg-sec45"]
    rows = {name: 50.0 + i for i, name in enumerate(dict.fromkeys(row for claim in one.claims for row in claim.rows))}
    findings = [{"says": claim.says, "value": 1.0, "low": 0.5, "high": 2.0, "reading": reading} for claim in one.claims]
    tables = [{"title": "m, 3 images of d", "unit": "accuracy, %", "rows": rows}]
    return {"reading": reading, "tables": tables, "findings": [findings], "small": small, "version": "0"}


def test_what_was_computed_is_in_the_list_and_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_page, "recorded", dict)
    folder, into = tmp_path / "qg-sec45", tmp_path / "readings.json"
    folder.mkdir()
    before = invoke("list", "--out", tmp_path / "none").output
    (folder / "reading.json").write_text(json.dumps(result("differs", small=True)))
    assert invoke("--out", tmp_path).output == before
    (folder / "reading.json").write_text(json.dumps(result("differs")))
    (line,) = (line for line in invoke("list", "--out", tmp_path).output.splitlines() if "qg-sec45" in line)
    assert line.rstrip().endswith("differs")
    assert paper_page.record(tmp_path, into) == into
    kept = json.loads(into.read_text())
    assert kept == {"qg-sec45": result("differs")}
    sealed = seals.to_json(result("differs"), "qg-sec45")
    (folder / "reading.json").write_text(sealed)
    paper_page.record(tmp_path, into)
    assert json.loads(into.read_text()) == kept
    for text in (sealed.replace("50.0", "60.0"), seals.to_json(result("differs"), "qg-fig4"), sealed[:100], "{}"):
        (folder / "reading.json").write_text(text)
        with pytest.raises(ValueError, match=r"reading\.json is damaged, or no reading of qg-sec45; delete it"):
            paper_page.record(tmp_path, into)
        assert "is damaged" in invoke("list", "--out", tmp_path).stderr
    monkeypatch.setattr(paper_page, "recorded", lambda: kept)
    text = section("qg-sec45")
    assert "**Differs.**" in text
    assert "`firstorder reproduce qg-sec45`; cost: 2 min" in text
    assert "m, 3 images of d:\n\n| row | accuracy, % |\n|---|---:|\n| b = 1 | 50 |\n| b = 10 | 51 |" in text
    assert text.count("| 1 | 0.5 to 2 | differs |") == len(items()["qg-sec45"].claims)
    assert (
        "| [Sec. 4.5](#qg-sec45) | b below 100 gains little, 100 to 1000 most, more than 1000 nothing more | differs |"
        in (paper_page.page())
    )
    kept["qg-sec45"] |= {"count": 7}
    kept["qg-sec45"]["tables"][0]["of"] = {"b = 1": 2}
    kept["qg-sec45"]["tables"] *= 2
    kept["qg-sec45"]["findings"].append(
        [{**one, "reading": "agrees", "least": 0.25} for one in result("")["findings"][0]]
    )
    text = section("qg-sec45")
    assert "`firstorder reproduce qg-sec45 --count 7`" in text
    assert text.count("m, 3 images of d:") == text.count("| b = 1 | 50 (of 2) |") == 2
    assert text.count("| 1 | 0.5 to 2 | 0.25 | agrees |") == len(items()["qg-sec45"].claims)


def test_the_sections_of_items_without_figures() -> None:
    assert "`pytest tests/test_training_methods.py`\n\nHere: on vectors of heavy tails." in section("engm-theorem1")
    assert "**Out of reach.**\n\nWeeks of a GPU." in section("engm-table4")
    assert "`--data fashion-mnist:DIR`; cost" in section("qg-table4")
    assert "with `--model` of a robust CIFAR-10 network; cost" in section("qg-table6")
    assert "| PGD, merged | 92 | 89.49 |" in section("qg-table3")
    assert "In the paper: a picture of one image; here the mean of 500." in section("anu-fig3")


def section(name: str) -> str:
    """What the page says of an item."""
    return paper_page.page().partition(f"\n### {name}\n\n")[2].partition("\n#")[0]


@pytest.mark.parametrize("name", paper_page.recorded())
def test_the_commands_of_the_page_are_those_of_its_figures(name: str) -> None:
    """A record has the images and seeds that its command takes, and claims as they are read now."""
    one, kept = items()[name], paper_page.recorded()[name]
    for shown, own in zip(kept["tables"], kept["findings"], strict=True):
        seeds, images = (re.search(rf"(\d+) {unit}", shown["title"]) for unit in ("seeds", "images"))
        if one.kind == "study":
            assert seeds
            assert int(seeds[1]) == len(one.specification["seeds"])
        count = kept.get("count") or one.specification.get("count")
        assert not (images and count) or int(images[1]) == count
        assert [finding["says"] for finding in own] == [claim.says for claim in one.claims]
        if one.kind != "norms":
            for claim, finding in zip(one.claims, own, strict=True):
                least = claim.smallest(one.published)
                none_left = least is not None and finding["high"] is not None and finding["high"] < least
                assert finding["reading"] != "undecided" or not none_left


def test_the_page_is_that_of_the_record() -> None:
    assert Path("docs/papers.md").read_text(encoding="utf-8") == paper_page.page()
    assert set(paper_page.recorded()) <= set(COMPUTED)
    assert not any(one["small"] for one in paper_page.recorded().values())
    text = paper_page.page()
    assert all(f"](#{name}) |" in text and f"\n### {name}\n" in text for name in items())
    assert command.PAGE == "page"
