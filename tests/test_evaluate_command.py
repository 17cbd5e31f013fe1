"""What `firstorder evaluate` tells: lines for those who cannot see a bar, the result, and failures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import evaluate_models
from firstorder.evaluation.cli import app
from firstorder.evaluation.commands.progress import Progress
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.store import read


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(evaluate_models.MARKER, str(tmp_path / "marker"))
    np.savez("images.npz", **evaluate_models.arrays(20, marked=(12,)))
    return tmp_path


def evaluate(*words: str, attacks: tuple[str, ...] = ("fgsm", "pgd:steps=3"), model: str = "linear") -> Any:
    given = [word for attack in attacks for word in ("--attack", attack)]
    given += ["--model", f"evaluate_models:{model}", "--data", "images.npz", "--eps", "0.1", "--shard", "10"]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["evaluate", *given, "--out", "out", *words])


def test_lines_where_there_is_no_terminal(here: Path) -> None:
    done = evaluate()
    assert done.exit_code == 0
    assert done.stderr == ""
    table = read(Path("out")).table()
    for attack, rows in table.groupby("attack"):
        robust = 100 * (1 - rows.success.mean())
        assert f"evaluate_models:linear, {attack}, radius 0.1: {robust:.1f} % robust on 20 examples (" in done.stdout
    last = [line for line in done.stdout.splitlines() if " examples (" in line][-1]
    assert re.search(r"\(4 of 4 cells, [0-9.]+ examples/s, [0-9]+ s left\)$", last)
    assert "a page of it: firstorder report out" in done.stdout
    assert "evaluate_models:linear is done: 4 cells" in done.stdout
    plan = "4 cells, 0 of them done; 20 examples of shape (1, 4, 4)."
    assert plan in " ".join(done.stdout.split())
    assert done.stdout.index("4 cells, 0 of them done") < done.stdout.index("% robust on 20 examples")
    worst = 100 * (1 - table.groupby("example").success.max().mean())
    clean = 100 * (table.clean_label == table.label).mean()
    assert re.search(rf"0\.1 +20 +{clean:.2f} +{worst:.2f} ", done.stdout)


def test_a_line_whenever_there_was_none_for_long(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clean", "classes"):
        monkeypatch.setattr(work, name, partial(_slowly, getattr(work, name)))
    monkeypatch.setattr(Progress, "__init__", partialmethod(Progress.__init__, every=0.2))
    done = evaluate("--count", "10", "--no-diagnose", attacks=("fgsm",))
    running = [line for line in done.stdout.splitlines() if line.startswith("running: ")]
    assert running[0] == "running: 0 of 1 cells, none new in 1 s"
    assert len(running) >= 2
    assert "running" not in evaluate("--quiet", "--count", "10", attacks=("pgd:steps=2",)).stdout


def _slowly(whole: Callable[..., Any], *given: Any) -> Any:
    time.sleep(0.3)
    return whole(*given)


def test_the_plan_has_what_is_computed_alone(here: Path) -> None:
    words = (
        "--model",
        "evaluate_models:other",
        "--source",
        "evaluate_models:other",
        "--target",
        "evaluate_models:linear",
    )
    done = evaluate(*words, "--dry-run")
    assert done.exit_code == 0, done.output
    plan = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("evaluate_models:")]
    assert [row[:3] for row in plan] == [["evaluate_models:other", name, "2"] for name in ("fgsm", "pgd:steps=3")]
    assert "2 models are diagnosed first. Left: at most 80 gradients" in done.stdout


def test_diagnoses_are_reported(here: Path) -> None:
    done = evaluate("--model", "evaluate_models:other", attacks=("fgsm",))
    message = [line for line in done.stdout.splitlines() if line.startswith("diagnos")]
    assert message == [
        *(f"diagnosing, {i} of 2 models done" for i in range(2)),
        "diagnosed: evaluate_models:linear, evaluate_models:other",
    ]
    assert done.stdout.index("2 models are diagnosed first") < done.stdout.index(message[0])
    assert done.stdout.index(message[-1]) < done.stdout.index(" robust on 20 examples")
    assert "diagnos" not in evaluate("--model", "evaluate_models:other", attacks=("fgsm",)).stdout  # they are kept
    assert "diagnosing" not in evaluate("--quiet", "--eps", "0.2", attacks=("fgsm",)).stdout


def test_names_are_shown_as_they_are(here: Path) -> None:
    odd = ":smile: [red]one[/red] \\"
    spec = {"models": {"model": "evaluate_models:linear", "name": odd}, "attacks": "fgsm", "eps": 0.1}
    Path("odd.yaml").write_text(json.dumps({**spec, "data": "images.npz"}))
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["evaluate", "odd.yaml", "--out", "out", "--trust-code"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if "smile" in line]
    assert len(lines) >= 4  # the plan, the diagnosis, progress, and the result
    assert all(odd in line for line in lines)


def test_quiet_prints_the_result_only(here: Path) -> None:
    done = evaluate("--quiet")
    assert done.exit_code == 0
    assert " of 4 cells" not in done.stdout
    assert "evaluate_models:linear" in done.stdout


def test_failures_are_reported_even_quietly(here: Path) -> None:
    done = evaluate("--quiet", model="raises_on_marked", attacks=("fgsm",))
    assert done.exit_code == 1
    assert "failed: evaluate_models:raises_on_marked, fgsm" in done.stdout
    assert "examples 10 to 19: KeyError: 'the model is moody'" in done.stdout
    assert "Traceback" not in done.output


def test_what_the_folder_says_of_the_run(here: Path) -> None:
    evaluate()
    facts = json.loads(Path("out/run.json").read_text())
    assert facts["command"].startswith("firstorder")
    assert facts["data"] == {
        "spec": "images.npz", "name": "images", "digest": facts["data"]["digest"], "count": 20,
        "shape": [1, 4, 4], "classes": [],
    }  # fmt: skip
    (model,) = facts["models"]
    assert (model["name"], model["parameters"], model["architecture"]) == ("evaluate_models:linear", 48, "Linear")
    assert {"python", "torch", "firstorder"} <= set(facts["versions"])
    assert [one["parameters"].get("steps") for one in facts["attacks"]] == [None, 3]
    assert facts["specification"]["eps"] == [0.1]
    assert len(facts["cells"]) == 4
    assert sorted(path.name for path in Path("out").iterdir()) == ["cells", "data", "diagnoses", "models", "run.json"]


def test_a_folder_without_a_run_needs_a_specification(here: Path) -> None:
    Path("out").mkdir()
    done = CliRunner().invoke(app, ["evaluate", "--trust-code", "--out", "out"])
    assert done.exit_code == 2
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == ["Field required"] * 3
    Path("out/run.json").write_text("{}")
    done = CliRunner().invoke(app, ["evaluate", "--trust-code", "--out", "out"])
    assert done.exit_code == 2
    assert "is not the description of a run" in done.stderr
