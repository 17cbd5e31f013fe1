"""The demonstration's files: results.json, report.md, a bar chart and a picture grid per model."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from firstorder.attacks.distribution import versions
from firstorder.evaluation.commands.demo import Outcome, radius
from firstorder.evaluation.reporting.demo_figures import accuracy_chart, picture_grid
from firstorder.files import write_text


def write(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write all files of the demonstration into `folder` and return their paths, the report first."""
    found = versions(["torch"]) | {"python": platform.python_version()}
    chart = folder / "accuracy.png"
    accuracy_chart(outcomes, chart)
    pictures = [folder / f"pictures-{outcome.images.name.lower()}.png" for outcome in outcomes]
    for outcome, path in zip(outcomes, pictures, strict=True):
        picture_grid(outcome, path)
    results = folder / "results.json"
    write_text(results, json.dumps({"versions": found, "models": [_record(o) for o in outcomes]}, indent=2) + "\n")
    report = folder / "report.md"
    templates = Environment(
        loader=PackageLoader("firstorder.evaluation"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    text = templates.get_template("demo.md").render(
        version=found["firstorder"],
        versions=found,
        outcomes=outcomes,
        radius=radius,
        chart=chart.name,
        pictures=[path.name for path in pictures],
    )
    write_text(report, text.rstrip() + "\n")
    return [report, results, chart, *pictures]


def _record(outcome: Outcome) -> dict[str, object]:
    scenario = outcome.scenario
    return {
        "model": scenario.name,
        "data": outcome.images.name,
        "images": len(outcome.images.y),
        "norm": "Linf",
        "eps": scenario.eps,
        "gradients": scenario.gradients,
        "clean_accuracy": outcome.clean_accuracy,
        "attacks": [dataclasses.asdict(row) for row in outcome.rows],
    }
