"""The demonstration: every bounded attack of the registry, and the recommended options, at equal budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from firstorder.attacks import Attack, Verdict, registry, verdicts
from firstorder.evaluation.names import packaged
from firstorder.evaluation.names.attacks import RECOMMENDED, Line, parse
from firstorder.evaluation.names.packaged import Images
from firstorder.evaluation.reporting.terminal import bars, console
from firstorder.evaluation.runs.measure import Measurement, measure, predictions


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, its data, and the budget every attack gets on it.

    Attributes:
        name: heading in the report.
        model: loads the model.
        images: loads the data.
        count: how many of the images are attacked.
        eps: radius of the L-infinity ball.
        gradients: gradients per example that an attack may take.
    """

    name: str
    model: Callable[[], nn.Module]
    images: Callable[[], Images]
    count: int
    eps: float
    gradients: int


SCENARIOS = (
    Scenario(
        name="MNIST CNN, adversarially trained",
        model=packaged.mnist_cnn,
        images=packaged.mnist,
        count=500,
        eps=0.3,
        gradients=20,
    ),
    Scenario(
        name="CIFAR-10 ResNet-18, not adversarially trained",
        model=packaged.cifar10_resnet18,
        images=packaged.cifar10,
        count=64,
        eps=1 / 255,
        gradients=10,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack on one model, as the table shows it. Accuracies and sizes are over all attacked images."""

    attack: str
    robust_accuracy: float
    mean_linf: float
    mean_l2: float
    gradients: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All rows of a scenario, and what the pictures show: one array of examples and predictions per attack.

    `left_out` names the attacks of which one step costs more than the budget.
    """

    scenario: Scenario
    images: Images
    clean_accuracy: float
    rows: tuple[Row, ...]
    clean_predictions: Tensor
    adversarial: dict[str, Tensor]
    predictions: dict[str, Tensor]
    left_out: tuple[str, ...]


def radius(eps: float) -> str:
    """A radius as the field writes it: 0.3, but 8/255."""
    short = f"{eps:g}"
    return short if len(short) <= 5 else f"{eps * 255:g}/255"


def bounded_attacks() -> dict[str, Line]:
    """Every registered bounded attack that knows L-infinity, and the recommended options, by label. Without the
    verdict, which has a price of its own.
    """
    found = {label: parse(label) for label in sorted([*registry().attacks, *RECOMMENDED.values()])}
    return {
        label: line
        for label, line in found.items()
        if line.bounded and "Linf" in line.cls.norms and not issubclass(line.cls, Verdict)
    }


def attacks_within(budget: int, eps: float, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[str, Attack]]:
    """The bounded attacks with as many steps as `budget` gradients allow, counted on one example.

    An attack whose single step costs more is left out.
    """
    for name, line in bounded_attacks().items():
        price = 1
        if "steps" in line.known:
            price = int(line.build(eps=eps, steps=1).run(model, x[:1], y[:1]).gradients[0])
        if price <= budget:
            yield name, line.build(eps=eps, steps=budget // price)


def run(scenario: Scenario, *, progress: Callable[[str], None] = lambda name: None) -> Outcome:
    """Run a scenario. `progress` is told the name of each attack before it starts."""
    model, images = scenario.model(), scenario.images()
    x, y = images.x[: scenario.count], images.y[: scenario.count]
    clean = predictions(model, x)
    measured: dict[str, tuple[Attack, Measurement]] = {}
    for name, attack in attacks_within(scenario.gradients, scenario.eps, model, x, y):
        progress(name)
        measured[name] = attack, measure(attack, model, x, y)
    rows = [
        Row(
            attack=name,
            robust_accuracy=float(m.correct.float().mean()),
            mean_linf=float(m.linf.mean()),
            mean_l2=float(m.l2.mean()),
            gradients=float(m.gradients.float().mean()),
            steps=getattr(attack, "steps", 1),
        )
        for name, (attack, m) in measured.items()
    ]
    shown = {name: m.adversarial for name, (_, m) in measured.items()}
    return Outcome(
        scenario=scenario,
        images=Images(images.name, x, y, images.classes),
        clean_accuracy=float((clean == y).float().mean()),
        rows=tuple(sorted(rows, key=lambda row: (row.robust_accuracy, row.attack))),
        clean_predictions=clean,
        adversarial=shown,
        predictions={name: predictions(model, adversarial) for name, adversarial in shown.items()},
        left_out=tuple(name for name in bounded_attacks() if name not in measured),
    )


def pictured(outcome: Outcome, count: int) -> list[int]:
    """The first `count` images that the model classifies correctly and most attacks break."""
    y = outcome.images.y
    broken = torch.stack([verdicts.broken(p, y) for p in outcome.predictions.values()]).float().mean(0)
    order = torch.where(outcome.clean_predictions == y, broken, -1.0).argsort(descending=True, stable=True)
    return order[:count].tolist()


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the figures and results.json.")] = Path("runs/demo"),
) -> None:
    """Attack the packaged MNIST and CIFAR-10 models with every bounded attack at equal budgets."""
    from firstorder.evaluation.reporting import demo_page

    outcomes = []
    for scenario in SCENARIOS:
        outcomes.append(_with_progress(scenario))
        console.print(_table(outcomes[-1]))
        console.print()
    for path in demo_page.write(outcomes, out):
        console.print(f"wrote {path}", highlight=False)


def _with_progress(scenario: Scenario) -> Outcome:
    with bars() as bar:
        task = bar.add_task(scenario.name, total=len(bounded_attacks()))
        return run(scenario, progress=lambda name: bar.update(task, description=f"{scenario.name}: {name}", advance=1))


def _table(outcome: Outcome) -> Table:
    scenario = outcome.scenario
    table = Table(
        title=f"{scenario.name}: clean accuracy {100 * outcome.clean_accuracy:.1f} %\n"
        f"{len(outcome.images.y)} images, ε = {radius(scenario.eps)}, {scenario.gradients} gradients per image",
        title_justify="left",
        caption=f"left out, as one step takes more: {', '.join(outcome.left_out)}" if outcome.left_out else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("attack", no_wrap=True)
    for heading in ("steps", "robust accuracy", "mean L∞", "mean L2", "gradients"):
        table.add_column(heading, justify="right", no_wrap=heading != "robust accuracy")
    for row in outcome.rows:
        table.add_row(
            row.attack.replace(",", ",\n"),
            str(row.steps),
            f"{100 * row.robust_accuracy:.1f} %",
            f"{row.mean_linf:.4f}",
            f"{row.mean_l2:.3f}",
            f"{row.gradients:g}",
        )
    return table
