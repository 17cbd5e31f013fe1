"""The leaderboard: models against AutoAttack and registered attacks, resumed, in RobustBench's columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firstorder.autoattack import AutoAttack
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import packaged
from firstorder.evaluation.runs.store import read
from firstorder.evaluation.runs.work import Worker


def weaker() -> nn.Module:
    """The packaged network with its first layer disturbed."""
    model = packaged.mnist_cnn().train()
    torch.manual_seed(0)
    weight = next(model.parameters()).data
    weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    return model


WORDS = ["leaderboard", "--eps", "0.3", "--data", "mnist", "--count", "20", "--model", "test_leaderboard:weaker"]
WORDS += ["--model", "mnist-cnn", "--attack", "pqgd", "--attack", "fgsm"]


def test_the_command_ranks_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*WORDS, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["mnist-cnn", "test_leaderboard:weaker"]
    assert [row["rank"] for row in rows] == ["1", "2"]
    for row in rows:
        assert float(row["best known"]) <= min(float(row["pqgd"]), float(row["fgsm"])) <= float(row["clean"])
        assert row["architecture"] == "SmallCNN"
        assert row["AutoAttack"] == ""
        assert row["model"] in done.output
    assert float(rows[0]["best known"]) > float(rows[1]["best known"])
    stored = json.loads((tmp_path / "leaderboard.json").read_text())
    assert (stored["eps"], stored["norm"], len(stored["models"])) == ("0.3", "Linf", 2)
    assert [(model["images"], model["unverified"]) for model in stored["models"]] == [(20, 0), (20, 0)]
    text = (tmp_path / "leaderboard.md").read_text()
    run = read(tmp_path / "mnist")
    assert [entry["name"] for entry in run.facts["attacks"]] == ["pqgd:steps=40", "fgsm"]
    table = run.table()
    for row in rows:
        mine = table[table.model == row["model"]]
        assert float(row["pqgd"]) == pytest.approx(100 * (1 - mine[mine.attack == "pqgd:steps=40"].success.mean()))
        assert float(row["best known"]) == pytest.approx(100 * (1 - mine.groupby("example").success.max().mean()))
    passes = [line.split("|")[3:5] for line in text.splitlines() if line.startswith("| mnist-cnn | pqgd |")]
    mine = table[(table.model == "mnist-cnn") & (table.attack == "pqgd:steps=40")]
    assert [int(one) for one in passes[0]] == [round(mine.backwards.sum() / 20), round(mine.forwards.sum() / 20)]
    assert text.startswith("| rank | model | clean | AutoAttack | AutoAttack (reported) | best known | pqgd | fgsm |")

    def forbidden(*args: Any) -> None:
        raise AssertionError("what was run is not run again")

    monkeypatch.setattr(Worker, "table", forbidden)
    again = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*WORDS, "--out", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "leaderboard.md").read_text() == text


def test_a_model_that_is_not_to_be_trusted_says_why(tmp_path: Path) -> None:
    words = ["leaderboard", "--eps", "0.3", "--data", "mnist", "--count", "12", "--model", "pathologies:soft"]
    words += ["--model", "mnist-cnn", "--attack", "fgsm", "--out", str(tmp_path)]
    line = "pathologies:soft: not to be trusted: probabilities as outputs"
    undiagnosed = CliRunner(env={"COLUMNS": "160"}).invoke(app, words)
    assert undiagnosed.exit_code == 0, undiagnosed.output
    assert "not to be trusted" not in undiagnosed.output
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*words, "--diagnose"])
    assert done.exit_code == 0, done.output
    assert line in done.output.splitlines()
    assert done.output.count("not to be trusted") == 1, "of the other model nothing is known against its figure"
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        found = {row["model"]: row["not to be trusted"] for row in csv.DictReader(file)}
    assert found == {"pathologies:soft": "probabilities as outputs", "mnist-cnn": ""}


def test_zoo_models_show_what_robustbench_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Sehwag2021Proxy_R18"
    (tmp_path / "models" / "cifar10" / "Linf").mkdir(parents=True)
    torch.save(packaged.cifar10_resnet18().state_dict(), tmp_path / "models" / "cifar10" / "Linf" / f"{name}.pt")
    (tmp_path / "info" / "cifar10" / "Linf").mkdir(parents=True)
    info = {"name": "Robust | <b>Learning</b>", "autoattack_acc": "55.54", "architecture": "ResNet-18", "venue": "ICLR"}
    (tmp_path / "info" / "cifar10" / "Linf" / f"{name}.json").write_text(json.dumps(info))
    missing = ["leaderboard", "--model", "robustbench:Rade2021Helper_R18_ddpm", "--attack", "fgsm", "--count", "2"]
    monkeypatch.setattr("gdown.download", lambda *args, **options: None)
    failed = CliRunner().invoke(app, [*missing, "--model-dir", str(tmp_path), "--out", str(tmp_path / "none")])
    assert failed.exit_code == 2
    assert "by hand" in failed.stderr
    words = ["leaderboard", "--model", f"robustbench:{name}", "--count", "2", "--attack", "autoattack"]
    words += ["--model-dir", str(tmp_path / "models"), "--model-info", str(tmp_path / "info")]
    path = tmp_path / "info" / "cifar10" / "Linf" / f"{name}.json"
    for text in ("", "[]", '{"autoattack_acc": "5554"}', '{"autoattack_acc": "abc"}', '{"eps": "far"}'):
        path.write_text(text)
        failed = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "none")])
        assert failed.exit_code == 2
        assert failed.stderr.startswith(f"error: {path} cannot be used: ")
    path.write_text(json.dumps(info))
    small = AutoAttack.__init__

    def build(self: AutoAttack, *args: Any, **options: Any) -> None:
        small(self, *args, **options)
        self.apgd.n_iter = 20

    monkeypatch.setattr(AutoAttack, "__init__", build)
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    with (tmp_path / "out" / "leaderboard.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == info["name"]
    assert (row["clean"], row["AutoAttack"], row["AutoAttack (reported)"]) == ("100.00", "0.00", "55.54")
    assert (row["architecture"], row["venue"]) == ("ResNet-18", "ICLR")
    assert "Robust \\| &lt;b>Learning" in (tmp_path / "out" / "leaderboard.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "pqdg"], "unknown attack 'pqdg'"),
        (["--attack", "pqgd", "--norm", "L2"], "'pqgd:steps=40' knows Linf, not norm=L2"),
        (["--model", "resnet"], "unknown model 'resnet'"),
        (["--model", "no_such_module:f"], "cannot be imported"),
        (["--model", "robustbench:Nobody2020"], "no cifar10 Linf model 'Nobody2020'"),
        (["--eps", "8/0"], "eps='8/0'"),
        (["--eps", "-1"], "eps='-1'"),
        (["--data", "imagenet", "--model", "math:sqrt"], "unknown data 'imagenet'"),
    ],
)
def test_one_line_for_a_mistake(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["leaderboard", *words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
