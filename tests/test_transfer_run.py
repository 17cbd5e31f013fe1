"""What a transfer run knows beside success: 8 bits, all images, goals, seeds, prices, pairs, saved pictures."""

from __future__ import annotations

import csv
import importlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from firstorder.evaluation import evaluate
from firstorder.evaluation.names import data as sets
from firstorder.evaluation.reporting import (
    drawing,
    frontier,
    intervals,
    paired,
    pictures,
    transfer_outcomes,
    transfer_report,
)
from firstorder.evaluation.runs import ball
from firstorder.evaluation.runs.store import Run, read
from test_transfer import EPS, MODELS, NAMES, called, classes, data, images, outcome, right

__all__ = ["data"]

LITTLE = 2.5 / 255
"""Not a whole number of levels."""


def ran(data: Path, out: Path | None = None, **given: Any) -> Run:
    usual = {
        "models": [{"model": f"test_transfer:{name}", "name": name} for name in NAMES],
        "sources": "a", "targets": ["b", "c"], "data": str(data), "count": 20, "eps": EPS,
        "attacks": "mi-fgsm", "steps": 3, "shard": 8, "prepare": False, "pictures": 0,
    }  # fmt: skip
    return evaluate({**usual, **given}, out, only=True).run


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 8 bits, labelled by the first model."""
    path = tmp_path_factory.mktemp("bits") / "mine.npz"
    x = (255 * images()).round().to(torch.uint8)
    np.savez(path, x=x.permute(0, 2, 3, 1).numpy(), y=classes(x / 255, "a").numpy())
    return path


# --- 8 bits


def rounded_by_hand(a: float, x: float, eps: float) -> int:
    """The level nearest to a among those within eps of the level x, going towards x where the nearest is not."""
    level = round(255 * a)
    while abs(level - round(255 * x)) / 255 > eps + 1e-6:
        level += 1 if level < 255 * x else -1
    return level


def test_eight_bits_inside_the_ball() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 1, 4, 5), generator=generator) / 255
    a = (x + LITTLE * torch.rand(x.shape, generator=generator).mul(4).sub(2).clamp(-1, 1)).clamp(0, 1)
    found = ball.eight_bit(a, x, LITTLE, "Linf")
    pairs = zip(a.flatten().tolist(), x.flatten().tolist(), strict=True)
    assert (255 * found).flatten().tolist() == pytest.approx(
        [rounded_by_hand(p, q, LITTLE) for p, q in pairs], abs=1e-4
    )
    assert ball.inside(found, x, LITTLE, "Linf").all()
    assert not ball.inside((255 * a).round() / 255, x, LITTLE, "Linf").all(), "rounding alone leaves the ball"
    assert ((found - a).abs() * 255 < 1 + 1e-3).all()


def test_eight_bits_in_l2_go_towards_the_example_as_a_whole() -> None:
    x = torch.full((2, 1, 2, 2), 100 / 255)
    a = x + torch.tensor([0.6, 0.4])[:, None, None, None] / 255  # rounded up, and down to x itself
    eps = 1.25 / 255
    found = (255 * ball.eight_bit(a, x, eps, "L2")).round()
    assert found.flatten(1).tolist() == [[100] * 4, [100] * 4]
    wide = (255 * ball.eight_bit(a, x, 2.0 / 255, "L2")).round()
    assert wide.flatten(1).tolist() == [[101] * 4, [100] * 4]
    assert (255 * ball.eight_bit(a, x, None, "L2")).round().equal(wide)


def test_a_ball_without_a_picture_of_eight_bits() -> None:
    x = torch.full((1, 1, 1, 1), 100.5 / 255)
    assert not ball.inside(ball.eight_bit(x + 0.2 / 255, x, 0.3 / 255, "Linf"), x, 0.3 / 255, "Linf")


def test_the_target_classifies_the_rounded_picture(bits: Path) -> None:
    run = ran(bits, eps=LITTLE, attacks="mi-fgsm:steps=2", pictures=20, defences="jpeg")
    table = run.table()
    assert table[table["defence"].notna()][["rounded_label", "rounded_success"]].isna().all(axis=None)
    bare = table[table["defence"].isna()]
    x, own = run.examples(0, 20), bare[bare["target"] == "a"]
    made = torch.stack([torch.frombuffer(bytearray(one), dtype=torch.float32).view(3, 8, 8) for one in own.adversarial])
    pictured = ball.eight_bit(made, x, LITTLE, "Linf")
    for name in NAMES:
        rows = bare[bare["target"] == name]
        assert rows["rounded_label"].tolist() == classes(pictured, name).tolist()
        assert rows["rounded_success"].tolist() == (rows["rounded_label"] != rows["label"]).tolist()
    assert (bare["rounded_label"] != bare["adversarial_label"]).any(), "it is not what the floats are taken for"


def test_only_runs_with_targets_round(bits: Path) -> None:
    table = ran(bits, targets=[]).table()
    assert table[["rounded_label", "rounded_success"]].isna().all(axis=None)


# --- goals


@pytest.mark.parametrize("goal", ["random", "least-likely"])
def test_targeted_goals(goal: str, data: Path) -> None:
    run = ran(data, targeted=goal, attacks='mi-fgsm:loss="logit"', steps=10, eps=0.06)
    table = run.table()
    assert (table["wanted"] != table["label"]).all()
    x = run.examples(0, 20)
    with torch.no_grad():
        logits = MODELS["a"](x)
    labels = torch.tensor(table[table["target"] == "a"]["label"].to_numpy())
    least = logits.scatter(1, labels[:, None], torch.inf).argmin(1)
    first = table[table["target"] == "b"]
    assert (first["wanted"].tolist() == least.tolist()) == (goal == "least-likely")
    assert first["wanted"].nunique() > 1
    for found in transfer_outcomes.outcomes(run):
        for name in ("b", "c"):
            rows = table[table["target"] == name]
            assert found.fooled[name].tolist() == (rows["adversarial_label"] == rows["wanted"]).tolist()
            assert found.wrong[name].tolist() == (rows["adversarial_label"] != rows["label"]).tolist()
            assert found.wrong[name].sum() >= found.fooled[name].sum() > 0
    assert sum(found.wrong[name].sum() - found.fooled[name].sum() for name in ("b", "c")) > 0
    header, (line,) = transfer_report.table([found], 20)
    assert found.targeted
    shown = dict(zip(header, line, strict=True))
    assert shown["any wrong class"] == f"{50 * (_known(found, found.wrong['b']) + _known(found, found.wrong['c'])):.1f}"
    if goal == "random":
        other = ran(data, targeted=goal, seeds=1, attacks="fgsm").table()
        assert other["wanted"].tolist() != table["wanted"].tolist()


def _known(found: transfer_outcomes.Outcome, values: Any) -> float:
    return float(values[found.right].mean())


def test_a_class_is_a_goal_of_the_images_of_others(data: Path) -> None:
    table = ran(data, targeted=0).table()
    assert (table["wanted"] == 0).all()
    assert (table["label"] != 0).all()
    y = classes(images(), "a")
    assert (y == 0).any()
    assert table[table["target"] == "a"]["label"].tolist() == y[y != 0][:20].tolist()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("nearest", "targeted: write random, least-likely, the number of a class, or no"),
        ("-1", "write random, least-likely, the number of a class, or no"),
        (4, "targeted=4 is no class of the models; they have 0 to 3"),
    ],
)
def test_goals_that_are_none(goal: Any, message: str, data: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ran(data, targeted=goal)


def test_true_is_random_and_false_untargeted(data: Path) -> None:
    goals = [
        ran(data, targeted=goal, attacks="fgsm").facts["specification"]["targeted"] for goal in (True, False, "no")
    ]
    assert goals == ["random", "", ""]


# --- all images, and those that all models know


def test_all_images_beside_those_that_all_models_know(data: Path) -> None:
    run = ran(data, select="all")
    (found,) = transfer_outcomes.outcomes(run)
    x = images()[:20]
    known = right(x, classes(x, "a"))
    assert found.right.tolist() == known.tolist()
    assert 0 < known.sum() < 20
    header, (line,) = transfer_report.table([found], 3)
    shown = dict(zip(header, line, strict=True))
    for name in ("b", "c"):
        assert shown[name] == f"{100 * found.fooled[name][known.numpy()].mean():.1f}"
    assert shown["all 20 images"] == f"{50 * (found.fooled['b'].mean() + found.fooled['c'].mean()):.1f}"
    assert transfer_report.images([found]) == f"the {int(known.sum())} of 20 images that all models classify correctly"
    assert "all 20 images" in transfer_report.long_table([found], 3)[0]


# --- seeds, prices, pairs


def seeds() -> list[transfer_outcomes.Outcome]:
    """Two attacks with two seeds each on four images; the first is cheaper."""
    rates = {"pgd": ([1, 1, 0, 0], [1, 1, 1, 0]), "sia:m=3": ([1, 1, 1, 1], [1, 1, 1, 0])}
    made = []
    for price, (label, own) in zip((10, 30), rates.items(), strict=True):
        for seed, hits in enumerate(own):
            facts = {"attack": label, "seed": seed, "gradients": price, "steps": 10}
            made.append(outcome(facts, b=hits, c=[0.0, 0, 0, seed]))
    return made


def test_seeds_are_one_line_with_a_spread() -> None:
    header, lines = transfer_report.table(seeds(), 10)
    assert len(lines) == 2
    shown = dict(zip(header, lines[0], strict=True))
    assert shown["b"] == f"62.5 ± {statistics.stdev([50, 75]):.1f}" == "62.5 ± 17.7"
    assert shown["black-box mean"] == f"{(25 + 50) / 2:.1f} ± {statistics.stdev([25, 50]):.1f}"
    header, lines = transfer_report.long_table(seeds(), 10)
    shown = dict(zip(header, lines[0], strict=True))
    assert (shown["success"], shown["seeds"], shown["gradients"]) == ("62.5", "50.0 – 75.0", "10")


def test_the_paired_test_against_scipy() -> None:
    stats = importlib.import_module("scipy.stats")
    for better in range(12):
        for worse in range(12):
            expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
            assert intervals.mcnemar(better, worse) == pytest.approx(expected, abs=1e-12)
    found = paired.pair(np.array([1, 1, 0, 0.5, 1]), np.array([0, 1, 1, 0, 0.0]))
    assert found == (3, 1, intervals.mcnemar(3, 1))


def test_pairs_follow_the_ranking_or_one_attack() -> None:
    made = [*seeds(), outcome({"attack": "weak", "steps": 10}, b=[0.0] * 4, c=[0.0] * 4)]
    header, lines = transfer_report.paired_table(made, 10)
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(one["attack"], one["compared with"]) for one in shown] == [("sia:m=3", "pgd"), ("pgd", "weak")]
    assert (shown[0]["better"], shown[0]["worse"], shown[0]["gradients"]) == ("2", "0", "30 : 10")
    assert shown[0]["p"] == "0.5"
    header, lines = transfer_report.paired_table(made, 10, "weak")
    assert [(line[1], line[3], line[4]) for line in lines] == [
        (name, "weak", target) for name in ("sia:m=3", "pgd") for target in ("mean", "b", "c")
    ]
    assert [line[7] for line in lines] == ["4", "4", "1", "4", "3", "1"]


def test_images_are_paired_by_their_places() -> None:
    """Attacks that a failed cell left without some of the images are compared on the others."""
    whole, part = outcome({"attack": "pgd"}, b=[1.0, 0, 1, 1]), outcome({"attack": "fgsm"}, b=[0.0, 0])
    part = transfer_outcomes.Outcome(**{**vars(part), "examples": np.array([2, 3])})
    (line,) = transfer_report.paired_table([whole, part], 1)[1]
    assert line[-3:-1] == ["2", "0"]


def test_the_frontier_is_the_best_at_each_price() -> None:
    points = [frontier.Point(name, price, rate, rate, rate) for name, price, rate in [
        ("dear", 30, 50.0), ("cheap", 10, 40.0), ("weak", 10, 30.0), ("best", 30, 70.0), ("late", 60, 70.0),
    ]]  # fmt: skip
    assert [one.attack for one in frontier.frontier(points)] == ["cheap", "best"]


def test_the_picture_of_success_against_gradients() -> None:
    chart = frontier.frontier_chart(seeds())
    assert [axes.get_title() for axes in chart.axes] == ["b, ε = 0.1", "c, ε = 0.1", "mean of the targets, ε = 0.1"]
    (steps,) = (line for line in chart.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert np.asarray(steps.get_xydata()).tolist() == [[10, 62.5], [30, 87.5], [30, 87.5]]
    assert [text.get_text() for text in chart.axes[0].texts] == ["pgd", "sia:m=3"]
    assert [text.get_text() for text in chart.legends[0].texts] == ["pgd", "sia", frontier.BEST]
    assert [label.get_text() for label in chart.axes[0].get_xticklabels()] == ["10", "30"]


def test_a_page_has_the_picture_of_every_target() -> None:
    views = frontier.frontier_views(seeds())
    assert [view.title.split(": ")[1] for view in views] == [
        f"{name}, ε = 0.1" for name in ("mean of the targets", "b", "c")
    ]
    with drawing.style():
        for width in (drawing.WIDTH, drawing.NARROW):
            chart = views[1].draw(width)
            assert chart.get_figwidth() == width
            (steps,) = (line for line in chart.axes[0].lines if line.get_drawstyle() == "steps-post")
            assert np.asarray(steps.get_xydata()).tolist() == [[10, 62.5], [30, 87.5], [30, 87.5]]
            assert min(float(text.get_fontsize()) for text in chart.findobj(Text)) >= 8
            assert [text.get_text() for text in chart.legends[0].texts] == ["pgd", "sia", frontier.BEST]
    assert frontier.frontier_views(seeds()[:1]) == []


def test_chance_is_not_magnified() -> None:
    """Two attacks that differ in one image of a thousand, at both ends of the axis."""
    for rate in (0.001, 0.999):
        shares = np.arange(1000) < 1000 * rate
        made = [
            outcome({"attack": name, "gradients": price}, b=(shares & (np.arange(1000) >= start)).astype(float))
            for name, price, start in (("pgd", 10.0, 1), ("sia", 30.0, 0))
        ]  # fmt: skip
        (view,) = frontier.frontier_views(made)
        with drawing.style():
            (axes,) = view.draw(drawing.WIDTH).axes
        low, high = axes.get_ylim()
        assert high - low >= frontier.LEAST
        assert low <= 100 * rate <= high
        assert -2 <= low <= 82


def test_prices_are_numbered_where_there_is_room() -> None:
    assert frontier._apart([10, 30]) == [10, 30]
    assert frontier._apart([10]) == [10]
    assert frontier._apart([1, 2, 4, 8, 16, 32, 64, 128]) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert frontier._apart([10, 10.5, 11, 20, 39, 40]) == [10, 20, 40]


def test_gradients_are_those_of_attacked_images(data: Path) -> None:
    found = transfer_outcomes.outcomes(ran(data, attacks=["mi-fgsm", "si-ni-fgsm:m=3", "sia:m=2,steps=5"]))
    assert [one.gradients for one in found] == [3, 9, 10]


# --- saved pictures


def test_saved_pictures_are_what_the_targets_saw(bits: Path, tmp_path: Path) -> None:
    run = ran(bits, eps=LITTLE, attacks=["mi-fgsm", "mi-fgsm:steps=2"], seeds=[0, 1], pictures=20)
    listing, *folders = pictures.save(run, tmp_path / "new" / "saved")
    with listing.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["folder"] for row in listed] == [folder.name for folder in folders]
    assert {(row["attack"], row["seed"], row["images"]) for row in listed} == {
        (f"mi-fgsm:steps={steps}", seed, "20") for steps in (2, 3) for seed in "01"
    }
    table = run.table()
    for row in listed:
        folder = listing.parent / row["folder"]
        assert len(list(folder.iterdir())) == 21
        ((x, y),) = sets.stream(str(folder), size=100).parts
        assert x.dtype == torch.uint8
        own = table[(table["attack"] == row["attack"]) & (table["seed"] == int(row["seed"]))]
        assert y.tolist() == own[own["target"] == "a"]["label"].tolist()
        for name in NAMES:
            assert classes(x / 255, name).tolist() == own[own["target"] == name]["rounded_label"].tolist()
        assert ((x / 255 - run.examples(0, 20)).abs() <= LITTLE + 1e-6).all()
        with Image.open(folder / "000003.png") as picture:
            assert picture.size == (8, 8)
    again = {path: path.read_bytes() for path in listing.parent.rglob("*.png")}
    assert len(again) == 4 * 20
    pictures.save(run, listing.parent)
    assert {path: path.read_bytes() for path in listing.parent.rglob("*.png")} == again


def test_settings_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    known: dict[Path, list[object]] = {}
    for attack in ("pgd:a", "pgd,a", "pgd:a"):
        setting = ["m", attack, 0.1, 0]
        known[pictures._place(tmp_path, setting, known)] = setting
    assert [path.name for path in known] == ["m-pgd_a-eps=0.1-seed=0", "m-pgd_a-eps=0.1-seed=0-2"]


def test_a_run_without_pictures_saves_none(bits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run keeps no pictures; set pictures"):
        pictures.save(ran(bits), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- the command


def test_the_command_reads_a_file_and_options_override_it(bits: Path, tmp_path: Path) -> None:
    names = [f"test_transfer:{name}" for name in "ab"]
    spec = {"models": names, "sources": names[0], "data": str(bits), "attacks": ["mi-fgsm", "fgsm"], "eps": 0.2,
            "steps": 3, "count": 9}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = ["transfer", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out"), "--threads", "1"]
    refused = called(*words)
    assert refused.exit_code == 2
    assert "which runs code; add --trust-code" in refused.stderr
    words += ["--trust-code", "--eps", "0.02", "--seed", "0", "--seed", "1", "--save", str(tmp_path / "saved")]
    wrong = called(*words, "--compare", "pgd")
    assert wrong.exit_code == 2
    assert "compare='pgd' is no attack of the run; it has mi-fgsm, fgsm" in wrong.stderr
    assert not (tmp_path / "out").exists()
    done = called(*words, "--compare", "fgsm")
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'saved' / 'pictures.csv'}" in done.output
    run = read(tmp_path / "out")
    assert run.facts["specification"]["eps"] == [0.02]
    assert run.facts["specification"]["targets"] == names
    assert run.facts["data"]["count"] == 9
    hashes = [entry["weights"] for entry in run.facts["models"]]
    assert len(set(hashes)) == 2
    for name, weights in zip(names, hashes, strict=True):
        assert f"{name}: weights {weights}" in done.output
        assert f"- {name}: weights {weights}" in (tmp_path / "out" / "transfer.md").read_text()
    text = (tmp_path / "out" / "transfer.md").read_text()
    assert re.search(r"\| mi-fgsm \| 0.02 \| fgsm \|", text)
    rows = pd.read_csv(tmp_path / "out" / "transfer.csv")
    assert set(rows["seed"]) == {0, 1}
    assert rows["gradients"].tolist() == [3] * 4 + [1] * 4
    assert len(list((tmp_path / "saved").iterdir())) == 1 + 4
    (tmp_path / "out" / "transfer.md").unlink()
    shown = called("transfer", "--out", str(tmp_path / "out"), "--trust-code")
    assert shown.exit_code == 0, shown.output
    assert "0.02" in (tmp_path / "out" / "transfer.md").read_text()
    assert read(tmp_path / "out").facts["specification"]["eps"] == [0.02]
    paths = run_report(tmp_path / "out")
    for path in paths:
        page = path.read_text()
        assert "9 images that all models classify correctly" in page
        assert "Success against gradients" in page


def run_report(folder: Path) -> list[Path]:
    done = called("report", str(folder))
    assert done.exit_code == 0, done.output
    return [folder / "report.html", folder / "report.md"]


def test_a_run_without_targets_is_left_as_it_is(bits: Path, tmp_path: Path) -> None:
    words = ["--model", "test_transfer:a", "--data", str(bits), "--count", "5", "--eps", "0.1", "--attack", "fgsm"]
    made = called("evaluate", *words, "--no-diagnose", "--threads", "1", "--out", str(tmp_path / "out"))
    assert made.exit_code == 0, made.output
    before = (tmp_path / "out" / "run.json").read_bytes()
    done = called("transfer", "--out", str(tmp_path / "out"), "--trust-code")
    assert done.exit_code == 2
    assert "carries no examples to targets; firstorder report" in done.stderr
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_weights_are_the_same_wherever_they_are(bits: Path) -> None:
    """The class and the code of a model are no part of its weights."""
    first, second = (ran(bits, models=[{"model": f"test_transfer_run:{name}", "name": "a"}], targets="a").facts
                     for name in ("one", "other"))  # fmt: skip
    assert first["models"][0]["weights"] == second["models"][0]["weights"]
    assert first["models"][0]["digest"] != second["models"][0]["digest"]


def one() -> torch.nn.Module:
    return MODELS["a"]


class Other(torch.nn.Sequential):
    """Another class of the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


def other() -> torch.nn.Module:
    return Other(*MODELS["a"]).eval()
