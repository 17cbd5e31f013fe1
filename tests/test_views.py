"""Commands that show runs: one attack gives the same rows through each, and each goes on after it was killed."""

from __future__ import annotations

import ast
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

import evaluate_models
import firstorder.evaluation
from evaluate_models import process
from firstorder.evaluation import evaluate
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import columns
from firstorder.evaluation.runs.columns import Rows, Values, column
from firstorder.evaluation.runs.store import Run, read

ROOT = Path(firstorder.evaluation.__file__).parent
MODEL, EPS, COUNT = "evaluate_models:linear", 0.08, 20
BOUNDED, NEAREST = "mi-fgsm:steps=3,early_stop=false", "anu:steps=30"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", **evaluate_models.arrays(COUNT))
    return tmp_path


def called(*words: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--threads", "1"])
    assert done.exit_code == 0, done.output


def usual(attack: str, **given: Any) -> dict[str, Any]:
    return {"models": MODEL, "data": "images.npz", "attacks": attack, "eps": EPS, **given}


def attacked(run: Run) -> pd.DataFrame:
    """The rows of the images that the model classifies correctly, in their order."""
    rows = run.table()
    rows = rows[(rows["label"] == rows["clean_label"]) & (rows["model"] == rows["target"])]
    return rows.drop(columns=["seconds", "example", "adversarial"]).reset_index(drop=True)


def test_an_attack_gives_the_same_rows_through_every_command(here: Path) -> None:
    expected = attacked(evaluate(usual(BOUNDED)).run)
    assert 5 < len(expected) < COUNT
    assert expected["success"].any()
    assert not expected["success"].all()
    words = ["--data", "images.npz", "--eps", str(EPS), "--attack", BOUNDED]
    called("evaluate", "--model", MODEL, *words, "--out", "evaluate")
    called("transfer", "--source", MODEL, *words, "--out", "transfer")
    called("leaderboard", "--model", MODEL, *words, "--out", "leaderboard")
    carried = ["rounded_label", "rounded_success"]  # of runs that have targets
    assert attacked(read(Path("transfer")))[carried].notna().all(axis=None)
    for folder in ("evaluate", "transfer", "leaderboard/images.npz"):
        found = attacked(read(Path(folder))).drop(columns=carried)
        pd.testing.assert_frame_equal(found, expected.drop(columns=carried), rtol=1e-6)


def test_a_minimum_norm_attack_gives_the_same_rows_through_every_command(here: Path) -> None:
    expected = attacked(evaluate(usual(NEAREST, norm="L2", eps=[])).run)
    assert expected["success"].any()
    assert expected["l2"].nunique() > 5
    words = ["--model", MODEL, "--data", "images.npz", "--attack", NEAREST]
    called("curve", *words, "--out", "curve")
    called("evaluate", *words, "--norm", "L2", "--eps", "0.5", "--out", "evaluate")
    called("leaderboard", *words, "--norm", "L2", "--eps", "0.5", "--out", "leaderboard")
    for folder in ("curve/images.npz", "evaluate", "leaderboard/images.npz"):
        pd.testing.assert_frame_equal(attacked(read(Path(folder))), expected, rtol=1e-6)
    table = pd.read_csv("curve/norms.csv")
    rows = read(Path("curve/images.npz")).table()
    assert table["norm"].to_numpy() == pytest.approx(rows["l2"].where(rows["success"], np.inf).to_numpy(), rel=1e-5)


# --- Python


def test_results_without_a_folder_are_there_as_long_as_the_run(here: Path) -> None:
    run = evaluate(usual("fgsm")).run
    folder = run.store.folder
    assert len(run.table()) == COUNT
    assert (folder / "run.json").exists()
    del run
    assert not folder.exists()


def test_an_evaluation_from_a_file_with_a_report(here: Path) -> None:
    Path("spec.yaml").write_text(f"models: {MODEL}\ndata: images.npz\nattacks: fgsm\neps: {EPS}\n")
    with pytest.raises(ValueError, match="which runs code; add --trust-code"):
        evaluate("spec.yaml")
    found = evaluate("spec.yaml", "run", trust_code=True)
    assert len(found.table(["example", "success"]).columns) == 2
    paths = found.report("page")
    assert {Path("page/report.html"), Path("page/report.md")} <= set(paths)
    assert "fgsm" in Path("page/report.md").read_text()
    again = evaluate(Path("spec.yaml"), "run", trust_code=True, computed=lambda report: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(again.table(), found.table())


def test_a_failed_cell_leaves_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evaluate_models.MARKER, str(here / "marker"))
    np.savez("images.npz", **evaluate_models.arrays(COUNT, marked=(12,)))
    run = evaluate({**usual("fgsm"), "models": "evaluate_models:raises_on_marked", "shard": 10}).run
    (failure,) = run.failures()
    assert "the model is moody" in failure.error
    assert len(run.table()) == 10


@pytest.mark.parametrize("command", ["transfer", "leaderboard", "curve"])
def test_what_looked_wrong_and_what_failed_is_said(here: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evaluate_models.MARKER, str(here / "marker"))
    np.savez("marked.npz", **evaluate_models.arrays(COUNT, marked=(2, 12)))
    flag, attack = ("--source" if command == "transfer" else "--model"), ("ddn" if command == "curve" else "pgd")
    words = ["--eps", "0.1"] if command != "curve" else []
    words += ["--attack", attack, "--data", "marked.npz", "--steps", "2", "--out", "out"]
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(app, [command, flag, "evaluate_models:probabilities", *words])
    assert done.exit_code == 0, done.output
    assert "doubtful: " in done.output
    assert "softmax" in done.output
    if command != "transfer":  # there the images are chosen by what the model says of them
        failed = runner.invoke(app, [command, flag, "evaluate_models:raises_on_marked", *words])
        assert failed.exit_code in (1, 2)
        assert "the model is moody" in failed.output


def test_a_page_shows_what_defences_do(here: Path) -> None:
    colour = np.random.default_rng(0).random((8, 3, 32, 32), np.float32)
    with torch.no_grad():
        y = evaluate_models.wide()(torch.from_numpy(colour)).argmax(1).numpy()
    np.savez("colour.npz", x=colour, y=y)
    words = {"models": "evaluate_models:wide", "data": "colour.npz", "attacks": ["fgsm", "pgd:steps=2"], "eps": 0.05}
    found = evaluate({**words, "defences": ["jpeg:quality=60", "smoothing:votes=2"], "draws": 2}, "run")
    found.report()
    text = Path("run/report.md").read_text()
    assert "Targets behind defences" in text
    assert (Path("run/figures/defences.png")).read_bytes().startswith(b"\x89PNG")
    svg = Path("run/figures/defences.svg").read_text()
    rows = found.table()
    own = rows[(rows["attack"] == "fgsm") & (rows["defence"] == "smoothing:votes=2")]
    assert f">{100 * own['share'].mean():.1f}<" in svg
    assert "fgsm, ε = 0.05" in svg


# --- columns


@pytest.fixture
def l1() -> Iterator[None]:
    @column(pa.float64())
    def l1(rows: Rows) -> Values:
        """The sum of the changes."""
        return rows.delta.abs().sum(1)

    yield
    del columns.COLUMNS["l1"]


def test_a_new_column_is_a_function(here: Path, l1: None) -> None:
    evaluation = evaluate(usual("fgsm", pictures=COUNT), "run")
    rows = evaluation.table()
    clean = evaluation.run.examples(0, COUNT).numpy()
    for i, row in enumerate(rows.itertuples()):
        picture = np.frombuffer(row.adversarial, "<f4").reshape(1, 4, 4)  # type: ignore[arg-type, call-overload]
        assert row.l1 == pytest.approx(np.abs(picture - clean[i]).sum(), abs=1e-5)
    assert rows["l1"].max() > 0.1
    assert evaluation.table(["l1", "linf"]).columns.tolist() == ["l1", "linf"]


def test_a_new_column_is_computed_where_it_was_not(here: Path, request: pytest.FixtureRequest) -> None:
    assert "l1" not in evaluate(usual("fgsm"), "run").table().columns
    request.getfixturevalue("l1")
    assert (evaluate(usual("fgsm"), "run").table()["l1"] >= 0).all()


def test_every_column_says_what_it_is() -> None:
    assert all(make.__doc__ for _, make in columns.COLUMNS.values())


# --- imports


LAYERS = ["names", "runs", "reporting", "", "studies", "bench", "training", "commands", "cli"]
"""From the bottom; "" is the package itself. Each may import what is before it."""
BESIDE = {"studies", "bench", "training"}
"""Of these none imports another."""


def layer(module: str) -> str | None:
    """The layer of a module of the evaluation; None for another one."""
    if not (module + ".").startswith("firstorder.evaluation."):
        return None
    return module.removeprefix("firstorder.evaluation").lstrip(".").partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, also later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, path
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                inner = ROOT / Path(*whole.split(".")[2:])
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield whole if whole.startswith("firstorder.evaluation.") and is_module else str(node.module)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(("firstorder", "evaluation", *parts))] = path
    return found


def test_the_folder_holds_only_packages_and_the_command_line() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_imports_lead_one_way() -> None:
    for name, path in modules().items():
        own = layer(name)
        if own == "__main__":
            continue
        for target in imports(path):
            other = layer(target)
            if other is None or other == own:
                continue
            assert LAYERS.index(other) < LAYERS.index(str(own)), f"{name} imports {target}"
            assert not {own, other} <= BESIDE, f"{name} imports {target}"


def test_imports_make_no_circle() -> None:
    found = modules()
    graph = {name: {target for target in imports(path) if target in found} - {name} for name, path in found.items()}
    while graph:
        free = [name for name, targets in graph.items() if not targets & set(graph)]
        assert free, f"in circles: {sorted(graph)}"
        for name in free:
            del graph[name]


# --- killed


CELLS = 24
STEPS = [word for steps in range(1, CELLS + 1) for word in ("--steps", str(steps))]
CALLS = {
    "transfer": ["--source", "evaluate_models:slow", "--attack", "mi-fgsm", "--eps", "0.05", *STEPS],
    "curve": ["--model", "evaluate_models:slow", "--attack", "ddn", *STEPS],
    "leaderboard": ["--model", "evaluate_models:slow", "--eps", "0.05",
                    *(word for steps in range(1, CELLS + 1) for word in ("--attack", f"pgd:steps={steps}"))],
}  # fmt: skip
TABLES = {"transfer": "transfer.csv", "curve": "summary.csv", "leaderboard": "leaderboard.csv"}


def start(place: Path, command: str, out: str) -> Any:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    words = [*CALLS[command], "--data", "images.npz", "--count", "12", "--threads", "1", "--out", out]
    child = process(place, command, *words, PYTHONPATH=path)
    child.start()
    return child


def run_of(out: Path, command: str) -> Path:
    return out if command == "transfer" else out / "images.npz"


def cells(out: Path, command: str) -> int:
    return len(list(run_of(out, command).glob("cells/[!.]*.parquet")))


@pytest.mark.parametrize("moments", [1, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.parametrize("command", CALLS)
def test_killed_at_some_moments_and_resumed(here: Path, command: str, moments: int) -> None:
    whole = start(here, command, "whole")
    draws, out = random.Random(7), here / "out"
    for _ in range(moments):
        child, before = start(here, command, "out"), cells(out, command)
        wanted = before + draws.randrange(1, 3)
        while child.is_alive() and cells(out, command) < wanted:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.02))
        assert child.is_alive(), "it finished too early"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert before < cells(out, command) < CELLS
    child = start(here, command, "out")
    child.join()
    whole.join()
    assert whole.exitcode == child.exitcode == 0, (here / "log").read_text()
    tables = (pd.read_csv(folder / TABLES[command], keep_default_na=False) for folder in (out, here / "whole"))
    pd.testing.assert_frame_equal(
        *(table.drop(columns="seconds", errors="ignore") for table in tables), check_exact=True
    )
    one, other = (read(run_of(folder, command)).table().drop(columns="seconds") for folder in (out, here / "whole"))
    assert len(one) == CELLS * one["example"].nunique()
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert cells(out, command) == CELLS
