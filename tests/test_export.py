"""`firstorder export`: tables, the record and its schema, citations, model_info; what a reviewer asks."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

import evaluate_models
from evaluation_runs import ATTACKS, facts, make
from firstorder.attacks import registry
from firstorder.evaluation import evaluate
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import citations
from firstorder.evaluation.reporting import export, leaderboard, provenance, summary
from firstorder.evaluation.reporting.record import Record, record
from firstorder.evaluation.reporting.sheets import Column, Sheet
from firstorder.evaluation.runs.store import Run, Store, read

ODD = ["=<script>alert(1)</script>", "+a_b & 100 % {x}\\y ~^#$ [z] * -- 中 é \"'`|"]
FORMS = ("csv", "latex", "markdown", "json", "schema", "bibtex")


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("runs") / "run", facts(ODD, list(ATTACKS), [0.1, 0.2], [0, 1], 40))


# --- tables


def test_csv_has_numbers_and_no_formula(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(export.text(run, "csv"))))
    assert [row["model"][:2] for row in rows] == ["'+", "'=", "'+", "'="]
    scores = summary.leaderboard(summary.load(run), run.facts)
    best = max((score for score in scores if score.eps == 0.1), key=lambda score: score.robust.value)
    assert float(rows[0]["robust, %"]) == pytest.approx(100 * best.robust.value, rel=1e-5)
    assert float(rows[0]["95 % low"]) == pytest.approx(100 * best.robust.interval[0], rel=1e-5)
    assert rows[0]["ε"] == "0.1"
    assert [row["rank"] for row in rows] == [row.place for row in leaderboard.rows(run, {})]
    assert rows[0]["reported, %"] == ""
    sheet = Sheet("x", "X", (Column("t"), Column("n", "+.1f")), [("@a", -1.5), ("b", float("nan"))])
    assert sheet.csv() == "t,n\n'@a,-1.5\nb,\n"
    assert sheet.markdown().splitlines()[2:] == ["| @a | -1.5 |", "| b | – |"]


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)&", line.removesuffix(r"\\"))


def check_latex(text: str, columns: int) -> None:
    """Groups and environments are closed, every row has all cells, and no character is left that is a command."""
    assert re.findall(r"\\(?:begin|end)\{(\w+)\}", text) == ["table", "tabular", "tabular", "table"]
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line.strip() for line in body.splitlines() if line.endswith(r"\\")]
    assert all(len(cells(row)) == columns for row in rows)
    bare = re.sub(r"\$\\?[A-Za-z-]+\$|\\[A-Za-z]+|\\[&%$#_{}\\]", "", text.split("\n", 1)[1])
    assert not re.search(r'[$#_^~%<>|"`]', re.sub("&", "", bare).replace("tab:", "")), bare
    assert not re.search(r"^\s*[\[*]", body, flags=re.M)
    assert not re.search("[^\x00-\u017f]", text)


@pytest.mark.parametrize("name", export.TABLES)
def test_latex_compiles(run: Run, name: str, tmp_path: Path) -> None:
    text = export.text(run, "latex", name)
    sheet = export.TABLES[name](run)
    known = [any(value == value and value not in (None, "") for value in own) for own in zip(*sheet.rows, strict=True)]
    check_latex(text, sum(column.text and own for column, own in zip(sheet.columns, known, strict=True)))
    assert text.count(r"\\" + "\n") == 1 + len(sheet.rows)
    if shutil.which("pdflatex"):
        (tmp_path / "a.tex").write_text(
            f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{text}\\end{{document}}", "utf-8"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]


def test_latex_shows_every_character() -> None:
    text = Sheet("x", "X", (Column("a"),), [(ODD[1],)]).latex()
    assert (
        r"+a\_b \& 100 \% \{x\}\textbackslash{}y \textasciitilde{}\textasciicircum{}\#\$ {[}z{]} {*} -{}- U+4E2D é "
        r"\char34{}'\char96{}\textbar{} \\"
    ) in text


def test_a_sheet_of_a_page_copies_itself_and_is_text(run: Run) -> None:
    page = export.leaderboard(run).html()
    assert "<script>" not in page
    assert page.count("data-copy=") == page.count("<textarea") == 3
    for form in ("csv", "latex", "markdown"):
        assert f'data-copy="{form}"' in page
    assert '<section class="sheet" id="leaderboard"' in page
    assert 'href="#leaderboard"' in page


# --- the record


@pytest.mark.skipif(
    "additionalProperties" not in TypeAdapter(dict[str, Any]).json_schema(),
    reason="an older pydantic writes the same schema in other words",
)
def test_the_schema_is_the_records() -> None:
    shipped = json.loads(export.SCHEMA.read_text(encoding="utf-8"))
    assert shipped == Record.model_json_schema(), "write it anew, under another number if a field went or changed"


def test_the_record_is_what_the_schema_says(run: Run) -> None:
    found = json.loads(export.text(run, "json"))
    assert found["format"] == "firstorder-record/1"
    scores = {(score.model, score.eps): score for score in summary.leaderboard(summary.load(run), run.facts)}
    assert len(found["results"]) == len(scores) == 4
    for result in found["results"]:
        score = scores[result["model"], result["eps"]]
        assert result["robust"]["value"] == pytest.approx(score.robust.value)
        assert [one["attack"] for one in result["attacks"]] == [one.attack for one in score.attacks]
    assert Record.model_validate(found) == record(run)
    for path in ("norm", "results", "bibtex"):
        with pytest.raises(ValidationError):
            Record.model_validate({key: value for key, value in found.items() if key != path})
    with pytest.raises(ValidationError):
        Record.model_validate({**found, "norm": "L7"})


def test_the_record_validates_elsewhere(run: Run) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema, found = json.loads(export.text(run, "schema")), json.loads(export.text(run, "json"))
    jsonschema.validate(found, schema)
    found["results"][0]["robust"]["value"] = 1.5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema)


def described(schema: dict[str, Any]) -> list[str]:
    parts = [schema, *schema["$defs"].values()]
    return [part["title"] for part in parts if "description" not in part]


def test_the_schema_is_documented() -> None:
    assert described(json.loads(export.SCHEMA.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("form", [*FORMS, "model-info"])
def test_runs_of_earlier_versions_are_refused_with_the_remedy(form: str, tmp_path: Path) -> None:
    Store(tmp_path / "run").write({**facts(["a"], ["FGSM"], [0.1], [0], 20), "format": 3})
    done = invoke("export", tmp_path / "run", "--format", form)
    if form in ("schema", "bibtex"):
        assert done.exit_code == 0
    else:
        assert done.exit_code == 2
        assert "firstorder evaluate --out" in done.stderr


def test_the_command_prints_or_writes(run: Run, tmp_path: Path) -> None:
    folder = run.store.folder
    for form in FORMS:
        done = invoke("export", folder, "--format", form)
        assert done.exit_code == 0, done.output
        assert done.stdout == export.text(run, form)
        assert invoke("export", folder, "--format", form, "--out", tmp_path / form).exit_code == 0
        assert (tmp_path / form).read_text(encoding="utf-8") == done.stdout
    assert invoke("export", folder, "--table", "limits").stdout.startswith("about,what is not known\n")
    done = invoke("export", tmp_path)
    assert done.exit_code == 2
    assert "holds no run" in done.stderr


# --- RobustBench


def test_model_info_is_robustbenchs(tmp_path: Path) -> None:
    """The fields of its own files, read by its own leaderboard."""
    found = facts(["One", "b/../c"], ["PGD-40", "AutoAttack"], [8 / 255], [0], 50)
    found["attacks"][1]["attack"] = "AutoAttack standard"
    found["data"]["spec"] = "cifar10:DIR"
    run = make(tmp_path / "run", found)
    known = tmp_path / "known.yaml"
    known.write_text("authors: A. Author\nadditional_data: false\nvenue: NeurIPS 2099\n")
    done = invoke("export", run.store.folder, "--format", "model-info", "--info", known, "--out", tmp_path / "info")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "info/cifar10/Linf").iterdir()) == ["One.json", "b-..-c.json"]
    info = json.loads((tmp_path / "info/cifar10/Linf/One.json").read_text())
    needed = {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture"}
    needed |= {"eps", "clean_acc", "reported", "autoattack_acc"}
    assert needed <= set(info) <= needed | {"external", "footnote", "unreliable"}
    (score, _) = summary.leaderboard(summary.load(run), run.facts)
    (own,) = (one for one in score.attacks if one.attack == "AutoAttack")
    assert float(info["autoattack_acc"]) == pytest.approx(100 * own.robust.value, abs=0.005)
    assert float(info["clean_acc"]) == pytest.approx(100 * score.clean.value, abs=0.005)
    assert (info["eps"], info["authors"], info["additional_data"]) == ("8/255", "A. Author", False)
    assert "On 50 images" in info["footnote"]


def test_model_info_needs_autoattack_at_one_radius(run: Run, tmp_path: Path) -> None:
    done = invoke("export", run.store.folder, "--format", "model-info")
    assert done.exit_code == 2
    assert "--attack autoattack" in done.stderr
    found = facts(["a"], ["AutoAttack"], [0.1, 0.2], [0], 20)
    found["attacks"][0]["attack"] = "AutoAttack standard"
    done = invoke("export", make(tmp_path / "run", found).store.folder, "--format", "model-info")
    assert done.exit_code == 2
    assert "--only --eps" in done.stderr


# --- citations


def test_every_attack_of_ours_has_its_papers() -> None:
    ours = {name for name, source in registry().sources.items() if source.startswith("firstorder")}
    assert ours == set(citations.ATTACKS)
    assert {key for keys in citations.ATTACKS.values() for key in keys} <= set(citations.PAPERS)
    for name in ours:
        paper = registry().classes[name].paper
        first = citations.PAPERS[citations.ATTACKS[name][0]]
        surname = first.authors.split(", ")[0].rpartition(" ")[2]
        assert surname in paper or "NGM" in paper, (name, paper)
        year = re.search(r"\b(20\d\d)\b", paper.partition(";")[0])
        assert year is None or abs(int(year[1]) - first.year) <= 1 or "NGM" in paper, (name, paper)
        assert ("NGM" in paper) == ("ngm2024provable" in citations.ATTACKS[name])


def test_keys_are_of_the_first_author_and_the_year() -> None:
    for key, paper in citations.PAPERS.items():
        assert str(paper.year) in key
        assert paper.authors == "Anonymous" or key.startswith(paper.authors.split(", ")[0].rpartition(" ")[2].lower())
    assert list(citations.PAPERS) == sorted(citations.PAPERS)


def test_bibtex_has_each_paper_once_and_the_package() -> None:
    text = citations.bibtex(
        [*citations.keys("pqgd"), *citations.keys("AutoAttack standard"), *citations.keys("apgd-t")]
    )
    assert re.findall(r"^@\w+\{(\w+),$", text, flags=re.M) == [
        "liu2020sharper", "croce2020reliable", "croce2020fab", "andriushchenko2020square", "firstorder",
    ]  # fmt: skip
    assert text.count("{") == text.count("}")
    assert "author = {Zhuanghua Liu and Ivor W. Tsang}" in text
    assert citations.keys("apgd-ce+fab-t") == ("croce2020reliable", "croce2020fab")
    assert citations.keys("a-strangers") == ()


# --- what a reviewer asks


def test_a_run_records_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", **evaluate_models.arrays(20))
    words = ("evaluate", "--model", "evaluate_models:linear", "--data", "images.npz", "--eps", "0.1", "--count", "10")
    for attack in ("fgsm", "fgsm", "pgd:steps=4,alpha=eps/2"):
        monkeypatch.setattr("sys.argv", ["firstorder", *words, "--attack", attack])
        done = invoke(*words, "--attack", attack, "--out", "run")
        assert done.exit_code == 0, done.output
    entries = dict(provenance.provenance(found := read(Path("run"))).rows)
    assert len(found.facts["calls"]) == 2  # the same call again is no other
    assert entries["command 1"].endswith("--attack fgsm")
    assert "pgd:steps=4" in entries["command 2"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entries["date 1"])
    assert re.search(r"cores \d+", entries["hardware 1"])
    assert "threads" in entries["settings of torch 1"]
    assert entries["first step size of pgd:steps=4,alpha=eps/2, ε = 0.1"] == "0.05"
    assert found.facts["data"]["digest"] in entries["data"]
    assert found.facts["models"][0]["digest"] in entries["model evaluate_models:linear"]
    assert "torch" in entries["versions"]
    limits = dict(provenance.limits(found).rows)
    assert limits["adaptive attacks"].startswith("none")
    assert "fgsm" in limits["restarts"]
    assert limits["images"].startswith("10: the first ones")
    assert limits["audit"].startswith("none")
    assert "AutoAttack" in limits
    assert "cells" not in limits


def test_the_limits_are_those_of_what_was_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = dict(provenance.limits(run).rows)
    assert limits["restarts"] == "every attack ran with 2 seeds, and an image counts as robust if it withstands all"
    wide = [high - low for low, high in (s.robust.interval for s in summary.leaderboard(summary.load(run), run.facts))]
    assert f"up to {100 * max(wide):.1f} points wide" in limits["images"]
    assert limits["radii"].startswith("0.1, 0.2 in Linf; between them minimum-norm attacks alone count")
    assert not {"cells", "goal", "precision", "random models", "verdict"} & set(limits)
    assert dict(provenance.provenance(run).rows)["date"].startswith("not recorded")  # made before that was
    found = facts(["a"], ["AutoAttack", "FGSM"], [0.1], [0], 20)
    found["attacks"][0] |= {"attack": "AutoAttack standard"}
    found["attacks"][1] |= {"source": "strangers-attacks 1.0"}
    found["models"][0] |= {"precision": "bfloat16"}
    found["specification"] |= {"targeted": True, "random": True}
    limits = dict(provenance.limits(make(tmp_path / "other", found, unfinished=["00-01"])).rows)
    assert "FGSM were adapted to these models is not known" in limits["adaptive attacks"]
    assert {"goal", "random models", "precision"} <= set(limits)
    assert not {"black-box attacks", "AutoAttack"} & set(limits)
    assert limits["cells"].startswith("1 of 2 are not finished")
    assert "nothing is known between or above them" in limits["radii"]


def test_a_verdict_and_its_audit_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluate(
        {"models": "mnist-cnn", "data": "mnist", "count": 5, "eps": 0.3, "attacks": "verdict"}, tmp_path / "run"
    ).run
    limits = dict(provenance.limits(found).rows)
    assert "robust examples were attacked to the end" in limits["verdict"]
    assert "populations" in limits
    assert limits["audit"].startswith("none")
