"""`firstorder train-report` and `firstorder train-study`: pages, pictures, tables and what they are made of."""

from __future__ import annotations

import csv
import inspect
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from typer.testing import CliRunner

from firstorder.evaluation.cli import app
from firstorder.evaluation.commands.train_study import train_study
from firstorder.evaluation.names.packaged import mnist
from firstorder.evaluation.reporting.intervals import wilson
from firstorder.evaluation.training import experiment, parts, report, study
from firstorder.evaluation.training.configuration import configure, write
from firstorder.evaluation.training.estimates import errors
from firstorder.evaluation.training.experiment import Outcome, load
from firstorder.evaluation.training.study import Cell, Study
from firstorder.fabric import Robustness, make
from report_pages import Opened

KEYS: dict[str, Any] = {
    "data": "mnist", "validation": 100, "examples": 60, "epochs": 3, "batch_size": 20, "eps": 0.1, "lr": 0.2,
    "attack": "pgd:steps=1,random_start=true", "judge_steps": 1, "diagnose": 8, "landscape": 2,
}  # fmt: skip
NAMES = ["curves", "gradients", "correlation", "landscape"]
PICTURES = [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    (line,) = str(result.stderr).splitlines()
    return line.removeprefix("error: ")


def named(figure: Figure) -> list[str]:
    """What its legend names."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def columns(path: Path) -> dict[str, list[float]]:
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in table] for name in table[0]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, "a<b>", and one without diagnostics that is evaluated every second epoch, "plain"."""
    folder = tmp_path_factory.mktemp("runs")
    others = {"diagnose": 0, "landscape": 0, "validate_every": 2, "method": "msgd"}
    for name, keys in (("a<b>", KEYS), ("plain", {**KEYS, **others})):
        experiment.run(configure(keys), folder / name, make(accelerator="cpu"), tensorboard=False)
    return folder


def written(out: Path) -> list[str]:
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    return sorted(path.name for path in out.iterdir())


def test_a_page_of_one_run(runs: Path) -> None:
    folder, out = runs / "a<b>", runs / "a<b>" / "report"
    output = done("train-report", folder)
    assert written(out) == sorted([*PICTURES, "report.html", "weights.csv"])
    assert all(f"wrote {out / name}" in output for name in [*PICTURES, "report.html"])
    page = (out / "report.html").read_text()
    outcome = load(folder)
    assert "a<b>" not in page
    assert all(text in page for text in ("Adversarial training: a&lt;b&gt;</title>", ">a&lt;b&gt;</th>"))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[:4] == ["vanilla", "engm", "3 of 3", f"{outcome.best_epoch}"]
    shares = (outcome.best.natural, outcome.best.robust, outcome.last.natural, outcome.last.robust)
    ranges = [tuple(100 * end for end in wilson(share, 100)) for share in shares]
    message = [f"{100 * s:.2f} % ({low:.1f} – {high:.1f})" for s, (low, high) in zip(shares, ranges, strict=True)]
    assert cells[4:10] == [*message, f"{100 * outcome.overfitting:.2f} %", "100 validation"]
    assert "not finished" not in page
    assert [name for name in NAMES if f'<section id="{name}"' in page] == NAMES
    assert page.count('class="narrow"') == page.count('class="usual"') == len(NAMES)
    for key, value in configure(KEYS).model_dump().items():
        assert f"{key}: {value}\n" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_on_a_phone(browser: Any, runs: Path, tmp_path: Path, scheme: str) -> None:
    done("train-report", runs / "a<b>", runs / "plain", "--out", tmp_path / "out")
    shown = Opened(browser, tmp_path / "out", viewport={"width": 360, "height": 740}, color_scheme=scheme)
    widths, smallest = shown.narrow()
    assert widths == [360, 360]
    assert smallest >= 9
    assert shown.color("figure svg text", "fill") == shown.color("body")
    assert (sum(shown.color("body", "backgroundColor")) > 600) == (scheme == "light")
    assert shown.mistakes == []


def test_a_page_of_several_runs(runs: Path, tmp_path: Path) -> None:
    done("train-report", runs / "a<b>", runs / "plain", "--out", tmp_path / "out")
    assert written(tmp_path / "out") == sorted([*PICTURES, "report.html", "weights.csv"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th><td>vanilla</td>' in page for name in ("a&lt;b&gt;", "plain"))


def test_a_run_without_diagnostics_that_is_not_finished(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "going"
    shutil.copytree(runs / "plain", folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("model: small-cnn", "model: <script>alert(1)</script>"))
    (folder / "result.json").unlink()
    done("train-report", folder, "--out", tmp_path / "out")
    assert written(tmp_path / "out") == ["curves.png", "curves.svg", "report.html"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<script") == 1
    assert "model: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.findall(r"<td[^>]*>(.*?)</td>", page)[-4:] == ["not finished", "", "", "100 validation"]
    table = columns(folder / "epochs.csv")
    at = max((1, 2), key=lambda i: table["validation_robust"][i])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[2:4] == ["3 of 3", f"{at + 1}"]
    shares = [f"{100 * table[f'validation_{name}'][at]:.2f} % " for name in ("natural", "robust")]
    assert all(cell.startswith(share) for cell, share in zip(cells[4:6], shares, strict=True))


def test_folders_without_an_epoch_are_refused(runs: Path, tmp_path: Path) -> None:
    assert refused("train-report", tmp_path) == f"{tmp_path} holds no run of training (config.yaml is missing)"
    shutil.copy(runs / "plain" / "config.yaml", tmp_path)
    message = f"{tmp_path} has not finished an epoch yet; wait, or go on with firstorder train --resume"
    assert refused("train-report", tmp_path) == message
    (tmp_path / "epochs.csv").touch()
    assert refused("train-report", tmp_path) == message
    with pytest.raises(ValueError, match="there is no run to report"):
        report.write([], tmp_path)


def test_the_curves_are_the_tables(runs: Path) -> None:
    logs = [report.read(runs / name) for name in ("a<b>", "plain")]
    robust, natural, loss = report.curves(logs).axes
    for i, name in enumerate(("a<b>", "plain")):
        table = columns(runs / name / "epochs.csv")
        evaluated = [k for k in range(3) if name == "a<b>" or k > 0]
        training, validation, best = robust.lines[3 * i : 3 * i + 3]
        top = max(evaluated, key=lambda k: table["validation_robust"][k])
        for line, key, chosen, scale in (
            (training, "robust", range(3), 100), (validation, "validation_robust", evaluated, 100),
            (best, "validation_robust", [top], 100), (natural.lines[i], "validation_natural", evaluated, 100),
            (loss.lines[i], "loss", range(3), 1),
        ):  # fmt: skip
            np.testing.assert_allclose(line.get_xdata(), [k + 1 for k in chosen])
            np.testing.assert_allclose(line.get_ydata(), [scale * table[key][k] for k in chosen])
        assert (training.get_linestyle(), best.get_marker()) == (":", "o")
        assert training.get_color() == validation.get_color() == natural.lines[i].get_color()
    assert len({line.get_color() for line in loss.lines}) == 2
    assert named(report.curves(logs)) == ["a<b>", "plain", "training", "validation"]
    assert named(report.gradients(logs)) == named(report.correlation(logs)) == ["a<b>", "plain"]
    clean = replace(logs[1], configuration=logs[1].configuration.model_copy(update={"objective": "natural"}))
    robust, natural, _ = report.curves([clean]).axes
    table = columns(runs / "plain" / "epochs.csv")
    assert not any(line.get_linestyle() == ":" for line in robust.lines)  # what it is trained on is not adversarial
    np.testing.assert_allclose(natural.lines[0].get_ydata(), 100 * np.asarray(table["robust"]))
    mean, variance, weight = report.gradients(logs).axes
    table = columns(runs / "a<b>" / "epochs.csv")
    for axes, key in ((mean, "mu"), (variance, "sigma2"), (weight, "weight")):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), table[key])
        assert len(axes.lines) == (2 if key == "weight" else 1)
    scatter, pearson = report.correlation(logs).axes
    pairs = columns(runs / "a<b>" / "gradients.csv")
    last = np.asarray([pairs["input_norm"], pairs["norm"]]).T[np.asarray(pairs["step"]) == 9]
    assert last.shape == (8, 2)
    (points,), (line,) = scatter.collections, pearson.lines
    np.testing.assert_allclose(np.asarray(points.get_offsets()), last)
    np.testing.assert_allclose(line.get_ydata(), table["correlation"])


def test_the_landscapes_share_a_scale(runs: Path) -> None:
    log = report.read(runs / "a<b>")
    with np.load(runs / "a<b>" / "landscape.npz") as arrays:
        losses = {name: arrays[name] for name in ("best", "last")}
    panels = report.landscapes([log, report.read(runs / "plain"), log]).axes[:8]
    rows = [(which, n) for which in ("best", "last") * 2 for n in range(2)]
    assert [axes.get_title() for axes in panels] == [f"a<b>: {which} weights" for which, _ in rows]
    for axes, (which, n) in zip(panels, rows, strict=True):
        contours: Any = axes.collections[0]
        assert (contours.zmin, contours.zmax) == pytest.approx((losses[which][n].min(), losses[which][n].max()))
        assert contours.levels[-1] == pytest.approx(max(loss[n].max() for loss in losses.values()))
        assert axes.get_xlim() == pytest.approx((-2, 2))
    rising = (np.linspace(0, 1, 21)[:, None] * np.ones(21))[None]
    tilted = {"offsets": log.landscape["offsets"], "best": rising, "last": rising}
    band: Any = report.landscapes([replace(log, landscape=tilted)]).axes[0].collections[0]
    box = band.get_paths()[12].get_extents()
    assert box.width == pytest.approx(4)
    assert box.height < 0.5


BASE = {**KEYS, "epochs": 1, "diagnose": 0, "landscape": 0}
TINY = Study(seeds=(3, 4), base=BASE, variants={"MSGD | x": {"method": "msgd"}, "ENGM": {"alpha": 0.7, "lr": 0.05}})


def test_the_packaged_study(tmp_path: Path) -> None:
    packaged = study.read(study.PACKAGED)
    found = study.cells(packaged, tmp_path, data="mnist")
    assert len(found) == len(packaged.variants) * len(packaged.seeds) == len({cell.folder for cell in found})
    assert packaged.paper.keys() <= packaged.variants.keys()
    for cell in found:
        assert parts.recipe(cell.configuration).seed == cell.configuration.seed
    command = inspect.signature(train_study, eval_str=True)
    assert next(iter(command.parameters.values())).default == study.PACKAGED


def test_cells_are_variants_times_seeds(tmp_path: Path) -> None:
    found = study.cells(TINY, tmp_path, epochs=2)
    seeded = [("MSGD | x", 3), ("MSGD | x", 4), ("ENGM", 3), ("ENGM", 4)]
    assert [(cell.variant, cell.configuration.seed) for cell in found] == seeded
    assert len({cell.folder for cell in found}) == 4
    assert found[-1].folder == tmp_path / "engm-seed4"
    assert found[-1].configuration == configure({**BASE, "epochs": 2, "alpha": 0.7, "lr": 0.05, "seed": 4})
    write(found[0].configuration, found[0].folder / "config.yaml")
    assert study.cells(TINY, tmp_path, epochs=2) == found
    with pytest.raises(ValueError, match="holds a run of another configuration; name another folder"):
        study.cells(TINY, tmp_path, epochs=3)
    (found[0].folder / "config.yaml").unlink()
    (found[0].folder / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds result\.json without config\.yaml; delete it, or name another folder"):
        study.cells(TINY, tmp_path)


NO_STUDY = {
    "base: {}\nvariants: {}": "variants: Dictionary should have at least 1 item",
    "base: {}": "variants: Field required",
    "base: {}\nvariants: {a: {}}\nseeds: []": "seeds: Tuple should have at least 1 item",
    "base: {}\nvariants: {a: {}}\nseed: 1": "seed: Extra inputs are not permitted",
    "base: {}\nvariants: {a: {}}\npaper: {a: [1, 2, 3]}": "paper.a.3: Field required",
}


@pytest.mark.parametrize("text", NO_STUDY)
def test_files_that_are_no_study(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    message = re.sub(r", line [0-9]+:", ":", refused("train-study", file, "--out", tmp_path))
    assert message.startswith(f"{file}: {NO_STUDY[text]}")


def outcome(natural: float, best: float, last: float) -> Outcome:
    shares = {"best": Robustness(natural, best), "last": Robustness(0.9, last), "overfitting": 1 - last / best}
    return Outcome(images="test", count=50, best_epoch=1, **shares)  # type: ignore[arg-type]


def test_the_summary_is_over_the_seeds() -> None:
    figures = [("b|c", 0.8, 0.4, 0.3), ("b|c", 0.9, 0.6, 0.2), ("b|c", 0.7, 0.5, 0.5), ("a", 0.5, 0.25, 0.2)]
    chosen = configure(BASE)
    found = [(Cell(variant=name, folder=Path(), configuration=chosen), outcome(*own)) for name, *own in figures]
    table = study.summary(found, {"b|c": (1.0, 2.0, 3.0, 4.5)})
    assert list(table.index) == ["b|c", "a"]
    values = np.asarray([[100 * n, 100 * b, 100 * e, 100 * (b - e) / b] for _, n, b, e in figures])
    for i, name in enumerate(("natural", "best", "last", "overfitting")):
        assert table[f"{name} mean"].tolist() == pytest.approx([values[:3, i].mean(), values[3, i]])
        assert table[f"{name} deviation"].tolist() == pytest.approx([values[:3, i].std(ddof=1), 0.0])
        assert table[f"{name} paper"]["b|c"] == (1.0, 2.0, 3.0, 4.5)[i]
        assert pd.isna(table[f"{name} paper"]["a"])
    text = study.markdown(table, found)
    assert "accuracy in percent on 50 test images, robust under PGD-1 with the margin loss" in text
    first, second = text.splitlines()[-2:]
    assert first == "| b\\|c | 80.0 ± 10.0 | 50.0 ± 10.0 | 33.3 ± 15.3 | 30.6 ± 33.7 | 1 / 2 / 3 / 4.5 |"
    assert second == "| a | 50.0 ± 0.0 | 25.0 ± 0.0 | 20.0 ± 0.0 | 20.0 ± 0.0 |  |"
    axes = study.picture(table).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b|c", "a"]
    bars = [line.get_xdata() for line in axes.lines if line.get_color() == "#8a8f98"]
    np.testing.assert_allclose(bars, table[["last mean", "best mean"]])


def test_the_command_runs_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(TINY.model_dump(mode="json"), sort_keys=False))
    assert study.read(file) == TINY
    assert "mean and standard deviation of 2 seeds" in done("train-study", file, "--out", out)
    found = [(cell, load(cell.folder)) for cell in study.cells(TINY, out)]
    table = study.summary(found, {})
    stored = pd.read_csv(out / "study.csv", index_col="variant")
    np.testing.assert_allclose(stored.filter(regex="mean|dev"), table.filter(regex="mean|dev"), atol=1e-4)
    assert (out / "study.md").read_text() == study.markdown(table, found)
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    parallel = study.execute(study.cells(TINY, tmp_path / "two"), jobs=2)
    assert [(cell.variant, end) for cell, end in parallel] == [(cell.variant, end) for cell, end in found]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("what is finished is not run again")

    monkeypatch.setattr(study, "run", fail)
    before = (out / "study.csv").read_bytes()
    done("train-study", file, "--out", out)
    assert (out / "study.csv").read_bytes() == before
    assert "holds a run of another configuration" in refused("train-study", file, "--out", out, "--data", "cifar10")
    message: list[Cell] = []
    study.execute([cell for cell, _ in found], progress=message.append)
    assert message == [cell for cell, _ in found]


def test_a_killed_cell_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Study(base={**BASE, "epochs": 2}, variants={"A-ENGM": {"method": "a-engm"}})
    (whole,) = study.execute(study.cells(once, tmp_path / "whole"))
    steps: list[float] = []

    def watched(*given: Any, **options: Any) -> Outcome:
        def progress(row: Any) -> None:
            if "epoch" not in row:
                steps.append(row["step"])
            if len(steps) == 4:
                raise KeyboardInterrupt

        return experiment.run(*given, **options, progress=progress)

    monkeypatch.setattr(study, "run", watched)
    chosen = study.cells(once, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        study.execute(chosen)
    steps.append(0)
    ((cell, outcome),) = study.execute(chosen)
    assert steps == [1, 2, 3, 4, 0, 4, 5, 6]
    assert outcome == whole[1]
    for name in ("last.safetensors", "best.safetensors"):
        assert (cell.folder / name).read_bytes() == (whole[0].folder / name).read_bytes()


def test_a_study_goes_on_with_the_data_it_began_with(tmp_path: Path) -> None:
    file, images = tmp_path / "data.npz", mnist()

    def write_data(start: int) -> None:
        part = slice(start, start + 130)
        np.savez(file, x=images.x[part].numpy(), y=images.y[part].numpy())

    def chosen(*names: str) -> list[Cell]:
        base = {**BASE, "data": str(file), "examples": 20, "epochs": 1, "landscape": 0, "diagnose": 0}
        return study.cells(Study(base=base, variants={name: {"method": name} for name in names}), tmp_path / "out")

    write_data(0)
    first = study.execute(chosen("msgd"))
    write_data(130)
    assert study.execute(chosen("msgd")) == first  # nothing is left to train
    with pytest.raises(ValueError, match="msgd-seed0 is of other training and validation images than are there"):
        study.execute(chosen("msgd", "engm"))
    assert not (tmp_path / "out" / "engm-seed0").exists()
    write_data(0)
    assert study.execute(chosen("msgd", "engm"))[0] == first[0]


def test_variants_of_one_folder_and_mistakes_name_the_variant(tmp_path: Path) -> None:
    base = {key: value for key, value in KEYS.items() if key != "lr"}
    with pytest.raises(ValueError, match=r"variants 'eps\+' and 'eps-' would share the folder"):
        study.cells(Study(base=base, variants={"eps+": {"lr": 0.3}, "eps-": {"lr": 0.1}}), tmp_path)
    with pytest.raises(ValueError, match=r"^MSGD: metod: "):
        study.cells(Study(base=base, variants={"MSGD": {"metod": "msgd"}}), tmp_path)


def test_a_run_that_was_not_evaluated_yet_and_names_that_matplotlib_reads(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "_x$y_{$"
    shutil.copytree(runs / "plain", folder)
    (folder / "result.json").unlink()
    header, first, *_ = (folder / "epochs.csv").read_text().splitlines()
    (folder / "epochs.csv").write_text(f"{header}\n{first}\n")
    done("train-report", folder)
    assert "not finished" in (folder / "report" / "report.html").read_text()
    assert named(report.curves([report.read(folder)]))[0] == " _x$y_{$"


def test_errors_of_estimated_weights() -> None:
    inputs = np.array([1.0, 2.0, 3.0, 4.0])
    line, off = 2 * inputs + 1, np.array([3.0, 5.0, 7.0, 18.0])
    rows = [
        (step, n, m) for step, norms in ((5, line), (10, line), (15, off)) for n, m in zip(norms, inputs, strict=True)
    ]
    found = errors(pd.DataFrame(rows, columns=["step", "norm", "input_norm"]), (0.5, 6.0, 100.0))
    assert list(found["step"]) == [10] * 3 + [15] * 3
    exact = abs(6 / 18 - 6 / 9) / 4  # all but the last lie on the line of the measurement before
    assert list(found["error"]) == pytest.approx([0, 0, 0, abs(0.5 / 18 - 0.5 / 9) / 4, exact, 0])
    constant = pd.DataFrame({"step": [1, 1, 2, 2], "norm": [1.0, 2, 1, 2], "input_norm": [1.0, 1, 1, 2]})
    assert errors(constant).empty
