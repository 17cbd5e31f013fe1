"""Models that overflow to NaN on perturbed images: such examples are neither broken nor silently robust, anywhere."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import evaluate_models
from firstorder.attacks import FGSM, PGD, UNDECIDED, RobustnessWarning, broken, predicted
from firstorder.attacks.inspection import gathered
from firstorder.autoattack import AutoAttack
from firstorder.autoattack.record import Record
from firstorder.evaluation import evaluate as evaluation
from firstorder.evaluation.cli import app
from firstorder.evaluation.names.defences import Smoothing, error_rate
from firstorder.evaluation.reporting import curve, leaderboard
from firstorder.evaluation.reporting.transfer_report import doubts, outcomes, write
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.cells import FORMAT
from firstorder.evaluation.runs.loading import all_correct
from firstorder.evaluation.runs.measure import predictions
from firstorder.evaluation.runs.specification import specify
from firstorder.evaluation.runs.store import FACTS, Run, read
from firstorder.evaluation.studies.population import attack_data
from firstorder.fabric import evaluate, make
from firstorder.robustbench import benchmark
from test_autoattack import small

COUNT, EPS = 24, 0.08
MARKED = tuple(range(0, COUNT, 3))
MESSAGE = "met NaN or infinite logits"


def data() -> tuple[Tensor, Tensor]:
    """Images on the grid on which the model is finite, all classified correctly, a third of them marked."""
    x = torch.from_numpy(evaluate_models.arrays(COUNT, marked=MARKED)["x"])
    x = (x * 64).round() / 64
    return x, predictions(evaluate_models.overflowing(), x)


X, Y = data()
NAN = torch.zeros(COUNT, dtype=torch.bool).index_fill(0, torch.tensor(MARKED), True)


def invoke(*words: object, code: int = 0) -> str:
    done = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def test_the_marked_examples_have_all_labels() -> None:
    assert set(Y[NAN].tolist()) == {0, 1, 2}
    assert set(Y[~NAN].tolist()) == {0, 1, 2}


def test_the_rule() -> None:
    logits = torch.tensor([[0.0, 2.0], [torch.nan, 1.0], [-torch.inf, 1.0], [3.0, torch.inf]])
    assert predicted(logits).tolist() == [1, UNDECIDED, UNDECIDED, UNDECIDED]
    labels = torch.tensor([0, 1, 0, 0])
    assert broken(predicted(logits), labels).tolist() == [True, False, False, False]
    assert broken(predicted(logits), 1 - labels, targeted=True).tolist() == [True, False, False, False]


# firstorder evaluate


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", x=X.numpy(), y=Y.numpy())
    work._worker.cache_clear()
    return tmp_path


def run(model: str, attacks: list[Any], *words: str, code: int = 0, **given: Any) -> tuple[Run, str]:
    keys = {"models": [f"evaluate_models:{model}"], "data": "images.npz", "eps": [EPS], "shard": 8,
            "attacks": attacks, "prepare": False, "pictures": 4}  # fmt: skip
    Path("spec.yaml").write_text(json.dumps({**keys, **given}))
    output = invoke("evaluate", "spec.yaml", "--trust-code", "--out", "out", *words, code=code)
    return read(Path("out")), output


def test_evaluate_distinguishes_them(here: Path) -> None:
    pgd = {"attack": "pgd", "name": "pgd", "steps": 3, "random_start": False, "early_stop": False}
    found, output = run("overflowing", ["fgsm", pgd, "apgd-ce"], transfer=True,
                        models=["evaluate_models:overflowing", "evaluate_models:safe"])  # fmt: skip
    table = found.table()
    own = table[(table.model == table.target) & (table.model == "evaluate_models:overflowing")]
    for attack in ("fgsm", "pgd", "apgd-ce"):
        rows = own[own.attack == attack].sort_values("example")
        assert rows.doubtful.tolist() == NAN.tolist(), attack
        assert not rows[rows.doubtful].success.any(), attack
        assert rows[~rows.doubtful].success.any(), attack
    fgsm = own[own.attack == "fgsm"].sort_values("example")
    assert (fgsm.adversarial_label == UNDECIDED).tolist() == NAN.tolist()
    assert not (own.success & own.doubtful).any()
    carried = table[(table.model != table.target) & (table.target == "evaluate_models:overflowing")]
    carried = carried[carried.attack == "fgsm"].sort_values("example")
    assert not (carried.success & NAN.numpy()).any()
    assert carried.doubtful.tolist() == NAN.tolist()
    line = f"fgsm on evaluate_models:overflowing, radius 0.08: {len(MARKED)} of {COUNT} examples met NaN"
    invoke("report", "out")
    page, text = (Path("out", name).read_text() for name in ("report.html", "report.md"))
    for said in (output, page, text):
        said = " ".join(said.replace("\\", "").split())
        assert said.count(line) == 1
        assert "neither broken nor robust for sure" in said
        assert said.count("pgd on evaluate_models:overflowing: some examples met NaN") == 1
    assert "fgsm on evaluate_models:safe" not in output
    rate = float((~own[own.attack == "fgsm"].success).mean())
    assert f"{100 * rate:.1f}" in text


def test_workers_warnings_are_reported_once(here: Path) -> None:
    words = ("--jobs", "2", "--threads", "1")
    found, output = run("probabilities", ["fgsm", "pgd:steps=2"], *words)
    assert len(found.done()) == 6
    for attack in ("fgsm", "pgd:steps=2"):
        assert output.count(f"{attack} on evaluate_models:probabilities: the model's outputs are probabilities") == 1
    again = invoke("evaluate", "--trust-code", "--out", "out")
    assert again.count("fgsm on evaluate_models:probabilities: the model's outputs are probabilities") == 1
    invoke("report", "out")
    assert Path("out/report.md").read_text().count("the model's outputs are probabilities") == 2


def test_clean_examples_that_are_nan_fail_their_cell(here: Path) -> None:
    x = torch.cat([X[~NAN], X[NAN]])
    np.savez("images.npz", x=x.numpy(), y=torch.cat([Y[~NAN], Y[NAN]]).numpy())
    found, output = run("not_a_number_on_marked", ["fgsm"], code=1)
    assert "are NaN or infinite for 8 of 8 clean examples" in output
    assert len(found.failures()) == 1
    assert len(found.done()) == 2


def test_cells_of_another_format_are_not_misread(here: Path) -> None:
    found, _ = run("linear", ["fgsm"])
    facts = json.loads(Path("out", FACTS).read_text())
    Path("out", FACTS).write_text(json.dumps({**facts, "format": 1}))
    done = CliRunner().invoke(app, ["report", "out"])
    assert done.exit_code == 2
    assert "older version" in done.stderr
    invoke("evaluate", "--trust-code", "--out", "out")
    invoke("report", "out")
    assert read(Path("out")).facts["format"] == found.facts["format"] == FORMAT


# AutoAttack and what is built on it


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "square", "fgsm", "pgd"])
def test_autoattack_counts_no_nan_as_broken(name: str) -> None:
    model = evaluate_models.overflowing()
    parameters = {"pgd": {"random_start": False}} if name == "pgd" else None
    adversary = AutoAttack(model, "Linf", EPS, 0, False, [name], device="cpu", parameters=parameters)
    small(adversary)
    with pytest.warns(RobustnessWarning, match=f"{len(MARKED)} of {COUNT} examples {MESSAGE}"):
        adversarial = adversary.run_standard_evaluation(X, Y, bs=7)
    record = adversary.record
    assert record is not None
    assert record.doubtful.tolist() == NAN.tolist()
    assert record.robust[NAN].all()
    assert torch.equal(adversarial[NAN], X[NAN])
    assert not record.robust[~NAN].all()
    assert set(record.unverified.values()) == {0}


class Rooted(nn.Module):
    """Its logits are finite and its gradient NaN where the image is black in the corner, as a root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = evaluate_models.Linear(8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x - 0.5) + 0 * x[:, 0, 0, :1].sqrt()
        return logits


def test_autoattack_sees_iterates_that_become_nan() -> None:
    """Of class 0 too, whose NaN AutoAttack takes for a right answer."""
    adversary = small(AutoAttack(Rooted(), "L2", 0.3, 0, False, ["apgd-ce"], device="cpu"))
    x = X.clone()
    x[:, 0, 0, 0] = torch.where(NAN, 0.5, 0.0)
    y = predictions(Rooted(), x)
    with pytest.warns(RobustnessWarning, match=MESSAGE):
        adversary.run_standard_evaluation(x, y, bs=7)
    assert adversary.record.doubtful[y == 0].any()
    assert not (adversary.record.doubtful & NAN).any()


def test_autoattack_refuses_clean_nan() -> None:
    model = evaluate_models.not_a_number_on_marked()
    adversary = AutoAttack(model, "Linf", EPS, 0, False, ["fgsm"], device="cpu")
    with pytest.raises(ValueError, match=f"NaN or infinite for {len(MARKED)} of {COUNT} clean examples"):
        adversary.run_standard_evaluation(X, Y)
    assert adversary.record is None


def test_records_keep_them_and_those_of_before_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    model = evaluate_models.overflowing()
    for _ in range(2):
        adversary = AutoAttack(model, "Linf", EPS, 0, False, ["fgsm"], device="cpu")
        with pytest.warns(RobustnessWarning, match=MESSAGE):
            adversary.run_standard_evaluation(X, Y, state_path=path)
        assert adversary.record is not None
        assert adversary.record.doubtful.tolist() == NAN.tolist()
    beside = path.with_name(path.name + ".examples.pt")
    saved = torch.load(beside, weights_only=True)
    facts = json.loads(saved["facts"])
    del facts["format"], facts["met_nan"]
    del saved["sha256"]
    torch.save({**saved, "facts": json.dumps(facts)}, beside)
    with pytest.raises(ValueError, match="older version"):
        Record.load(path, facts["key"])


def test_the_leaderboard_has_a_column(tmp_path: Path) -> None:
    np.savez(tmp_path / "grid.npz", x=X.numpy(), y=Y.numpy())
    words = {"models": "evaluate_models:overflowing", "data": str(tmp_path / "grid.npz"), "eps": EPS}
    run = evaluation({**words, "attacks": "fgsm", "batch_size": 9}, tmp_path / "run").run
    (row,) = leaderboard.rows(run, {})
    assert row.doubtful == len(MARKED)
    assert row.best_known >= len(MARKED) / COUNT
    leaderboard.write([row], tmp_path, facts={})
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["doubtful"] == str(len(MARKED))
    assert "neither broken nor robust for sure" in (tmp_path / "leaderboard.md").read_text()


def test_the_benchmark_returns_them() -> None:
    model = evaluate_models.overflowing()
    with pytest.warns(RobustnessWarning, match=MESSAGE):
        clean, robust, record = benchmark(model, x=X, y=Y, eps=EPS, attacks=["fgsm"], seed=0, details=True)
    assert clean == 1
    assert robust >= len(MARKED) / COUNT
    assert record.doubtful.tolist() == NAN.tolist()


# Transfer, defences, populations, curves, training


def carried(source: str, attack: str, folder: Path) -> Run:
    """Examples made on one of the models, tried on both, behind a defence as well."""
    np.savez(folder / "grid.npz", x=X.numpy(), y=Y.numpy())
    names = {"overflowing": "evaluate_models:overflowing", "safe": "evaluate_models:safe"}
    specification = {
        "models": [{"model": model, "name": name} for name, model in names.items()], "sources": source,
        "targets": list(names), "defences": "bits:bits=8", "data": str(folder / "grid.npz"), "eps": EPS,
        "attacks": attack, "batch_size": 10, "select": "all-correct",
    }  # fmt: skip
    return evaluation(specification, folder / source).run


def test_transfer_counts_them(tmp_path: Path) -> None:
    run = carried("safe", "fgsm", tmp_path)
    clean, outcome = outcomes(run)
    for target in ("overflowing", "overflowing | bits:bits=8"):
        assert outcome.doubtful[target] == len(MARKED)
        assert not outcome.fooled[target][NAN].any()
        assert outcome.fooled[target][~NAN].any()
    assert outcome.doubtful["safe"] == 0
    assert not any(clean.doubtful.values())
    _, own = outcomes(carried("overflowing", "pgd:random_start=false,steps=3", tmp_path))
    assert own.doubtful["overflowing"] == len(MARKED)
    assert own.doubtful["safe"] == int((own.fooled["safe"][NAN.numpy()] == 0).sum()) > 0, "a lost attack proves nothing"
    write(run, tmp_path)
    assert "8 of 24 images of safe: fgsm" in (tmp_path / "transfer.md").read_text()
    with (tmp_path / "transfer.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["attack"] == "fgsm"]
    assert [row["doubtful"] for row in found if not row["target"].startswith("safe")] == ["8", "8"]
    assert len(doubts([outcome])) == 2


def test_images_that_are_nan_are_not_right() -> None:
    entry = "evaluate_models:not_a_number_on_marked"
    chosen = specify({"models": entry, "data": "", "attacks": "fgsm", "eps": EPS})
    right = all_correct(chosen, torch.device("cpu"))(X, predictions(evaluate_models.linear(), X))
    assert right.tolist() == (~NAN).tolist()


def test_defences_report() -> None:
    model = evaluate_models.overflowing()
    with pytest.warns(RobustnessWarning, match=f"{len(MARKED)} of {COUNT} examples {MESSAGE} behind smoothing"):
        rate = error_rate(Smoothing(sigma=1e-6, votes=3), model, X, (Y + 1) % 3, draws=2)
    assert rate.tolist() == (~NAN).float().tolist()


def test_populations_report() -> None:
    data = TensorDataset(X, Y)
    with pytest.warns(RobustnessWarning, match=f"{len(MARKED)} of {COUNT} examples {MESSAGE}"):
        merged = attack_data(PGD(eps=EPS, steps=4, random_start=False), evaluate_models.overflowing(), data, every=2)
    assert merged.doubtful is not None
    assert merged.doubtful[0].tolist() == NAN.tolist()
    assert not (merged.success & merged.doubtful).any()
    assert merged.success.any()


def test_curves_count_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "grid.npz", x=X.numpy(), y=Y.numpy())
    words = {"models": "evaluate_models:overflowing", "data": str(tmp_path / "grid.npz"), "norm": "L2"}
    (found,) = curve.norms(evaluation({**words, "attacks": "anu:steps=5"}, tmp_path / "run").run)
    assert found.doubtful == int(np.isinf(found.norm[NAN.numpy()]).sum()) > 0


def test_training_counts_them() -> None:
    model = evaluate_models.overflowing()
    with pytest.warns(RobustnessWarning, match=MESSAGE):
        found = evaluate(make(accelerator="cpu"), model, TensorDataset(X, Y), FGSM(eps=EPS), batch_size=10)
    assert found.natural == 1
    assert found.doubtful == pytest.approx(len(MARKED) / COUNT)
    assert found.doubtful <= found.robust < 1
    assert found.certain == pytest.approx(found.robust - found.doubtful)


def test_gathered_warnings() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with gathered() as doubts:
            for k in (3, 5):
                warnings.warn(f"{k} of 10 examples met NaN", RobustnessWarning, stacklevel=1)
            warnings.warn("something else", DeprecationWarning, stacklevel=1)
        assert doubts == ["some examples met NaN"]
        assert [str(one.message) for one in shown] == ["something else"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustnessWarning)
        with pytest.raises(RobustnessWarning, match="boo"), gathered():
            warnings.warn("boo", RobustnessWarning, stacklevel=1)
