"""What items of the papers measure beside runs: components of gradients, a bound, outliers, what training logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from firstorder.evaluation.names.papers import items
from firstorder.evaluation.reporting.paper_tables import Table
from firstorder.evaluation.studies import bounds, components, convergence, measurements, outliers
from firstorder.evaluation.training import measures, study
from firstorder.evaluation.training.configuration import configure
from firstorder.evaluation.training.experiment import Outcome
from firstorder.evaluation.training.measures import Trained
from firstorder.evaluation.training.study import Study
from firstorder.fabric import Robustness


def means(table: Table) -> dict[str, float]:
    return {row.name: row.mean for row in table.rows}


# --- components


def test_components_of_a_gradient_by_hand() -> None:
    gradients = torch.tensor([[1.0, -0.5, 0.05, 0.001, 0.0]]).double()
    assert components.cut(gradients, 1, 3).tolist() == [[1, -1, 1, 1, 0]]
    assert components.cut(gradients, 10, 3).tolist() == [[3, -3, 1, 1, 0]]  # 10, -5, 0.5 and 0.01, never below 1
    np.testing.assert_allclose(components.raw(gradients, 10, 3), [[3, -3, 0.5, 0.01, 0]])
    shown = {
        row.name: float(row.values[0]) for row in components._rows("x", components.cut(gradients, 10, 3), gradients)
    }
    sizes = np.corrcoef([3, 3, 1, 1, 0], [1, 0.5, 0.05, 0.001, 0])[0, 1]
    assert shown == pytest.approx({"x, at ±1": 50, "x, most frequent other size": 50, "x, like the raw": 100 * sizes})


def test_the_components_of_a_model() -> None:
    found = measurements.measure("components", {"model": "mnist-cnn", "data": "mnist", "count": 8, "levels": [50]})
    (table,) = found.tables
    assert table.title == "mnist-cnn, 8 images of MNIST"
    shown = means(table)
    assert shown["sign, at ±1"] == 100
    assert 0 < shown["b = 50, most frequent other size"] < shown["b = 50, at ±1"] < 100
    assert [axes.get_title() for axes in found.figures["histograms"].axes] == ["sign", "b = 50", "raw"]
    counted = sum(patch.get_height() for patch in found.figures["histograms"].axes[0].patches)
    assert counted == sum(patch.get_height() for patch in found.figures["histograms"].axes[2].patches)


def test_options_that_a_measurement_does_not_have() -> None:
    with pytest.raises(ValueError, match="the measurement bounds has no count; leave it out"):
        measurements.measure("bounds", {"count": 3})


# --- the bound


def test_the_printed_bound() -> None:
    problem = convergence.separable()
    g, d, steps = float(problem.weights.sum()), 2 * convergence.EPS * 8, 25
    a, gamma, b, lam = convergence.ALPHA, 0.8, 0.9, 0.99
    slowly = g * d**2 / (2 * a * gamma * (1 - b) * math.sqrt(steps))
    slowly += g * d**2 / (2 * a * gamma * (1 - b) * (1 - lam) ** 2 * steps)
    slowly += 2 * a * gamma * g / ((1 - b) * math.sqrt(steps))
    assert float(bounds.printed(problem, torch.tensor([steps]))[0]) == pytest.approx(slowly)


def test_the_bound_along_the_gap() -> None:
    found = measurements.measure("bounds", {"steps": 100, "seeds": [0, 1]})
    assert [table.title.partition(",")[0] for table in found.tables] == ["separable", "valley"]
    for table in found.tables:
        shown = means(table)
        for t in (10, 100):
            assert 0 < shown[f"gap, T = {t}"] < shown[f"tight bound, T = {t}"] < shown[f"printed bound, T = {t}"]
            assert shown[f"gap times √T, T = {t}"] == pytest.approx(shown[f"gap, T = {t}"] * math.sqrt(t))
    assert len(found.figures["bounds"].axes) == 2


# --- outliers


@pytest.mark.parametrize("problem", outliers.PROBLEMS)
def test_the_minimum_is_known(problem: str) -> None:
    x, y, best = outliers.examples(problem, 50.0, torch.Generator().manual_seed(3))
    np.testing.assert_allclose(torch.linalg.lstsq(x, y).solution.T, best, atol=1e-9)
    noise = y - x @ best.T
    large = float((noise.abs() > 5).double().mean())
    assert large == pytest.approx(0.1 if problem == "outliers" else 0.9, abs=0.03)


def test_without_a_limit_it_is_plain_momentum() -> None:
    plain = outliers.gaps("outliers", "MSGD", 10, alpha=math.inf, steps=30, seed=1)
    torch.testing.assert_close(outliers.gaps("outliers", "ENGM", 10, alpha=math.inf, steps=30, seed=1), plain)
    x, y, best = outliers.examples("outliers", 10, generator := torch.Generator().manual_seed(1))
    theta, velocity, slowly = torch.zeros(1, 20).double(), 0.0, []
    for _ in range(30):
        chosen = torch.randint(1000, (10,), generator=generator)
        velocity = 0.9 * velocity + (x[chosen] @ theta.T - y[chosen]).T @ x[chosen] / 10
        theta = theta - 0.02 * velocity
        slowly.append(float((x @ (theta - best).T).square().mean()) / 2)
    np.testing.assert_allclose(plain, slowly, rtol=1e-9)


def test_engm_bears_outliers() -> None:
    found = measurements.measure("outliers", {"sizes": [1, 100], "alphas": [1], "steps": 300, "seeds": [0]})
    shown = means(found.tables[0])
    assert shown["MSGD, s = 100"] > shown["MSGD, s = 1"] + 2
    assert shown["ENGM α = 1, s = 100"] < shown["ENGM α = 1, s = 1"] + 0.5
    assert len(found.figures["gaps"].axes) == 2


# --- training


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """A run of 20 epochs whose logs are known; the rate drops after 10 and 15."""
    epochs = np.arange(1, 21)
    columns: dict[str, Any] = {
        "mu": epochs,
        "sigma2": epochs**2,
        "validation_robust": np.nan,
        "seconds": 2.5,
        "correlation": epochs / 20,
        "correlation_training": 0.5,
    }
    table = pd.DataFrame({"step": epochs, "epoch": epochs, **columns})
    table.loc[[4, 9, 19], "validation_robust"] = [0.2, 0.5, 0.3]
    table.to_csv(tmp_path / "epochs.csv", index=False)
    norms = pd.DataFrame({"step": [1, 1, 2, 2], "norm": [1.0, 2, 3, 4], "input_norm": [1.0, 2, 1, 2]})
    norms.to_csv(tmp_path / "gradients.csv", index=False)
    loss = np.zeros((2, 3, 3))
    loss[0, 1, 1], loss[1, 0, 0] = 4, -2
    np.savez(tmp_path / "landscape.npz", offsets=np.zeros(3), best=loss, last=2 * loss)
    shares = {"best": Robustness(0.9, 0.5), "last": Robustness(0.8, 0.4), "overfitting": 0.2, "radii": {"1.5": 0.25}}
    outcome = Outcome(images="test", count=50, best_epoch=1, **shares)  # type: ignore[arg-type]
    return Trained(configure({"data": "mnist", "epochs": 20}), tmp_path, outcome)


def test_measures_of_training(trained: Trained) -> None:
    expected = {
        "natural": 90, "best": 50, "last": 40, "overfitting": 20, "μ": 10.5, "σ²": 143.5,
        "μ before the drop": 9.5, "μ at the end": 19.5, "σ² before the drop": 90.5, "σ² at the end": 380.5,
        "correlation": 10.5 / 20, "correlation at the end": 19.5 / 20, "correlation in training mode": 0.5,
        # w of norms 3 and 4, estimated as 1 and 2 by the line through the measurement before
        "error of w at α = 0.1": 100 * ((0.1 - 0.1 / 3) + (0.05 - 0.025)) / 2,
        "error of w at α = 1": 100 * ((1 - 1 / 3) + (1 / 2 - 1 / 4)) / 2, "error of w at α = 3": 100 * (0 + 1 / 4) / 2,
        "span of the loss": 3, "span of the loss at the end": 6,
        "validation at its highest": 50, "validation at the end": 30, "seconds": 2.5, "ε = 1.5": 25,
    }  # fmt: skip
    assert {name: measures.measure(name, trained) for name in expected} == pytest.approx(expected)
    assert set(measures.MEASURES) <= set(expected)
    for name, message in (("ε = 2", "'ε = 2' was not evaluated; radii are 1.5"), ("colour", "no measure 'colour'")):
        with pytest.raises(ValueError, match=message):
            measures.measure(name, trained)


def test_the_measures_that_claims_name() -> None:
    accuracies = ("natural", "best", "last", "overfitting")
    assert measures.named(["A, B, last", "A, μ"]) == (*accuracies, "μ")
    assert measures.named(["A, μ", "B, μ", "B, σ²"]) == ("μ", "σ²")


def test_items_that_share_runs_mean_the_same(tmp_path: Path) -> None:
    found: dict[Path, Any] = {}
    shared = [(name, one) for name, one in items().items() if "engm-table2" in (name, one.runs)]
    assert len(shared) > 10
    for _, one in shared:
        for cell in study.cells(Study(**one.specification), tmp_path):
            assert found.setdefault(cell.folder, cell.configuration) == cell.configuration
            assert found[cell.folder].diagnose
            assert found[cell.folder].landscape
