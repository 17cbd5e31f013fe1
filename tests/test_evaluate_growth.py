"""A run that is called again: what it keeps, gets and loses, and what is said of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import evaluate_models
from firstorder.evaluation.cli import app
from firstorder.evaluation.reporting import summary
from firstorder.evaluation.runs import computing
from firstorder.evaluation.runs.computing import begin
from firstorder.evaluation.runs.growth import Growth, grown
from firstorder.evaluation.runs.plan import Plan, plan
from firstorder.evaluation.runs.specification import Specification, specify
from firstorder.evaluation.runs.store import Run, Store, read

BASE = ("--model", "evaluate_models:linear", "--data", "images.npz", "--eps", "0.1", "--pictures", "0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", **evaluate_models.arrays(12))
    return tmp_path


def evaluate(*words: str, code: int = 0) -> str:
    """What the command writes, on one line."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", "--trust-code", *words, "--out", "run", "-q"])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def attacks(run: Run) -> list[str]:
    return [one["name"] for one in run.facts["attacks"]]


def worst() -> float:
    run = read(Path("run"))
    (line,) = summary.leaderboard(summary.load(run), run.facts)
    return line.robust.value


def test_a_new_attack_is_added(here: Path) -> None:
    evaluate(*BASE, "--attack", "pgd:steps=5")
    strong, before = worst(), {path: path.stat().st_mtime_ns for path in Path("run/cells").iterdir()}
    said = evaluate(*BASE, "--attack", "pgd:steps=1,alpha=0.001")
    assert attacks(read(Path("run"))) == ["pgd:steps=5", "pgd:steps=1,alpha=0.001"]
    assert len(read(Path("run")).table()) == 2 * 12
    assert "no part of" not in said
    assert worst() == strong < 0.7  # the weak attack takes nothing from the worst case
    assert {path: path.stat().st_mtime_ns for path in before} == before
    evaluate("--attack", "mi-fgsm:steps=2", "--eps", "0.2")  # by the folder and what is new
    run = read(Path("run"))
    assert attacks(run) == ["pgd:steps=5", "pgd:steps=1,alpha=0.001", "mi-fgsm:steps=2"]
    assert run.facts["specification"]["eps"] == [0.1, 0.2]
    assert len(run.done()) == len(run.cells) == 6


def test_only_and_remove_are_explicit(here: Path) -> None:
    evaluate(*BASE, "--attack", "pgd:steps=3", "--attack", "fgsm", "--attack", "mi-fgsm:steps=2")
    said = evaluate("--remove", "fgsm")
    assert attacks(read(Path("run"))) == ["pgd:steps=3", "mi-fgsm:steps=2"]
    assert "no part of the run any more: 1 finished cells of fgsm on evaluate_models:linear; their files stay" in said
    said = evaluate("--only", "--attack", "fgsm")
    assert attacks(read(Path("run"))) == ["fgsm"]
    assert "2 finished cells of pgd:steps=3 on evaluate_models:linear, mi-fgsm:steps=2 on evaluate_models" in said
    files = len(list(Path("run/cells").iterdir()))
    assert files == 3
    assert "no such model or attack; it has evaluate_models:linear, fgsm" in evaluate("--remove", "pgd", code=2)
    assert "would leave no attacks" in evaluate("--remove", "fgsm", code=2)
    evaluate("--attack", "pgd:steps=3")  # what it had once is there still
    assert len(list(Path("run/cells").iterdir())) == files
    assert len(read(Path("run")).done()) == 2


def test_other_keys_that_change_are_named(here: Path) -> None:
    evaluate(*BASE, "--attack", "fgsm", "--shard", "4")
    assert "no part of" not in evaluate("--jobs", "1")
    said = evaluate("--count", "4")
    assert "2 finished cells of fgsm on evaluate_models:linear (count was None and is 4); their files stay" in said
    said = evaluate("--norm", "L2")
    assert "(norm was Linf and is L2)" in said
    assert read(Path("run")).facts["specification"]["shard"] == 4


def test_other_images_make_no_other_model(here: Path) -> None:
    """What a model is compared by are the first images of the run, which `skip` changes."""
    evaluate(*BASE, "--attack", "fgsm", "--count", "6")
    said = evaluate("--skip", "6")
    assert "(skip was 0 and is 6)" in said
    assert "is not the model that it was" not in said
    assert len(read(Path("run")).table()) == 6


def test_a_dry_run_says_the_same(here: Path) -> None:
    evaluate(*BASE, "--attack", "fgsm")
    before = Path("run/run.json").read_bytes()
    said = evaluate("--only", "--attack", "pgd:steps=2", "--dry-run")
    assert "1 finished cells of fgsm" in said
    assert "pgd:steps=2" in said
    assert Path("run/run.json").read_bytes() == before


def spec(**given: Any) -> Specification:
    return specify({"models": ["a"], "data": "mnist", "eps": [0.1], "attacks": ["fgsm"], **given})


def test_entries_of_a_name_are_replaced() -> None:
    def facts(one: Specification) -> dict[str, Any]:
        return {"specification": one.model_dump(mode="json")}

    had = spec(attacks=[{"attack": "pgd", "name": "x", "steps": 3}, "fgsm"], seeds=[1, 0], models=["a", "b"], count=9)
    asked = spec(attacks=["ddn", {"attack": "pgd", "name": "x", "steps": 4}], seeds=[2], norm="L2")
    found = grown(asked, facts(had), Growth())
    assert [one.label for one in found.attacks] == ["x", "fgsm", "ddn"]
    assert found.attacks[0].parameters == {"steps": 4}
    assert found.seeds == (1, 0, 2)
    assert [one.label for one in found.models] == ["a", "b"]
    assert (found.norm, found.count) == ("L2", None)
    assert grown(asked, facts(had), Growth(only=True)) == asked
    assert grown(asked, {}, Growth()) == asked
    assert grown(had, facts(had), Growth()) == had
    assert [one.label for one in grown(had, facts(had), Growth(remove=("x", "b"))).attacks] == ["fgsm"]


def test_what_another_process_asked_for_meanwhile_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plan before one of them has written."""
    barrier, out = threading.Barrier(2), here / "run"
    out.mkdir()
    planned: list[Plan] = []

    def together(*given: Any) -> Plan:
        found = plan(*given)
        if len(planned) < 2:
            planned.append(found)
            barrier.wait(timeout=60)
        return found

    monkeypatch.setattr(computing, "plan", together)

    def ask(attack: str) -> None:
        asked = spec(models=["evaluate_models:linear"], data="images.npz", attacks=[attack])
        begin(asked, out, "firstorder", tell=lambda line: None)

    threads = [threading.Thread(target=ask, args=(attack,)) for attack in ("fgsm", "pgd:steps=2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attacks(read(out))) == ["fgsm", "pgd:steps=2"]
    assert len(read(out).cells) == 2


def test_facts_that_are_damaged(here: Path) -> None:
    evaluate(*BASE, "--attack", "fgsm")
    path = Path("run/run.json")
    whole = path.read_text()
    assert "sha256" not in (Store(Path("run")).facts() or {})
    assert "sha256" in json.loads(whole)
    for damage in (whole[:-40], "", whole.replace("0.1", "0.7")):
        path.write_text(damage)
        said = evaluate(code=2)
        assert "run.json is" in said
        assert "Traceback" not in said
        said = evaluate(*BASE, "--attack", "pgd:steps=2")
        assert "run.json is damaged: what the run had beside what this call asks for is not known" in said
        assert attacks(read(Path("run"))) == ["pgd:steps=2"]
    before = len(list(Path("run/cells").iterdir()))
    evaluate("--attack", "fgsm")
    assert len(list(Path("run/cells").iterdir())) == before == 2


def test_a_folder_of_a_stranger_runs_no_code(here: Path) -> None:
    """Also where the call names models of its own, to which those of the folder would be added."""
    evaluate(*BASE, "--attack", "fgsm")
    words = ["evaluate", "--model", "mnist-cnn", "--data", "images.npz", "--attack", "fgsm", "--eps", "0.1"]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--out", "run"])
    assert done.exit_code == 2
    assert "run.json names 'evaluate_models:linear', which runs code; add --trust-code" in done.stderr
