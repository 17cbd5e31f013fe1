"""Transfer studies: rates by hand, cells on disk, tables and pictures, and the two commands."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typer.testing import CliRunner

from firstorder.attacks import FGSM, MIFGSM, NIFGSM, PGD, Attack, Quantised
from firstorder.evaluation.cli import app
from firstorder.evaluation.names.defences import JPEG, ResizePad, Smoothing, error_rate
from firstorder.evaluation.reporting import transfer_report
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.runs.transfer import CLEAN, DEFENCE_SEED, Cell, Outcome, Study, correct, create, together
from firstorder.evaluation.studies import scale_invariance

EPS, BATCH = 0.03, 4
CELL = Cell(source="a", attack="mi-fgsm", eps=EPS, steps=3)


def network(seed: int, *, classes: int = 4) -> nn.Sequential:
    """A classifier of images (N, 3, 8, 8); the seeds differ in a disturbance of the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, classes))
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.5 * weight.data.std() * torch.randn_like(weight)
        model[0].weight.data *= 4
    return model.eval()


def images(seed: int = 0, n: int = 40) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def known(models: dict[str, nn.Module], n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n images that all models classify alike, and that class."""
    x = images(seed, 200)
    with torch.no_grad():
        votes = torch.stack([model(x).argmax(1) for model in models.values()])
    same = (votes == votes[0]).all(0)
    assert int(same.sum()) >= n
    return x[same][:n], votes[0][same][:n]


def study(folder: Path | None = None, **changes: Any) -> Study:
    """A small study, one batch of which is not full."""
    models = changes.pop("models", None) or {name: network(seed) for seed, name in enumerate("abc", 1)}
    x, y = known(models)
    settings: dict[str, Any] = {"targets": ["a", "b", "c"], "x": x, "y": y, "batch_size": BATCH, "folder": folder}
    return Study(models, **{**settings, **changes})


def by_hand(one: Study, attack: Attack, source: Callable[[Tensor], Tensor], seed: int = 0) -> list[Tensor]:
    """The examples of every batch."""
    batches = zip(one.x.split(BATCH), one.y.split(BATCH), strict=True)
    return [attack(source, x, y, generator=torch.Generator().manual_seed(seed)) for x, y in batches]


def wrong(one: Study, target: str, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return one.models[target](torch.cat(batches)).argmax(1) != one.y


def counting(
    monkeypatch: pytest.MonkeyPatch, *, stop: int | None = None, examples: list[Tensor] | None = None
) -> list[Cell]:
    """The cell of every batch that is crafted from now on, its `examples` likewise; the `stop`-th fails."""
    crafted: list[Cell] = []
    craft = Study._craft

    def _craft(self: Study, cell: Cell, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        crafted.append(cell)
        if len(crafted) == stop:
            raise KeyboardInterrupt
        made = craft(self, cell, x, y)
        if examples is not None:
            examples.append(made[0])
        return made

    monkeypatch.setattr(Study, "_craft", _craft)
    return crafted


def equal(one: Outcome, other: Outcome) -> bool:
    return list(one.fooled) == list(other.fooled) and all(
        torch.equal(shares, other.fooled[name]) and shares.dtype == other.fooled[name].dtype
        for name, shares in one.fooled.items()
    )


# --- intervals


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 10, 0.01788, 0.40415),
        (81, 263, 0.25529, 0.36621),
    ],
)
def test_wilson_against_published_values(hits: int, n: int, low: float, high: float) -> None:
    """81 of 263 is the first example of Newcombe 1998, who prints 0.2553 to 0.3662."""
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=6e-6)


def test_wilson_against_scipy() -> None:
    stats = importlib.import_module("scipy.stats")
    for n in (1, 7, 200):
        for hits in range(0, n + 1, max(n // 7, 1)):
            expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
            low, high = wilson(hits / n, n)
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
            assert 0 <= low <= hits / n + 1e-12
            assert hits / n - 1e-12 <= high <= 1


def test_wilson_without_trials() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


# --- attacks, sources and images


def test_attacks_at_a_budget() -> None:
    assert create("mi-fgsm:decay=0.5", eps=0.1, steps=7) == MIFGSM(eps=0.1, steps=7, decay=0.5)
    assert create("mi-fgsm+quantised", eps=0.1, steps=7) == MIFGSM(eps=0.1, steps=7, direction=Quantised())
    assert create("fgsm", eps=0.1, steps=7) == FGSM(eps=0.1)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("ddn", "'ddn' has no radius to stay in, and transfer is judged at a given eps; name another"),
        ("pgd:eps=0.1", "no parameter 'eps'"),
        ("pgd:steps=3", "no parameter 'steps'"),
        ("pgd:early_stop=true", "no parameter 'early_stop'"),
        ("mi-fgsm:decay=-1", "decay=-1"),
        (CLEAN, "unknown attack 'clean'"),
    ],
)
def test_attacks_that_transfer_cannot_judge(label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(label, eps=0.1, steps=3)


def test_ensembles_are_joined_by_a_plus() -> None:
    models, x = {name: network(seed) for seed, name in enumerate("abc", 1)}, images()
    assert together(models, "b") is models["b"]
    torch.testing.assert_close(together(models, "a+c")(x), (models["a"](x) + models["c"](x)) / 2)
    with pytest.raises(KeyError):
        together(models, "a+d")


def test_images_that_all_models_know() -> None:
    models, x = {name: network(seed) for seed, name in enumerate("ab", 1)}, images()
    with torch.no_grad():
        first, second = (model(x).argmax(1) for model in models.values())
    assert 0 < int((first != second).sum()) < len(x)
    for batch_size in (3, 100):
        assert torch.equal(correct(models, x, first, batch_size=batch_size), first == second)
    assert not correct(models, x, (first + 1) % 4).any()


def test_a_study_needs_an_image() -> None:
    with pytest.raises(ValueError, match="no image is classified correctly by all models; choose others"):
        study(x=images()[:0], y=torch.zeros(0, dtype=torch.long))


# --- cells


@pytest.mark.parametrize(
    ("label", "attack", "seed"),
    [
        ("mi-fgsm", MIFGSM(eps=EPS, steps=3), 0),
        ("ni-fgsm:decay=0.5", NIFGSM(eps=EPS, steps=3, decay=0.5), 0),
        ("pgd", PGD(eps=EPS, steps=3), 0),
        ("pgd", PGD(eps=EPS, steps=3), 5),
        ("mi-fgsm+quantised", MIFGSM(eps=EPS, steps=3, direction=Quantised()), 0),
    ],
)
def test_rates_by_hand(label: str, attack: Attack, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, progress, made = study(), [], []
    counting(monkeypatch, examples=made)
    outcome = one.run(replace(CELL, attack=label, seed=seed), progress=progress.append)
    assert list(outcome.fooled) == ["a", "b", "c"]
    assert progress == [4, 4, 2]
    examples = by_hand(one, attack, one.models["a"], seed)
    assert torch.equal(torch.cat(made), torch.cat(examples))
    for name, shares in outcome.fooled.items():
        expected = wrong(one, name, examples)
        assert torch.equal(shares, expected.float())
        assert outcome.rate(name) == int(expected.sum()) / 10
    assert 1 >= outcome.rate("a") > outcome.rate("b") > 0


def test_an_ensemble_as_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    one, made = study(targets=["c", "b"]), []
    counting(monkeypatch, examples=made)
    outcome = one.run(replace(CELL, source="a+b"))
    examples = by_hand(one, MIFGSM(eps=EPS, steps=3), lambda x: (one.models["a"](x) + one.models["b"](x)) / 2)
    torch.testing.assert_close(torch.cat(made), torch.cat(examples), rtol=0, atol=1e-6)
    assert list(outcome.fooled) == ["c", "b"]
    for name in ("c", "b"):
        assert torch.equal(outcome.fooled[name], wrong(one, name, examples).float())
    assert outcome.rate("b") > one.run(CELL).rate("b")


def test_defences_judge_the_same_examples() -> None:
    """Those that draw give shares in multiples of 1 / draws, those that do not 0 or 1."""
    noise, codec = Smoothing(sigma=0.4, votes=1), JPEG(quality=20)
    one = study(targets=["b"], defences={"noise": noise, "jpeg": codec}, draws=4)
    outcome = one.run(CELL)
    assert list(outcome.fooled) == ["b", "b | noise", "b | jpeg"]
    examples = by_hand(one, MIFGSM(eps=EPS, steps=3), one.models["a"])
    for name, defence in (("noise", noise), ("jpeg", codec)):
        parts = zip(examples, one.y.split(BATCH), strict=True)
        rates = [
            error_rate(defence, one.models["b"], x, y, draws=4, seed=DEFENCE_SEED, batch_size=BATCH) for x, y in parts
        ]
        assert torch.equal(outcome.fooled[f"b | {name}"], torch.cat(rates))
    shares = 4 * outcome.fooled["b | noise"]
    assert torch.equal(shares, shares.round())
    assert ((shares > 0) & (shares < 4)).any()
    assert set(outcome.fooled["b | jpeg"].tolist()) <= {0.0, 1.0}
    other = one.run(replace(CELL, seed=1))
    assert torch.equal(other.fooled["b"], outcome.fooled["b"])
    assert not torch.equal(other.fooled["b | noise"], outcome.fooled["b | noise"])


def test_the_clean_cell() -> None:
    noise = Smoothing(sigma=0.4, votes=1)
    one = study(defences={"noise": noise}, draws=3)
    outcome = one.run(Cell(source="a", attack=CLEAN, eps=0.0, steps=0))
    for name in "abc":
        parts = zip(one.x.split(BATCH), one.y.split(BATCH), strict=True)
        rates = [
            error_rate(noise, one.models[name], x, y, draws=3, seed=DEFENCE_SEED, batch_size=BATCH) for x, y in parts
        ]
        assert outcome.rate(name) == 0
        assert torch.equal(outcome.fooled[f"{name} | noise"], torch.cat(rates))
    assert outcome.rate("a | noise") > 0


# --- cells on disk


def test_a_finished_cell_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crafted, progress = counting(monkeypatch), []
    options = {"defences": {"noise": Smoothing(sigma=0.4, votes=1)}, "draws": 3}
    first = study(tmp_path, **options).run(CELL)
    assert crafted == [CELL] * 3
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_text())
    assert (stored["source"], stored["attack"], stored["eps"], stored["steps"], stored["seed"]) == (
        *vars(CELL).values(),
    )
    again = study(tmp_path, **options).run(CELL, progress=progress.append)
    assert crafted == [CELL] * 3
    assert equal(again, first)
    assert progress == [10]
    study(None, **options).run(CELL)
    assert len(crafted) == 6
    assert [*tmp_path.iterdir()] == [file]


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off in the second batch of the second cell: that cell is made anew, the first is not."""
    plan = [CELL, replace(CELL, attack="pgd"), replace(CELL, source="b+c")]
    whole = [study().run(cell) for cell in plan]
    with monkeypatch.context() as patch:
        crafted = counting(patch, stop=5)
        broken = study(tmp_path)
        broken.run(plan[0])
        with pytest.raises(KeyboardInterrupt):
            broken.run(plan[1])
    assert crafted == [plan[0]] * 3 + [plan[1]] * 2
    assert len([*tmp_path.iterdir()]) == 1
    crafted, resumed = counting(monkeypatch), study(tmp_path)
    outcomes = [resumed.run(cell) for cell in plan]
    assert crafted == [plan[1]] * 3 + [plan[2]] * 3
    assert len([*tmp_path.iterdir()]) == 3
    assert all(equal(one, other) for one, other in zip(outcomes, whole, strict=True))


def other_weights(name: str) -> dict[str, nn.Module]:
    models = {name: network(seed) for seed, name in enumerate("abc", 1)}
    next(models[name].parameters()).data[0, 0, 0, 0] += 1e-6
    return models


def other_pixel() -> Tensor:
    x = study().x.clone()
    x[3, 1, 2, 2] = 0.5
    return x


KEYS: dict[str, Callable[[], tuple[Cell, dict[str, Any]]]] = {
    "parameter": lambda: (replace(CELL, attack="mi-fgsm:decay=0.9"), {}),
    "rule": lambda: (replace(CELL, attack="mi-fgsm+quantised"), {}),
    "eps": lambda: (replace(CELL, eps=EPS + 1e-9), {}),
    "steps": lambda: (replace(CELL, steps=4), {}),
    "seed": lambda: (replace(CELL, seed=1), {}),
    "source": lambda: (replace(CELL, source="b"), {}),
    "ensemble": lambda: (replace(CELL, source="a+b"), {}),
    "weights of the source": lambda: (CELL, {"models": other_weights("a")}),
    "weights of a target": lambda: (CELL, {"models": other_weights("c")}),
    "images": lambda: (CELL, {"x": other_pixel()}),
    "labels": lambda: (CELL, {"y": (study().y + 1) % 4}),
    "targets": lambda: (CELL, {"targets": ["a", "b"]}),
    "defences": lambda: (CELL, {"defences": {"noise": Smoothing(sigma=0.2, votes=1)}}),
    "draws": lambda: (CELL, {"draws": 7}),
}


@pytest.mark.parametrize("change", KEYS)
def test_what_decides_the_outcome_decides_the_cell(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, changes = KEYS[change]()
    study(tmp_path).run(CELL)
    crafted = counting(monkeypatch)
    found = study(tmp_path, **changes).run(cell)
    assert crafted == [cell] * 3
    assert len([*tmp_path.iterdir()]) == 2
    assert equal(found, study(**changes).run(cell))


def test_parameters_of_a_defence_decide_the_cell(tmp_path: Path) -> None:
    for i, rate in enumerate((1.3, 1.6), 1):
        one = study(tmp_path, defences={"resize": ResizePad(rate=rate)}).run(CELL)
        assert len([*tmp_path.iterdir()]) == i
        assert equal(one, study(defences={"resize": ResizePad(rate=rate)}).run(CELL))


def test_defaults_of_the_attack_decide_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a later version of firstorder, or of a plugin, has other defaults."""
    study(tmp_path).run(CELL)
    crafted = counting(monkeypatch)
    monkeypatch.setitem(MIFGSM.__init__.__kwdefaults__, "decay", 0.25)  # type: ignore[attr-defined]
    assert create("mi-fgsm", eps=EPS, steps=3) == MIFGSM(eps=EPS, steps=3, decay=0.25)
    study(tmp_path).run(CELL)
    assert crafted == [CELL] * 3


def test_what_does_not_matter_leaves_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of other cells, and the order of pixels in memory."""
    one = study(tmp_path, targets=["a", "b"])
    first = one.run(CELL)
    crafted = counting(monkeypatch)
    models: dict[str, nn.Module] = {**one.models, "c": network(9)}
    again = study(tmp_path, targets=["a", "b", "a"], models=models, x=one.x.contiguous(), y=one.y)
    assert equal(again.run(CELL), first)
    assert crafted == []


# --- tables and pictures


def outcome(cell: Cell, **fooled: Sequence[float]) -> Outcome:
    names = {name.replace("__", " | "): torch.tensor(shares) for name, shares in fooled.items()}
    return Outcome(cell=cell, fooled=names)


def outcomes() -> list[Outcome]:
    """Two attacks on a at two T, one on both models, and the images as they are."""
    clean = Cell(source="a", attack=CLEAN, eps=0.0, steps=0)
    made = [outcome(clean, a=[0, 0, 0, 0], b=[0.0] * 4, c=[0.0] * 4, b__jpeg=[0, 0, 0, 1.0])]
    for steps, extra in ((2, 0.0), (5, 1.0)):
        for label in ("mi-fgsm", "pgd"):
            cell = Cell(source="a", attack=label, eps=0.1, steps=steps)
            b, c = [1.0, 0, 0, extra], [1.0, 0, 1, float(label == "pgd")]
            made.append(outcome(cell, a=[1.0, 1, 1, 1], b=b, c=c, b__jpeg=[0.5, 0, 0, 0]))
    last = Cell(source="a+b", attack="pgd", eps=16 / 255, steps=5)
    return [*made, outcome(last, a=[1.0, 1, 1, 0], b=[1.0, 1, 1, 1], c=[0.0, 0, 0, 1], b__jpeg=[0.25, 0, 0, 0])]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(line: str) -> list[str]:
    return [value.strip() for value in re.split(r"(?<!\\)\|", line)[1:-1]]


def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on, in place of the saving."""
    saved: list[Figure] = []
    monkeypatch.setattr(transfer_report, "_save", lambda figure, path: saved.append(figure) or path)
    return saved


def test_the_average_is_black_box() -> None:
    clean, *_, pgd, both = outcomes()
    assert transfer_report.average(pgd) == pytest.approx((0.5 + 0.75) / 2)
    assert transfer_report.average(both) == 0.25
    assert transfer_report.average(outcome(both.cell, a=[1.0], b=[1.0], b__jpeg=[0.0])) is None
    assert transfer_report.average(clean) == 0


def test_the_table_shows_the_last_budget() -> None:
    header, lines = transfer_report.table(outcomes(), 5)
    assert header == ["source", "attack", "eps", "a", "b", "c", "b | jpeg", "black-box mean"]
    assert [line[:3] for line in lines] == [
        ["", "clean", ""],
        ["a", "mi-fgsm", "0.1"],
        ["a", "pgd", "0.1"],
        ["a+b", "pgd", "16/255"],
    ]
    assert [line[-1] for line in lines] == ["", "50.0", "62.5", "25.0"]
    assert lines[2][5] == "75.0"
    assert lines[1][6] == "12.5"
    assert [line[4] for line in transfer_report.table(outcomes(), 2)[1]] == ["0.0", "25.0", "25.0"]


def test_the_long_table_has_intervals() -> None:
    header, lines = transfer_report.long_table(outcomes(), 5)
    assert header == ["source", "attack", "eps", "judge", "success", "95 %"]
    assert len(lines) == 4 * 4
    low, high = wilson(0.75, 4)
    assert ["a", "pgd", "0.1", "c", "75.0", f"{100 * low:.1f} – {100 * high:.1f}"] in lines
    assert f"{100 * low:.1f} – {100 * high:.1f}" == "30.1 – 95.4"


def test_the_files(tmp_path: Path) -> None:
    made = outcomes()
    paths = transfer_report.write(made, tmp_path / "new", facts={"data": "a<b|c", "images": 4})
    assert [path.name for path in paths] == ["transfer.md", "transfer.csv", "transfer.png", "steps.png"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in paths}
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    protocol, table, intervals = paths[0].read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert "T = 5; data a&lt;b\\|c, images 4." in protocol
    for text, make in ((table, transfer_report.table), (intervals, transfer_report.long_table)):
        header, dashes, *lines = (columns(line) for line in text.split("\n"))
        expected, body = make(made, 5)
        assert [value.replace("\\|", "|") for value in header] == expected
        assert dashes == ["---"] * len(header)
        assert [[value.replace("\\|", "|") for value in line] for line in lines] == body
    found = rows(paths[1])
    assert len(found) == 6 * 4
    for row, (one, judge) in zip(found, [(each, judge) for each in made for judge in each.fooled], strict=True):
        cell, rate = one.cell, one.rate(judge)
        assert (row["source"], row["attack"], row["judge"], row["images"]) == (cell.source, cell.attack, judge, "4")
        assert (float(row["eps"]), int(row["steps"]), int(row["seed"])) == (cell.eps, cell.steps, cell.seed)
        limits = (float(row["success"]), float(row["low"]), float(row["high"]))
        assert limits == pytest.approx((rate, *wilson(rate, 4)), abs=1e-6)
    single = transfer_report.write(made[:3], tmp_path / "single", facts={})
    assert [path.name for path in single] == ["transfer.md", "transfer.csv", "transfer.png"]


def test_names_cannot_break_the_table(tmp_path: Path) -> None:
    cell = Cell(source="x|y", attack="pgd:a\\|<b>", eps=0.1, steps=1)
    odd = Outcome(cell=cell, fooled={"<script>": torch.ones(2), "p|q": torch.zeros(2)})
    markdown, data, _ = transfer_report.write([odd], tmp_path, facts={})
    header, dashes, line, *_ = markdown.read_text().split("\n\n", 1)[1].split("\n")
    assert columns(header) == ["source", "attack", "eps", "&lt;script>", "p\\|q", "black-box mean"]
    assert len(columns(dashes)) == 6
    assert line.startswith("| x\\|y | pgd:a\\\\\\|&lt;b> | 0.1 | 100.0 |")
    assert "<" not in markdown.read_text()
    assert [(row["attack"], row["judge"]) for row in rows(data)] == [(cell.attack, "<script>"), (cell.attack, "p|q")]


def test_the_heat_map_shows_every_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = figures(monkeypatch)
    transfer_report.heat_map(outcomes(), 5, tmp_path / "x.png")
    axes = saved[0].axes[0]
    rates = [[0, 0, 0, 25], [100, 50, 50, 12.5], [100, 50, 75, 12.5], [75, 100, 25, 6.25]]
    assert np.asarray(axes.images[0].get_array()).tolist() == rates
    assert [text.get_text() for text in axes.texts] == [f"{rate:.1f}" for line in rates for rate in line]
    assert [text.get_position() for text in axes.texts[:5]] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "b\njpeg"]
    names = ["clean", "a: mi-fgsm, ε = 0.1", "a: pgd, ε = 0.1", "a+b: pgd, ε = 16/255"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    transfer_report.heat_map(outcomes()[:3], 2, tmp_path / "x.png")
    assert [label.get_text() for label in saved[1].axes[0].get_yticklabels()][1] == "mi-fgsm, ε = 0.1"


def test_the_curves_follow_the_black_box_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = figures(monkeypatch)
    attacked = outcomes()[:0:-1]
    transfer_report.step_curves(attacked, tmp_path / "x.png")
    found = [
        {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines} for axes in saved[0].axes
    ]
    assert found == [
        {"a+b: pgd": [[5, 25]]},
        {"a: pgd": [[2, 50], [5, 62.5]], "a: mi-fgsm": [[2, 37.5], [5, 50]]},
    ]
    assert [axes.get_title() for axes in saved[0].axes] == ["ε = 16/255", "ε = 0.1"]
    own = outcome(attacked[0].cell, a=[1.0, 1], b=[0.0, 1], b__jpeg=[0.0, 0])
    transfer_report.step_curves([own], tmp_path / "x.png")
    assert np.asarray(saved[1].axes[0].lines[0].get_xydata()).tolist() == [[5, 75]]


# --- the commands


MODULE = """
import torch
from test_transfer import network

def first():
    return network(1).train()

def second():
    return network(2)

def stranger():
    model = network(3)
    model[3].bias.data[0] = 1e3
    return model
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, some of which only one model knows, and with models in the module `zoo_of_two`."""
    x = images(n=40)
    with torch.no_grad():
        y = network(1)(x).argmax(1)
    np.savez(tmp_path / "mine.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "wrong.npz", x=x.numpy(), y=((y + 1) % 4).numpy())
    (tmp_path / "zoo_of_two.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def called(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "500"}).invoke(app, list(words))


def test_the_transfer_command(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "zoo_of_two:first", "zoo_of_two:second"
    words = ["transfer", "--source", first, "--source", f"{first}+{second}", "--target", second, "--target", first]
    words += ["--data", str(zoo / "mine.npz"), "--count", "9", "--skip", "2", "--batch-size", str(BATCH)]
    words += ["--attack", "pgd", "--attack", "mi-fgsm:decay=0.5", "--steps", "4", "--steps", "2", "--eps", "20/255"]
    words += ["--defence", "jpeg:quality=30", "--defence", "smoothing:sigma=0.3,votes=1", "--draws", "2", "--seed", "3"]
    words += ["--threads", "1", "--out", str(zoo / "out")]
    crafted = counting(monkeypatch)
    done = called(*words)
    assert done.exit_code == 0, done.output
    assert "success, %, of 9 images" in done.output
    assert f"{first}+{second}" in done.output
    names = ["transfer.md", "transfer.csv", "transfer.png", "steps.png"]
    assert [line for line in done.output.splitlines() if line.startswith("wrote")] == [
        f"wrote {zoo / 'out' / name}" for name in names
    ]
    table = rows(zoo / "out" / "transfer.csv")
    cells = {(row["source"], row["attack"], row["steps"], row["seed"]) for row in table}
    assert cells == {(first, CLEAN, "0", "0")} | {
        (source, attack, steps, "3")
        for source in (first, f"{first}+{second}")
        for attack in ("pgd", "mi-fgsm:decay=0.5")
        for steps in ("2", "4")
    }
    judges = [
        name + tail for name in (second, first) for tail in ("", " | jpeg:quality=30", " | smoothing:sigma=0.3,votes=1")
    ]
    assert [row["judge"] for row in table] == judges * 9
    assert len([*(zoo / "out" / "cells").iterdir()]) == 9
    assert len(crafted) == 9 * 3

    models = {first: network(1), second: network(2)}
    x, y = (torch.from_numpy(np.load(zoo / "mine.npz")[name]) for name in "xy")
    right = correct(models, x, y)
    assert 11 < int(right.sum()) < len(x)
    x, y = x[right][2:11], y[right][2:11]
    one = Study(models, [second], x, y)
    for attack in (PGD(eps=20 / 255, steps=4), MIFGSM(eps=20 / 255, steps=4, decay=0.5)):
        label = "pgd" if isinstance(attack, PGD) else "mi-fgsm:decay=0.5"
        for source in (first, f"{first}+{second}"):
            fooled = wrong(one, second, by_hand(one, attack, together(models, source), seed=3)).double().mean()
            (row,) = (
                row
                for row in table
                if (row["source"], row["attack"], row["steps"], row["judge"]) == (source, label, "4", second)
            )
            assert float(row["success"]) == pytest.approx(float(fooled), abs=1e-6)
            assert row["images"] == "9"
    text = (zoo / "out" / "transfer.md").read_text()
    assert "T = 4; data mine, images 9, seed 3, draws of random defences 2." in text

    crafted.clear()
    again = called(*words)
    assert again.exit_code == 0, again.output
    assert crafted == []
    assert (zoo / "out" / "transfer.md").read_text() == text
    assert rows(zoo / "out" / "transfer.csv") == table
    more = called(*words, "--steps", "6")
    assert more.exit_code == 0, more.output
    assert {cell.steps for cell in crafted} == {6}


def test_targets_are_the_sources_by_default(zoo: Path) -> None:
    words = ["--source", "zoo_of_two:second+zoo_of_two:first", "--attack", "fgsm", "--data", str(zoo / "mine.npz")]
    done = called("transfer", *words, "--out", str(zoo / "out"))
    assert done.exit_code == 0, done.output
    table = rows(zoo / "out" / "transfer.csv")
    assert [row["judge"] for row in table] == ["zoo_of_two:second", "zoo_of_two:first"]
    assert {(row["attack"], row["steps"]) for row in table} == {("fgsm", "10")}
    assert float(table[0]["eps"]) == pytest.approx(16 / 255)
    assert sorted(path.name for path in (zoo / "out").iterdir()) == [
        "cells",
        "transfer.csv",
        "transfer.md",
        "transfer.png",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "mi-fgms"], "unknown attack 'mi-fgms'; did you mean mi-fgsm"),
        (["--attack", "ddn"], "'ddn' has no radius to stay in, and transfer is judged at a given eps; name another"),
        (["--attack", "pgd:m=3"], "pgd has no parameter 'm'; it has alpha"),
        (["--attack", "pgd+up"], "'pgd+up': unknown update rule 'up'; `firstorder attacks` lists all"),
        (["--attack", "mi-fgsm:decay=-1"], "decay=-1 must be a finite number at least 0"),
        (["--defence", "blur"], "unknown defence 'blur'; there are jpeg"),
        (["--eps", "8/0"], "eps='8/0' is not a finite number above 0; write 0.3 or 8/255"),
        (["--eps", "big"], "eps='big' is not a finite number above 0; write 0.3 or 8/255"),
        (["--eps", "-1"], "eps='-1' is not a finite number above 0; write 0.3 or 8/255"),
        (["--source", "resnet"], "unknown model 'resnet'; name one of mnist-cnn"),
        (["--target", "zoo_of_two:third"], "has no attribute 'third'"),
        (["--data", "imagenet"], "unknown data 'imagenet'; name mnist or cifar10"),
        (["--data", "wrong.npz"], "no image is classified correctly by all models; choose others"),
        (["--target", "zoo_of_two:stranger", "--skip", "39"], "no image is classified correctly by all models"),
    ],
)
def test_one_line_for_a_mistake(words: list[str], message: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    usual = ["--source", "zoo_of_two:first"] if "--source" not in words else []
    done = called("transfer", *usual, "--data", "mine.npz", *words, "--out", "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_the_scale_invariance_command(zoo: Path) -> None:
    first, second = "zoo_of_two:first", "zoo_of_two:second"
    words = ["scale-invariance", "--model", first, "--model", second, "--data", str(zoo / "mine.npz"), "--count", "7"]
    done = called(*words, "--out", str(zoo / "out"))
    assert done.exit_code == 0, done.output
    table = rows(zoo / "out" / "scale_invariance.csv")
    assert [row["model"] for row in table] == [first] * 20 + [second] * 20
    x, y = (torch.from_numpy(np.load(zoo / "mine.npz")[name][:7]) for name in "xy")
    for name, model in ((first, network(1)), (second, network(2))):
        curve = scale_invariance.curve(name, model, x, y)
        found = [(float(row["loss"]), float(row["accuracy"])) for row in table if row["model"] == name]
        assert [loss for loss, _ in found] == pytest.approx(curve.loss.tolist(), rel=1e-4)
        assert [accuracy for _, accuracy in found] == pytest.approx(curve.accuracy.tolist(), abs=1e-5)
        line = next(line for line in done.output.splitlines() if name in line and "." in line)
        shown = [curve.loss[i] for i in (0, 2, 4, 6, 9, 14, 19)]
        assert [float(value) for value in line.split()[1:]] == pytest.approx([float(v) for v in shown], abs=6e-4)
    assert not math.isclose(float(table[0]["loss"]), float(table[20]["loss"]), rel_tol=1e-3)
    assert (zoo / "out" / "scale_invariance.png").read_bytes().startswith(b"\x89PNG")


def test_packaged_models_bring_their_images(tmp_path: Path) -> None:
    done = called("scale-invariance", "--model", "mnist-cnn", "--count", "20", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    accuracy = {row["scale"]: float(row["accuracy"]) for row in rows(tmp_path / "scale_invariance.csv")}
    assert accuracy["1"] >= 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet"], "unknown model 'resnet'; name one of mnist-cnn"),
        (["--model", "zoo_of_two:first"], "zoo_of_two:first brings no images; name some with --data"),
        (["--model", "zoo_of_two:third"], "has no attribute 'third'"),
        (["--model", "zoo_of_two:first", "--data", "imagenet"], "unknown data 'imagenet'; name mnist or cifar10"),
    ],
)
def test_one_line_for_a_mistake_about_scales(words: list[str], message: str, zoo: Path) -> None:
    done = called("scale-invariance", *words, "--out", str(zoo / "out"))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (zoo / "out").exists()
