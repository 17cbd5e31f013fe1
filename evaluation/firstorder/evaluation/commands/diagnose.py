"""`firstorder diagnose`: can a robust accuracy of this model be trusted?"""

from __future__ import annotations

from typing import Annotated

import typer

from firstorder.evaluation.names import data as datasets
from firstorder.evaluation.names import models, packaged
from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting.diagnosis import TITLE, summary
from firstorder.evaluation.reporting.terminal import console, refusing, table
from firstorder.evaluation.runs import diagnosis


def diagnose(
    model: Annotated[str, typer.Argument(help="Packaged name, robustbench:NAME, timm:NAME, module:function, ...")],
    data: Annotated[str | None, typer.Option(help="Images; those that come with a packaged model by default.")] = None,
    eps: Annotated[str, typer.Option(help="Radius, as 0.3 or 8/255.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward.")] = 100,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
) -> None:
    """Can a model's robust accuracy be trusted? Checks of its outputs, its gradients and the attack.

    The model is taken in the mode in which it is made. Ends with exit code 1 where a check warns.
    """
    with refusing():
        size, make = radius(eps, "eps"), models.finder(model)
        if data is None and model not in packaged.MODELS:
            raise ValueError(f"{model!r} brings no images; name some with --data")
        images = packaged.get(model).images() if data is None else datasets.load(data, count=count)
        x, y = images.x[:count], images.y[:count]
        findings = diagnosis.diagnose(make(), x, y, eps=size, norm=norm, batch_size=batch_size, seed=seed)
    title = f"{TITLE} {model}, {len(x)} images of {images.name}, {norm} radius {eps}"
    shown = [(f.check, f.verdict, f.figure) for f in findings]
    console.print(table(("check", "verdict", "figure"), shown, title=title, words=3))
    for finding in findings:
        if finding.verdict == "warning":
            said = f"{finding.check}: {finding.meaning}. What to do: {finding.remedy}."
            console.print(said, highlight=False, markup=False)
    console.print(summary(findings), highlight=False, markup=False)
    if any(finding.verdict == "warning" for finding in findings):
        raise typer.Exit(1)
