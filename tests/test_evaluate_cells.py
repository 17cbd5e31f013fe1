"""Cells of `firstorder evaluate`: their rows against a slow computation, their keys, their failures, their memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import evaluate_models
from firstorder.attacks import PGD, Model
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import examples, work
from firstorder.evaluation.runs import plan as plans
from firstorder.evaluation.runs.adversaries import Adversary, Found
from firstorder.evaluation.runs.cells import Cell, digest
from firstorder.evaluation.runs.plan import Plan, plan
from firstorder.evaluation.runs.specification import specify
from firstorder.evaluation.runs.store import Run, Store, read
from firstorder.evaluation.runs.work import Worker

COUNT, SHARD, EPS = 23, 10, 0.08
PGD_RANDOM = {"attack": "pgd", "name": "pgd", "random_start": True, "steps": 4, "early_stop": False}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(evaluate_models.MARKER, str(tmp_path / "marker"))
    np.savez("images.npz", **evaluate_models.arrays(COUNT, marked=(12, 13)))
    work._worker.cache_clear()
    return tmp_path


def keys(**given: Any) -> dict[str, Any]:
    base = {"models": ["evaluate_models:linear"], "data": "images.npz", "eps": [EPS], "shard": SHARD,
            "attacks": [PGD_RANDOM], "prepare": False, "pictures": 0}  # fmt: skip
    return {**base, **given}


def planned(**given: Any) -> Plan:
    return plan(specify(keys(**given)))


def begun(chosen: Plan, folder: Path) -> Store:
    """The folder of a run that nothing is computed of."""
    store = Store(folder)
    examples.write(chosen.examples, store.data, skip=0, count=None)
    for known in chosen.models:
        store.keep(known.digest, known.identity)
    return store


def run(out: str, *words: str, code: int = 0, **given: Any) -> Run:
    """A run through the command line."""
    Path("spec.yaml").write_text(json.dumps(keys(**given)))
    done = CliRunner().invoke(app, ["evaluate", "spec.yaml", "--trust-code", "--out", out, "-q", *words])
    assert done.exit_code == code, done.output + repr(done.exception)
    return read(Path(out))


def same(one: pd.DataFrame, two: pd.DataFrame, *, rounding: bool = False) -> None:
    """Equal rows in every column but the seconds."""
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if rounding else {"check_exact": True}
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"), **options)


def slowly(cell: Cell, network: nn.Module, x: Tensor, y: Tensor, **parameters: Any) -> Iterator[dict[str, Any]]:
    """The rows of a cell under PGD with a random start: one draw for those that are classified correctly."""
    text = json.dumps({"seed": cell.seed, "start": cell.start}, sort_keys=True).encode()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(text).hexdigest()[:15], 16))
    chosen = [i for i in range(cell.start, cell.stop) if int(network(x[i : i + 1]).argmax()) == int(y[i])]
    attack = PGD(eps=cell.eps or 0.0, random_start=True, steps=4, **parameters)
    found = dict(zip(chosen, attack(network, x[chosen], y[chosen], generator=generator), strict=True))
    for i in range(cell.start, cell.stop):
        after = found.get(i, x[i])
        logits, delta = network(after[None]).double(), (after - x[i]).double().flatten()
        yield {
            "example": i, "label": int(y[i]), "clean_label": int(network(x[i : i + 1]).argmax()),
            "adversarial_label": int(logits.argmax()), "success": int(logits.argmax()) != int(y[i]),
            "linf": float(delta.abs().max()), "l2": float(delta.square().sum().sqrt()),
            "loss": float(F.cross_entropy(logits, y[i : i + 1])), "backwards": 4.0 if i in found else 0.0,
        }  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_rows_are_those_of_a_slow_computation(here: Path, norm: str) -> None:
    found = run("out", seeds=[0, 5], eps=[EPS, 2 * EPS], norm=norm)
    assert len(found.cells) == 3 * 2 * 2
    content = np.load("images.npz")
    x, y, network = torch.from_numpy(content["x"]), torch.from_numpy(content["y"]), evaluate_models.linear()
    table = found.table()
    for cell in found.cells:
        rows = table[
            (table.eps == cell.eps) & (table.seed == cell.seed) & table.example.between(cell.start, cell.stop - 1)
        ]
        expected = pd.DataFrame(slowly(cell, network, x, y, norm=norm))
        pd.testing.assert_frame_equal(rows[list(expected)].reset_index(drop=True), expected, rtol=1e-6, atol=1e-9)
    wrong = table.clean_label != table.label
    assert 0 < wrong.sum() < len(table) / 2
    assert (table[wrong][["linf", "l2", "forwards", "backwards"]] == 0).all(axis=None)
    assert table[wrong].success.all()
    assert (table[~wrong].forwards == 5).all()  # one more, for the verdict
    assert (table[~wrong].backwards == 4).all()
    assert table[~wrong].success.any()
    assert not table[~wrong].success.all()
    assert not table[table.seed == 0].linf.reset_index().equals(table[table.seed == 5].linf.reset_index())
    assert (table.model == table.target).all()
    assert table.adversarial.isna().all()


def test_examples_that_break_early_cost_less(here: Path) -> None:
    entries = [{**PGD_RANDOM, "early_stop": stops, "name": f"{stops}"} for stops in (True, False)]
    table = run("out", attacks=entries, eps=[2 * EPS]).table()
    early, late = (table[table.attack == f"{stops}"].reset_index() for stops in (True, False))
    assert early.success.equals(late.success)
    assert (early.backwards <= late.backwards).all()
    assert (early.backwards < late.backwards).any()
    unbroken = ~early.success
    assert (early.backwards[unbroken] == 4).all()
    assert unbroken.any()


@pytest.mark.parametrize("attack", ["pgd:random_start=true", "vmi-fgsm", "pgd:restarts=3", "si-ni-fgsm", "daa-blob"])
def test_batches_do_not_matter(here: Path, attack: str) -> None:
    tables = [run(f"out{size}", batch_size=size, attacks=[attack], budget=30).table() for size in (1, 4, 100)]
    for table in tables[1:]:
        same(tables[0], table, rounding=True)


def changed(**given: Any) -> set[str]:
    """The keys that a specification has beyond the usual one, and the other way round."""
    return {cell.key for cell in planned().cells} ^ {cell.key for cell in planned(**given).cells}


def written(edit: Callable[[dict[str, Any]], None]) -> str:
    arrays = dict(np.load("images.npz"))
    edit(arrays)
    np.savez("edited.npz", **arrays)
    return "edited.npz"


def test_keys_change_with_all_that_determines_a_cell(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = 2 * len(planned().cells)
    for given in (
        {"models": [{"model": "evaluate_models:other", "name": "evaluate_models:linear"}]},
        {"models": [{"model": "evaluate_models:linear", "name": "by another name"}]},
        {"models": [{"model": "evaluate_models:linear", "mean": [0.5], "std": [1]}]},
        {"attacks": [{**PGD_RANDOM, "steps": 5}]}, {"attacks": [{**PGD_RANDOM, "alpha": "eps/3"}]},
        {"attacks": [{**PGD_RANDOM, "early_stop": True}]}, {"attacks": [{**PGD_RANDOM, "name": "other"}]},
        {"attacks": [{**PGD_RANDOM, "attack": "pgd+quantised"}]}, {"attacks": [{**PGD_RANDOM, "attack": "mi-fgsm"}]},
        {"eps": [EPS * (1 + 1e-9)]}, {"seeds": [1]}, {"norm": "L2"}, {"shard": 9, "count": 9},
        {"batch_size": 3}, {"models": ["evaluate_models:linear", "evaluate_models:other"],
                                               "transfer": True},
        {"targets": "evaluate_models:linear"}, {"defences": "smoothing"}, {"targeted": True},
    ):  # fmt: skip
        cells = {cell.key for cell in planned(**given).cells}
        assert not cells & {cell.key for cell in planned().cells}, given
    monkeypatch.setattr("firstorder.evaluation.runs.plan.versions", lambda names: {"firstorder": "99"})
    after = {cell.key for cell in planned().cells}
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert len(after ^ {cell.key for cell in planned().cells}) == all_of_them
    small = {"models": ["mnist-cnn"], "data": "mnist", "count": 9}
    plain, folded = planned(**small), planned(**small, prepare=True)
    assert folded.models[0].preparation
    assert not {cell.key for cell in plain.cells} & {cell.key for cell in folded.cells}


def test_the_key_of_a_shard_changes_with_its_examples_alone(here: Path) -> None:
    def pixel(arrays: dict[str, Any]) -> None:
        arrays["x"][15, 0, 2, 2] += 1e-3

    def label(arrays: dict[str, Any]) -> None:
        arrays["y"][15] = (arrays["y"][15] + 1) % 3

    def swap(arrays: dict[str, Any]) -> None:
        arrays["x"][[14, 15]], arrays["y"][[14, 15]] = arrays["x"][[15, 14]], arrays["y"][[15, 14]]

    for edit in (pixel, label, swap):
        before, after = planned().cells, planned(data=written(edit)).cells
        assert [one.key == two.key for one, two in zip(before, after, strict=True)] == [True, False, True]
    assert not changed(data=written(lambda arrays: None))  # the file's name is no part of it
    before, after = planned(shard=5).cells, planned(shard=5, skip=5).cells
    assert not {cell.key for cell in before} & {cell.key for cell in after}
    before, after = planned().cells, planned(pictures=12).cells
    assert [one.key == two.key for one, two in zip(before, after, strict=True)] == [False, False, True]


def test_keys_do_not_change_with_anything_else(here: Path) -> None:
    assert not changed(seeds=[0], eps=EPS, device="cpu", budget=3, early_stop=False, zoo={"folder": "elsewhere"})
    fewer = {cell.key for cell in planned(count=2 * SHARD).cells}
    assert fewer < {cell.key for cell in planned().cells}
    assert len(fewer) == 2
    two = {"models": ["evaluate_models:other", "evaluate_models:linear"], "attacks": ["fgsm", PGD_RANDOM],
           "eps": [0.2, EPS], "seeds": [3, 0]}  # fmt: skip
    turned = {key: value[::-1] for key, value in two.items()}
    assert {cell.key for cell in planned(**two).cells} == {cell.key for cell in planned(**turned).cells}
    assert {cell.key for cell in planned().cells} < {cell.key for cell in planned(**two).cells}
    one, again = run("a", "--threads", "1"), run("b", "--jobs", "1")
    assert [cell.key for cell in one.cells] == [cell.key for cell in again.cells]
    same(one.table(), again.table())


def test_done_cells_are_not_done_again(here: Path) -> None:
    first = run("out", count=20)
    before = {path: path.stat().st_mtime_ns for path in Path("out/cells").iterdir()}
    assert len(before) == 2
    grown = run(
        "out", eps=[EPS, 0.2], attacks=[PGD_RANDOM, "fgsm"], models=["evaluate_models:linear", "evaluate_models:other"]
    )
    assert len(list(Path("out/cells").iterdir())) == len(grown.cells) == 3 * 2 * 2 * 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {cell.key for cell in first.cells} < {cell.key for cell in grown.cells}
    for path in Path("out/cells").iterdir():
        path.chmod(0o400)
    again = CliRunner().invoke(app, ["evaluate", "--trust-code", "--out", "out"])  # by the folder alone
    assert again.exit_code == 0
    assert read(Path("out")).cells == grown.cells
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in Path("out/cells").iterdir())


def test_a_citation_is_no_part_of_a_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not changed()
    now = run("new")
    monkeypatch.setattr(PGD, "paper", "Somebody et al. 2001")
    assert {cell.key for cell in planned().cells} == {cell.key for cell in now.cells}
    assert read(Path("new")).facts["attacks"][0]["paper"] == "Madry et al. 2018, Sec. 2.1"
    assert run("new").facts["attacks"][0]["paper"] == "Somebody et al. 2001"


def test_cells_whose_key_has_the_citation_serve(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plans, "_key", lambda facts, attack, store: digest({**facts, "attack": dict(attack)}))
        before = run("out", count=SHARD)
    after = run("out", count=2 * SHARD)
    assert [cell.key for cell in before.cells] == [after.cells[0].key]
    assert after.cells[0].key not in {cell.key for cell in planned().cells}
    assert after.cells[1].key in {cell.key for cell in planned().cells}
    same(after.table(), run("new", count=2 * SHARD).table())


def test_a_cell_that_is_there_is_only_read(here: Path) -> None:
    found = run("out")
    worker = Worker(Path("out"), found.facts)
    for cell in found.cells:
        path = found.store.path(cell.key)
        before = path.stat().st_mtime_ns
        rows = found.store.load(cell.key)
        assert rows.success.any()
        assert not rows.success.all()
        assert worker.compute(cell) == (cell, int((~rows.success).sum()), None)
        assert path.stat().st_mtime_ns == before


def test_a_cell_that_fails_is_recorded_and_tried_again(here: Path) -> None:
    found = run("out", code=1, models=["evaluate_models:raises_on_marked", "evaluate_models:linear"])
    (failure,) = found.failures()
    assert (failure.cell.model, failure.cell.start) == ("evaluate_models:raises_on_marked", SHARD)
    assert failure.error == "KeyError: 'the model is moody'"
    path = Path(f"out/failures/{failure.cell.key}.json")
    assert json.loads(path.read_text()) == {"cell": failure.cell.plain(), "error": failure.error}
    assert len(found.done()) == len(found.cells) - 1 == 5
    message = CliRunner().invoke(app, ["evaluate", "--trust-code", "--out", "out"])
    assert message.exit_code == 1
    assert "examples 10 to 19: KeyError: 'the model is moody'" in message.output
    Path("marker").touch()
    assert CliRunner().invoke(app, ["evaluate", "--trust-code", "--out", "out"]).exit_code == 0
    after = read(Path("out"))
    assert not after.failures()
    assert not path.exists()
    assert len(after.done()) == 6
    table = after.table()
    moody, calm = (table[table.model == f"evaluate_models:{name}"] for name in ("raises_on_marked", "linear"))
    same(moody.drop(columns=["model", "target"]).reset_index(drop=True),
         calm.drop(columns=["model", "target"]).reset_index(drop=True))  # fmt: skip


@pytest.mark.parametrize("name", ["little_memory", "little_memory_on_a_gpu"])
def test_smaller_batches_where_memory_runs_out(here: Path, name: str) -> None:
    entry = {"model": f"evaluate_models:{name}", "name": "model"}
    sizes: list[int] = []
    attack = Worker._attack

    def noted(self: Worker, cell: Cell, size: int) -> Any:
        sizes.append(size)
        return attack(self, cell, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_attack", noted)
        found = run("out", models=[entry], shard=50).table()
    assert sizes == [COUNT, 12, 6]
    plain = run("other", models=[{"model": "evaluate_models:linear", "name": "model"}], shard=50).table()
    same(found, plain, rounding=True)


def test_other_errors_are_not_tried_in_smaller_batches(here: Path) -> None:
    sizes: list[int] = []

    def fails(self: Worker, cell: Cell, size: int) -> Any:
        sizes.append(size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_attack", fails)
        found = run("out", code=1, shard=50)
    assert sizes == [COUNT]
    assert "shapes cannot be multiplied" in found.failures()[0].error


class Made(Adversary):
    """Returns what a function of the examples returns."""

    made: Callable[[Tensor], Tensor] = staticmethod(torch.zeros_like)

    def run(
        self,
        model: Model,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        size: int,
        *,
        targeted: bool = False,
    ) -> Found:
        nothing = torch.zeros(len(x), dtype=torch.float64)
        return Found(self.made(x), nothing, nothing, nothing.bool(), nothing.bool())

    def facts(self) -> dict[str, Any]:
        return {}


def rows_of(made: Callable[[Tensor], Tensor], here: Path, **given: Any) -> pd.DataFrame:
    """The first cell, with an attack of one's own."""
    chosen = planned(**given)
    store = begun(chosen, here / "direct")
    worker = Worker(store.folder, chosen.facts(""))
    attack = Made(name="pgd")
    object.__setattr__(attack, "made", made)
    worker._adversaries["pgd"] = attack
    frame: pd.DataFrame = worker.table(chosen.cells[0]).to_pandas()
    return frame[frame.clean_label == frame.label]


def test_what_leaves_the_ball_or_the_bounds_does_not_count(here: Path) -> None:
    for norm, eps in (("Linf", EPS), ("L2", 0.3)):
        length = {"Linf": lambda d: d.abs().amax((1, 2, 3)), "L2": lambda d: d.flatten(1).norm(dim=1)}[norm]
        weight = evaluate_models.linear().head.weight.detach()

        def towards_another(
            x: Tensor, share: float, eps: float = eps, length: Any = length, weight: Tensor = weight
        ) -> Tensor:
            k = (x.flatten(1) @ weight.T).argmax(1)
            way = (weight[(k + 1) % 3] - weight[k]).reshape(x.shape)
            way[:, 0, 0, 0] = 0
            return x + way * (share * eps / length(way)).reshape(-1, 1, 1, 1)

        within = rows_of(lambda x: towards_another(x, 1.0), here, norm=norm, eps=[eps])
        beyond = rows_of(lambda x: towards_another(x, 1.001), here, norm=norm, eps=[eps])
        hit = within.adversarial_label != within.label
        assert hit.any()
        assert within.success.equals(hit)
        assert (beyond.adversarial_label != beyond.label).any()
        assert not beyond.success.any()
        assert np.allclose(beyond[norm.lower()], 1.001 * eps, rtol=1e-4)

    for value in (-0.01, 1.01):

        def out_of_bounds(x: Tensor, value: float = value) -> Tensor:
            moved = 1 - x
            moved[:, 0, 1, 1] = value
            return moved

        outside = rows_of(out_of_bounds, here, eps=[1.5])
        assert (outside.adversarial_label != outside.label).any()
        assert not outside.success.any()
    assert rows_of(lambda x: 1 - x, here, eps=[1.5]).success.any()
    with pytest.raises(ValueError, match="pgd returned examples that are not finite"):
        rows_of(lambda x: x * torch.nan, here)


def test_examples_are_carried_from_model_to_model(here: Path) -> None:
    names = ["evaluate_models:linear", "evaluate_models:other"]
    carried = run("a", models=names, transfer=True, pictures=30).table()
    plain = run("b", models=names, pictures=30, early_stop=False).table()
    own = carried[carried.model == carried.target].reset_index(drop=True)
    rounded = ["rounded_label", "rounded_success"]  # of runs that have targets
    assert own[rounded].notna().all(axis=None)
    same(own.drop(columns=rounded), plain.drop(columns=rounded))
    assert len(carried) == 2 * len(plain)
    networks = {name: getattr(evaluate_models, name.partition(":")[2])() for name in names}
    away = carried[carried.model != carried.target]
    assert away.adversarial.isna().all()
    assert set(away.model) == set(names)
    content = np.load("images.npz")
    x, y = torch.from_numpy(content["x"]), torch.from_numpy(content["y"])
    for row in away.itertuples():
        network, i = networks[str(row.target)], int(row.example)  # type: ignore[arg-type]
        made = own[(own.model == row.model) & (own.example == i)].iloc[0]
        after = torch.from_numpy(np.frombuffer(made.adversarial, "<f4").reshape(1, 1, 4, 4).copy())
        logits = network(after).double()
        assert row.clean_label == int(network(x[i : i + 1]).argmax())
        assert row.adversarial_label == int(logits.argmax())
        assert row.success == (int(logits.argmax()) != int(y[i]))
        assert row.loss == pytest.approx(float(F.cross_entropy(logits, y[i : i + 1])), rel=1e-5)
        assert row.linf == made.linf
        assert row.l2 == made.l2
    assert (away.success != own.success.to_numpy()[: len(away)]).any()


def test_a_minimum_norm_attack_serves_every_radius(here: Path) -> None:
    name = "ddn:steps=200"
    found = run("out", norm="L2", attacks=[name, "fgsm"], eps=[0.05, 0.1, 0.2])
    assert [(cell.attack, cell.eps) for cell in found.cells[:4]] == [
        (name, None), ("fgsm", 0.05), ("fgsm", 0.1), ("fgsm", 0.2),
    ]  # fmt: skip
    rows = found.table()
    rows = rows[rows.attack == name]
    assert len(rows) == COUNT
    assert rows.eps.isna().all()
    assert (rows.loc[rows.label == rows.clean_label, "l2"] > 0).all()
    weight = evaluate_models.linear().head.weight.detach()
    content = np.load("images.npz")
    x = torch.from_numpy(content["x"]).flatten(1)
    for row in rows[(rows.label == rows.clean_label) & rows.success].itertuples():
        logits, k = x[int(row.example)] @ weight.T, int(row.label)  # type: ignore[arg-type]
        nearest = min(
            float((logits[k] - logits[j]) / (weight[k] - weight[j]).norm()) for j in range(3) if j != k
        )  # without the bounds of the pixels, which only carry it further away
        assert nearest * 0.999 <= row.l2 <= 2 * nearest  # type: ignore[operator]
    store = Store(Path("out"))
    cell = found.cells[0]
    robust = [work.unbroken(store, cell, specify(keys(norm="L2", eps=[eps]))) for eps in (0.05, 0.2, 0.4)]
    first = rows[rows.example < SHARD]
    assert robust == [int((~(first.success & (first.l2 <= eps))).sum()) for eps in (0.05, 0.2, 0.4)]


def test_attacks_of_autoattack(here: Path) -> None:
    tables = [run(out, attacks=["apgd-ce", "fgsm"], count=8, pictures=8).table() for out in ("a", "b")]
    same(*tables)
    auto, fgsm = (tables[0][tables[0].attack == name].reset_index() for name in ("apgd-ce", "fgsm"))
    assert (auto.success >= fgsm.success).all()
    assert (auto.linf <= EPS * (1 + 1e-5) + 1e-6).all()
    right = auto.label == auto.clean_label
    assert (auto.backwards[right] > 1).all()
    assert (auto.backwards[~right] == 0).all()
    facts = read(Path("a")).facts["attacks"][0]
    assert facts["kind"] == "autoattack"
    assert facts["parameters"]["attacks"] == ["apgd-ce"]


def test_the_first_examples_and_the_broken_are_kept_as_pictures(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PICTURED", 21 * 16 + 15)
    found = run("out", pictures=3)
    table = found.table()
    broken = (table.success & (table.label == table.clean_label)).tolist()
    assert table.adversarial.notna().tolist() == [i < 3 or (broken[i] and i < 21) for i in range(COUNT)]
    assert sum(broken[3:21]) > 2
    assert any(broken[21:]), "the bound leaves some out"
    assert (table.success & (table.label != table.clean_label)).any(), "misclassified as they are"
    clean = found.examples(0, COUNT)
    assert torch.equal(clean, torch.from_numpy(np.load("images.npz")["x"]))
    for i in table.index[table.adversarial.notna()]:
        picture = np.frombuffer(table.adversarial[i], "<f4").reshape(1, 4, 4)
        assert np.abs(picture - clean[i].numpy()).max() == pytest.approx(table.linf[i], abs=1e-7)
    assert table.linf.max() > 0.01
    assert run("none", pictures=0).table().adversarial.isna().all()


def test_a_change_of_weights_during_a_run_is_noticed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = planned()
    store = begun(chosen, here / "out")
    monkeypatch.setattr(evaluate_models, "linear", evaluate_models.other)
    report = Worker(store.folder, chosen.facts("")).compute(chosen.cells[0])
    assert report.error is not None
    assert "the model is not the one that the run began with (weights head.weight)" in report.error
    assert store.failure(chosen.cells[0].key) == report.error
    assert not store.done(chosen.cells[0].key)


def test_a_dry_run_writes_nothing(here: Path) -> None:
    Path("spec.yaml").write_text(json.dumps(keys(attacks=["pgd:steps=4", "apgd-ce"])))
    done = CliRunner().invoke(app, ["evaluate", "spec.yaml", "--trust-code", "--dry-run", "--out", "out"])
    assert done.exit_code == 0
    assert not Path("out").exists()
    message = " ".join(done.output.split())
    assert (
        f"6 cells, 0 of them done; {COUNT} examples of shape (1, 4, 4). 1 model is diagnosed first. "
        f"Left: at most {4 * COUNT} gradients" in message
    )
    run("out", attacks=["pgd:steps=4", "apgd-ce"])
    message = " ".join(
        CliRunner().invoke(app, ["evaluate", "spec.yaml", "--trust-code", "--dry-run", "--out", "out"]).output.split()
    )
    assert "6 cells, 6 of them done" in message
    assert "at most 0 gradients" in message


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    peaks = {}
    for count in (1000, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        np.savez(folder / "images.npz", x=random.random((count, 3, 32, 32), np.float32), y=np.zeros(count, np.int64))
        child = evaluate_models.process(
            folder, "evaluate", "--model", "evaluate_models:wide", "--data", "images.npz", "--eps", "0.1",
            "--attack", "fgsm", "--out", "out", peak=str(folder / "peak"),
        )  # fmt: skip
        child.start()
        child.join()
        assert child.exitcode == 0, (folder / "log").read_text()
        assert read(folder / "out").table(["example"])["example"].tolist() == list(range(count))
        peaks[count] = int((folder / "peak").read_text())
    assert peaks[10_000] <= 1.1 * peaks[1000], peaks
