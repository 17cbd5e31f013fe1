"""Transfer: rates by hand, the axes of a run, tables and pictures, and the two commands."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typer.testing import CliRunner

from firstorder.attacks import MIFGSM, NIFGSM, PGD, Attack, Ensemble, Quantised
from firstorder.evaluation import evaluate
from firstorder.evaluation.cli import app
from firstorder.evaluation.names.defences import JPEG, Defence, ResizePad, Smoothing, error_rate
from firstorder.evaluation.reporting import transfer_figures, transfer_outcomes, transfer_report
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.reporting.transfer_outcomes import CLEAN, Outcome
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.store import read
from firstorder.evaluation.runs.work import Worker
from firstorder.evaluation.studies import scale_invariance

EPS = 0.03
NAMES = ("a", "b", "c")


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


def a() -> nn.Module:
    return network(1)


def b() -> nn.Module:
    return network(2)


def c() -> nn.Module:
    return network(3)


MODELS = {"a": a(), "b": b(), "c": c()}


def images(seed: int = 0, n: int = 120) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def classes(x: Tensor, name: str) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(sum(MODELS[part](x) for part in name.split("+")).argmax(1))


def right(x: Tensor, y: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    return torch.stack([classes(x, name) == y for name in names]).all(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images labelled as the first model says, some of which the others do not know."""
    path = tmp_path_factory.mktemp("data") / "mine.npz"
    x = images()
    np.savez(path, x=x.numpy(), y=classes(x, "a").numpy())
    return path


def chosen(count: int = 10) -> tuple[Tensor, Tensor]:
    """The first images that all models classify correctly, and their labels."""
    x = images()
    y = classes(x, "a")
    assert count < int(right(x, y).sum()) < len(x)
    return x[right(x, y)][:count], y[right(x, y)][:count]


def ran(data: Path, out: Path | None = None, **given: Any) -> list[Outcome]:
    """The outcomes of a small run from a on all models; by default in shards that are not all full."""
    usual = {
        "models": [{"model": f"test_transfer:{name}", "name": name} for name in NAMES],
        "sources": "a", "targets": NAMES, "data": str(data), "select": "all-correct", "count": 10, "eps": EPS,
        "attacks": "mi-fgsm", "steps": 3, "shard": 4, "prepare": False, "pictures": 0,
    }  # fmt: skip
    return transfer_outcomes.outcomes(evaluate({**usual, **given}, out, only=True).run)


def seed_of(**facts: Any) -> int:
    """What a cell draws from."""
    return int(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:15], 16)


def by_hand(attack: Attack, source: Callable[[Tensor], Tensor], seed: int = 0) -> Tensor:
    """The examples, a shard after the other."""
    x, y = chosen()
    made = []
    for start in range(0, 10, 4):
        generator = torch.Generator().manual_seed(seed_of(seed=seed, start=start))
        made.append(attack(source, x[start : start + 4], y[start : start + 4], generator=generator))
    return torch.cat(made)


def behind(defence: Defence, spec: str, name: str, x: Tensor, draws: int, seed: int = 0) -> list[float]:
    """The share of draws in which each image is misclassified."""
    shares = []
    for start in range(0, 10, 4):
        part, y = x[start : start + 4], chosen()[1][start : start + 4]
        at = seed_of(defence=spec, seed=seed, start=start)
        shares += error_rate(defence, MODELS[name], part, y, draws=draws, seed=at, batch_size=4).tolist()
    return shares


def wrong(name: str, examples: Tensor) -> list[float]:
    return (classes(examples, name) != chosen()[1]).double().tolist()


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


# --- what a run finds, by hand


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
def test_rates_by_hand(label: str, attack: Attack, seed: int, data: Path) -> None:
    (outcome,) = ran(data, attacks=label, seeds=seed)
    assert (outcome.source, outcome.attack, outcome.eps, outcome.steps, outcome.seed) == ("a", label, EPS, 3, seed)
    assert list(outcome.fooled) == ["a", "b", "c"]
    examples = by_hand(attack, MODELS["a"], seed)
    for name, shares in outcome.fooled.items():
        assert shares.tolist() == wrong(name, examples)
        assert outcome.rate(name) == sum(wrong(name, examples)) / 10
    assert 1 >= outcome.rate("a") > outcome.rate("b") > 0


def test_an_ensemble_as_the_source(data: Path) -> None:
    alone, outcome = ran(data, sources=["a", "a+b"], targets=["c", "b"])
    examples = by_hand(MIFGSM(eps=EPS, steps=3), lambda x: (MODELS["a"](x) + MODELS["b"](x)) / 2)
    assert outcome.source == "a+b"
    assert list(outcome.fooled) == ["c", "b"]
    for name in ("c", "b"):
        assert outcome.fooled[name].tolist() == wrong(name, examples)
    assert outcome.rate("b") > alone.rate("b")


def test_a_run_knows_the_ensembles_that_examples_are_made_on(data: Path) -> None:
    run = evaluate(
        {"models": [f"test_transfer:{name}" for name in "ab"], "sources": "test_transfer:a+test_transfer:b",
         "data": str(data), "eps": EPS, "attacks": "fgsm"}
    ).run  # fmt: skip
    assert [entry["name"] for entry in run.facts["models"]] == [
        "test_transfer:a", "test_transfer:b", "test_transfer:a+test_transfer:b",
    ]  # fmt: skip
    table = run.table()
    assert set(table.model) == set(table.target) == {"test_transfer:a+test_transfer:b"}
    x = images()
    assert table.clean_label.tolist() == classes(x, "a+b").tolist()
    assert table.adversarial_label[table.label == table.clean_label].ne(table.label).any()


def test_defences_see_the_same_examples(data: Path) -> None:
    """Those that draw give shares in multiples of 1 / draws, those that do not 0 or 1."""
    noise, codec = "smoothing:sigma=0.4,votes=1", "jpeg:quality=20"
    words: dict[str, Any] = {"targets": "b", "defences": [noise, codec], "draws": 4}
    clean, outcome = ran(data, **words)
    assert list(outcome.fooled) == ["b", f"b | {noise}", f"b | {codec}"]
    examples = by_hand(MIFGSM(eps=EPS, steps=3), MODELS["a"])
    for spec, defence in ((noise, Smoothing(sigma=0.4, votes=1)), (codec, JPEG(quality=20))):
        assert outcome.fooled[f"b | {spec}"].tolist() == pytest.approx(behind(defence, spec, "b", examples, 4))
        assert clean.fooled[f"b | {spec}"].tolist() == pytest.approx(behind(defence, spec, "b", chosen()[0], 4))
    shares = 4 * outcome.fooled[f"b | {noise}"]
    assert np.array_equal(shares, shares.round())
    assert ((shares > 0) & (shares < 4)).any()
    assert set(outcome.fooled[f"b | {codec}"].tolist()) <= {0.0, 1.0}
    assert (clean.source, clean.attack, clean.rate("b")) == ("a", CLEAN, 0)
    assert clean.rate(f"b | {noise}") > 0
    _, other = ran(data, **words, seeds=1)
    assert np.array_equal(other.fooled["b"], outcome.fooled["b"])
    assert not np.array_equal(other.fooled[f"b | {noise}"], outcome.fooled[f"b | {noise}"])
    _, smaller = ran(data, **words, batch_size=3)
    assert np.array_equal(smaller.fooled[f"b | {noise}"], outcome.fooled[f"b | {noise}"])


def test_parameters_of_a_defence_decide_the_cell(tmp_path: Path, data: Path) -> None:
    for i, rate in enumerate((1.3, 1.6), 1):
        found = ran(data, tmp_path, defences=f"resize-pad:rate={rate}")
        assert len([*(tmp_path / "cells").iterdir()]) == 3 * i
        examples = by_hand(MIFGSM(eps=EPS, steps=3), MODELS["a"])
        spec = f"resize-pad:rate={rate}"
        expected = behind(ResizePad(rate=rate), spec, "c", examples, 5)
        assert found[1].fooled[f"c | {spec}"].tolist() == pytest.approx(expected)


def test_steps_are_an_axis(tmp_path: Path, data: Path) -> None:
    """An attack that does not iterate is computed once and shown at every number; one with its own steps keeps them."""
    found = ran(data, tmp_path, attacks=["mi-fgsm", "fgsm", "pgd:steps=3"], steps=[2, 5])
    assert [(one.attack, one.steps) for one in found] == [
        ("mi-fgsm", 2), ("mi-fgsm", 5), ("fgsm", 2), ("fgsm", 5), ("pgd:steps=3", 3),
    ]  # fmt: skip
    assert len([*(tmp_path / "cells").iterdir()]) == 4 * 3
    run = read(tmp_path)
    names = ["mi-fgsm:steps=2", "mi-fgsm:steps=5", "fgsm", "pgd:steps=3"]
    assert [entry["name"] for entry in run.facts["attacks"]] == names
    for one in found[:2]:
        assert one.fooled["b"].tolist() == wrong("b", by_hand(MIFGSM(eps=EPS, steps=one.steps), MODELS["a"]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    ran(data, tmp_path, attacks="mi-fgsm:steps=5", steps=[])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before, "one attack, one name"


def test_images_that_all_models_know(tmp_path: Path, data: Path) -> None:
    x = images()
    y = classes(x, "a")
    places = right(x, y).nonzero()[:, 0]
    assert 0 < len(places) < len(x)
    for skip, count, batch in ((0, None, 3), (2, 5, 100), (len(places) - 1, 9, 7)):
        words: dict[str, Any] = {"skip": skip, "count": count, "batch_size": batch, "shard": 4}
        ran(data, tmp_path / f"{skip}", **words)
        run = read(tmp_path / f"{skip}")
        expected = places[skip:][:count]
        assert run.facts["data"]["count"] == len(expected)
        assert torch.equal(run.examples(0, len(expected)), x[expected])
        assert (run.table()["label"] == run.table()["clean_label"]).all()
    with pytest.raises(ValueError, match="no image after the first 120 is classified correctly by all models"):
        ran(data, skip=120)


def test_images_that_no_attack_was_chosen_on(tmp_path: Path, data: Path) -> None:
    (whole,) = ran(data, tmp_path)
    (rest,) = transfer_outcomes.outcomes(read(tmp_path), after=6)
    assert rest.places.tolist() == [6, 7, 8, 9]
    assert {name: own.tolist() for name, own in rest.fooled.items()} == {
        name: own[6:].tolist() for name, own in whole.fooled.items()
    }
    assert transfer_report.images([rest]) == "4 images after the first 6 that all models classify correctly"
    assert transfer_report.images([whole]) == "10 images that all models classify correctly"


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"attacks": ["mi-fgsm", "pgd"], "sources": ["a", "b+c"], "defences": "jpeg"}
    words["diagnose"] = False
    whole = ran(data, **words)
    made: list[str] = []
    table = Worker.table

    def counted(self: Worker, cell: Cell) -> Any:
        made.append(cell.key)
        if len(made) == 5:
            raise KeyboardInterrupt
        return table(self, cell)

    monkeypatch.setattr(Worker, "table", counted)
    with pytest.raises(KeyboardInterrupt):
        ran(data, tmp_path, **words)
    again = ran(data, tmp_path, **words)
    assert len(made) == len(set(made)) + 1 == 2 * 2 * 3 + 1
    for one, other in zip(again, whole, strict=True):
        assert all(np.array_equal(one.fooled[name], other.fooled[name]) for name in other.fooled)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": "d"}, "sources name 'd', which is no model of the run; it has a, b, c"),
        ({"sources": "a+d"}, "sources name 'd', which is no model"),
        ({"targets": ["a", "d"]}, "targets name 'd', which is no model"),
        ({"defences": "blur"}, "unknown defence 'blur'; there are jpeg"),
        ({"steps": 0}, "steps.0: Input should be greater than or equal to 1"),
        ({"steps": 3, "budget": 4}, "steps and budget both say how long attacks run; give one of them"),
        ({"eps": []}, "'mi-fgsm:steps=3' stays within a radius, and the run has none; add eps, as 8/255"),
    ],
)
def test_axes_that_do_not_fit(given: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ran(data, **given)


# --- tables and pictures


USUAL: dict[str, Any] = {"source": "a", "attack": "pgd", "eps": 0.1, "steps": 1, "gradients": 12.5}


def outcome(_facts: dict[str, Any], **fooled: Sequence[float]) -> Outcome:
    names = {name.replace("__", " | "): np.array(shares, float) for name, shares in fooled.items()}
    return Outcome(**{**USUAL, **_facts}, fooled=names)


def outcomes() -> list[Outcome]:
    """Two attacks on a at two T, one on both models, and the images as they are."""
    clean = {"attack": CLEAN, "eps": 0.0, "steps": 0}
    made = [outcome(clean, a=[0, 0, 0, 0], b=[0.0] * 4, c=[0.0] * 4, b__jpeg=[0, 0, 0, 1.0])]
    for steps, extra in ((2, 0.0), (5, 1.0)):
        for label in ("mi-fgsm", "pgd"):
            b, c = [1.0, 0, 0, extra], [1.0, 0, 1, float(label == "pgd")]
            made.append(outcome({"attack": label, "steps": steps}, a=[1.0, 1, 1, 1], b=b, c=c, b__jpeg=[0.5, 0, 0, 0]))
    last = {"source": "a+b", "eps": 16 / 255, "steps": 5}
    return [*made, outcome(last, a=[1.0, 1, 1, 0], b=[1.0, 1, 1, 1], c=[0.0, 0, 0, 1], b__jpeg=[0.25, 0, 0, 0])]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(line: str) -> list[str]:
    return [value.strip() for value in re.split(r"(?<!\\)\|", line)[1:-1]]


def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on, in place of the saving."""
    saved: list[Figure] = []
    monkeypatch.setattr(transfer_figures, "_save", lambda figure, path: saved.append(figure) or path)
    return saved


def test_the_average_is_black_box() -> None:
    clean, *_, pgd, both = outcomes()
    assert transfer_outcomes.average(pgd) == pytest.approx((0.5 + 0.75) / 2)
    assert transfer_outcomes.average(both) == 0.25
    assert transfer_outcomes.average(outcome({"source": "a+b"}, a=[1.0], b=[1.0], b__jpeg=[0.0])) is None
    assert transfer_outcomes.average(outcome({"source": "sgm(gamma=0.5):a+b"}, a=[1.0], b=[1.0], c=[0.5])) == 0.5
    assert transfer_outcomes.average(clean) == 0


def test_the_table_shows_the_last_budget() -> None:
    header, lines = transfer_report.table(outcomes(), 5)
    assert header == ["source", "attack", "eps", "gradients", "a", "b", "c", "b | jpeg", "black-box mean"]
    assert [line[:4] for line in lines] == [
        ["", "clean", "", ""],
        ["a", "mi-fgsm", "0.1", "12.5"],
        ["a", "pgd", "0.1", "12.5"],
        ["a+b", "pgd", "16/255", "12.5"],
    ]
    assert [line[-1] for line in lines] == ["", "50.0", "62.5", "25.0"]
    assert lines[2][6] == "75.0"
    assert lines[1][7] == "12.5"
    assert [line[5] for line in transfer_report.table(outcomes(), 2)[1]] == ["0.0", "25.0", "25.0", "100.0"]


def test_the_long_table_has_intervals() -> None:
    header, lines = transfer_report.long_table(outcomes(), 5)
    assert header == ["source", "attack", "eps", "target", "gradients", "success", "95 %"]
    assert len(lines) == 4 * 4
    low, high = wilson(0.75, 4)
    assert ["a", "pgd", "0.1", "c", "12.5", "75.0", f"{100 * low:.1f} – {100 * high:.1f}"] in lines
    assert f"{100 * low:.1f} – {100 * high:.1f}" == "30.1 – 95.4"


def test_the_files(tmp_path: Path) -> None:
    made = outcomes()
    paths = transfer_report.write_outcomes(made, tmp_path / "new", facts={"data": "a<b|c", "images": 4})
    names = ["transfer.md", "transfer.csv", "transfer.html", "transfer.png", "frontier.png", "steps.png"]
    assert [path.name for path in paths] == names
    assert {path.name for path in (tmp_path / "new").iterdir()} == {*names, "figures"}
    page = paths[2].read_text()
    assert page.count("<h2") == 5
    drawn = [f"frontier-{i}-{j}" for i in (1, 2) for j in range(3)] + ["steps-1", "steps-2"]
    written = {path.stem for path in (tmp_path / "new" / "figures").iterdir()}
    assert {"frontier-1-0", "frontier-2-0", "steps-1", "steps-2"} <= written <= set(drawn)
    assert all(f'id="{name}-narrow-' in page for name in written)
    for path in paths[3:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    protocol, title, table, long, intervals, *pairs = paths[0].read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert protocol == "data a&lt;b\\|c, images 4"
    assert title.startswith("Success in percent among 4 images that all models classify correctly, T = 5 where")
    assert (long, pairs[0]) == (transfer_report.LONG, transfer_report.PAIRED)
    for text, make in ((table, transfer_report.table), (intervals, transfer_report.long_table)):
        header, dashes, *lines = (columns(line) for line in text.split("\n"))
        expected, body = make(made, 5)
        assert [value.replace("\\|", "|") for value in header] == expected
        words = 2 if make is transfer_report.table else 4
        assert dashes == ["---"] * words + ["---:"] * (len(header) - words)
        assert [[value.replace("\\|", "|") for value in line] for line in lines] == body
    found = rows(paths[1])
    assert len(found) == 6 * 4
    for row, (one, name) in zip(found, [(each, name) for each in made for name in each.fooled], strict=True):
        rate = one.rate(name)
        assert (row["source"], row["attack"], row["target"], row["images"]) == (one.source, one.attack, name, "4")
        assert float(row["eps"]) == pytest.approx(one.eps, rel=1e-5)
        assert (int(row["steps"]), int(row["seed"])) == (one.steps, one.seed)
        limits = (float(row["success"]), float(row["low"]), float(row["high"]))
        assert limits == pytest.approx((rate, *wilson(rate, 4)), abs=1e-6)
    single = transfer_report.write_outcomes(made[:3], tmp_path / "single", facts={})
    assert [path.name for path in single] == [
        "transfer.md",
        "transfer.csv",
        "transfer.html",
        "transfer.png",
        "frontier.png",
    ]


def test_names_cannot_break_the_table(tmp_path: Path) -> None:
    words = {**USUAL, "source": "x|y", "attack": "pgd:a\\|<b>"}
    odd = Outcome(**words, fooled={"<script>": np.ones(2), "p|q": np.zeros(2)})
    markdown, data, page, _ = transfer_report.write_outcomes([odd], tmp_path, facts={})
    assert "<script>" not in page.read_text().split("</main>")[0].split("<main>")[1]
    header, dashes, line, *_ = markdown.read_text().split("\n\n")[1].split("\n")
    assert columns(header) == ["source", "attack", "eps", "gradients", "&lt;script>", "p\\|q", "black-box mean"]
    assert len(columns(dashes)) == 7
    assert line.startswith("| x\\|y | pgd:a\\\\\\|&lt;b> | 0.1 | 12.5 | 100.0 |")
    assert "<" not in markdown.read_text()
    assert [(row["attack"], row["target"]) for row in rows(data)] == [(odd.attack, "<script>"), (odd.attack, "p|q")]


def test_the_heat_map_shows_every_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = figures(monkeypatch)
    transfer_figures.heat_map(outcomes(), 5, tmp_path / "x.png")
    axes = saved[0].axes[0]
    rates = [[0, 0, 0, 25], [100, 50, 50, 12.5], [100, 50, 75, 12.5], [75, 100, 25, 6.25]]
    assert np.asarray(axes.images[0].get_array()).tolist() == rates
    assert [text.get_text() for text in axes.texts] == [f"{rate:.1f}" for line in rates for rate in line]
    assert [text.get_position() for text in axes.texts[:5]] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "b\njpeg"]
    names = ["clean", "a: mi-fgsm, ε = 0.1", "a: pgd, ε = 0.1", "a+b: pgd, ε = 16/255"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    transfer_figures.heat_map(outcomes()[:3], 2, tmp_path / "x.png")
    assert [label.get_text() for label in saved[1].axes[0].get_yticklabels()][1] == "mi-fgsm, ε = 0.1"


def test_the_curves_follow_the_black_box_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = figures(monkeypatch)
    attacked = outcomes()[:0:-1]
    transfer_figures.step_curves(attacked, tmp_path / "x.png")
    found = [
        {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines} for axes in saved[0].axes
    ]
    assert found == [
        {"a+b: pgd": [[5, 25]]},
        {"a: pgd": [[2, 50], [5, 62.5]], "a: mi-fgsm": [[2, 37.5], [5, 50]]},
    ]
    assert [axes.get_title() for axes in saved[0].axes] == ["ε = 16/255", "ε = 0.1"]
    own = outcome({"source": "a+b", "steps": 5}, a=[1.0, 1], b=[0.0, 1], b__jpeg=[0.0, 0])
    transfer_figures.step_curves([own], tmp_path / "x.png")
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


def test_the_transfer_command(zoo: Path) -> None:
    first, second = "zoo_of_two:first", "zoo_of_two:second"
    words = ["transfer", "--source", first, "--source", f"{first}+{second}", "--target", second, "--target", first]
    words += ["--data", str(zoo / "mine.npz"), "--count", "9", "--skip", "2", "--batch-size", "4"]
    words += ["--attack", "pgd", "--attack", "mi-fgsm:decay=0.5", "--steps", "4", "--steps", "2", "--eps", "20/255"]
    words += ["--defence", "jpeg:quality=30", "--defence", "smoothing:sigma=0.3,votes=1", "--draws", "2", "--seed", "3"]
    words += ["--threads", "1", "--out", str(zoo / "out")]
    done = called(*words)
    assert done.exit_code == 0, done.output
    assert "success, %, of 9 images" in done.output
    assert f"{first}+{second}" in done.output
    names = ["transfer.md", "transfer.csv", "transfer.html", "transfer.png", "frontier.png", "steps.png"]
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
    targets = [
        name + tail for name in (second, first) for tail in ("", " | jpeg:quality=30", " | smoothing:sigma=0.3,votes=1")
    ]
    assert [row["target"] for row in table] == targets * 9
    cells = {path: path.stat().st_mtime_ns for path in (zoo / "out" / "cells").iterdir()}
    assert len(cells) == 8

    networks = {first: network(1), second: network(2)}
    x, y = (torch.from_numpy(np.load(zoo / "mine.npz")[name]) for name in "xy")
    with torch.no_grad():
        known = torch.stack([model(x).argmax(1) == y for model in networks.values()]).all(0)
    assert 11 < int(known.sum()) < len(x)
    x, y = x[known][2:11], y[known][2:11]
    for attack in (PGD(eps=20 / 255, steps=4), MIFGSM(eps=20 / 255, steps=4, decay=0.5)):
        label = "pgd" if isinstance(attack, PGD) else "mi-fgsm:decay=0.5"
        for source in (first, f"{first}+{second}"):
            generator = torch.Generator().manual_seed(seed_of(seed=3, start=0))
            members = Ensemble([networks[name] for name in source.split("+")])
            examples = attack(members, x, y, generator=generator)
            fooled = float((networks[second](examples).argmax(1) != y).double().mean())
            (row,) = (
                row
                for row in table
                if (row["source"], row["attack"], row["steps"], row["target"]) == (source, label, "4", second)
            )
            assert float(row["success"]) == pytest.approx(fooled, abs=1e-6)
            assert row["images"] == "9"
    text = (zoo / "out" / "transfer.md").read_text()
    assert text.startswith("data mine, images 9, seed 3, draws of random defences 2\n\nSuccess in percent")
    assert "T = 4 where an attack does not say otherwise" in text

    again = called(*words)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    assert (zoo / "out" / "transfer.md").read_text() == text
    assert rows(zoo / "out" / "transfer.csv") == table
    more = called(*words, "--steps", "6")
    assert more.exit_code == 0, more.output
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    assert len([*(zoo / "out" / "cells").iterdir()]) == 12


def test_targets_are_the_sources_by_default(zoo: Path) -> None:
    words = ["--source", "zoo_of_two:second+zoo_of_two:first", "--attack", "fgsm", "--data", str(zoo / "mine.npz")]
    done = called("transfer", *words, "--out", str(zoo / "out"))
    assert done.exit_code == 0, done.output
    table = rows(zoo / "out" / "transfer.csv")
    assert [row["target"] for row in table] == ["zoo_of_two:second", "zoo_of_two:first"]
    assert {(row["attack"], row["steps"]) for row in table} == {("fgsm", "10")}
    assert float(table[0]["eps"]) == pytest.approx(16 / 255)
    assert sorted(path.name for path in (zoo / "out").iterdir()) == [
        "cells",
        "data",
        "models",
        "run.json",
        "transfer.csv",
        "transfer.html",
        "transfer.md",
        "transfer.png",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "mi-fgms"], "unknown attack 'mi-fgms'; did you mean mi-fgsm"),
        (["--attack", "ddn"], "'ddn' has no radius to stay in, and transfer is measured at a given eps; name another"),
        (["--attack", "pgd:m=3"], "pgd has no parameter 'm'; it has alpha"),
        (["--attack", "pgd+up"], "'pgd+up': unknown update rule 'up'; `firstorder attacks` lists all"),
        (["--attack", "mi-fgsm:decay=-1"], "decay=-1 must be a finite number at least 0"),
        (["--defence", "blur"], "unknown defence 'blur'; there are jpeg"),
        (["--eps", "8/0"], "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is '8/0')"),
        (["--eps", "big"], "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is 'big')"),
        (["--eps", "-1"], "eps.0: write a finite number above 0, as 0.3 or 8/255 (it is '-1')"),
        (["--source", "resnet"], "unknown model 'resnet'; name one of mnist-cnn"),
        (["--target", "zoo_of_two:third"], "has no attribute 'third'"),
        (["--count", "9", "--after", "9"], "after=9 leaves none of the run's 9 images; lower it, or raise count"),
        (["--data", "imagenet"], "unknown data 'imagenet'; name mnist or cifar10"),
        (["--data", "wrong.npz"], "no image is classified correctly by all models; choose others"),
        (["--target", "zoo_of_two:stranger", "--skip", "39"], "no image after the first 39 is classified correctly by"),
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
