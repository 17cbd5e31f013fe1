"""`firstorder diagnose`: can a robust accuracy of this model be trusted?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from firstorder.attacks.distribution import versions
from firstorder.evaluation.names import data as datasets
from firstorder.evaluation.names import models, packaged
from firstorder.evaluation.names.numbers import radius
from firstorder.evaluation.reporting import diagnosis_page
from firstorder.evaluation.reporting.diagnosis import TITLE, summary, warnings
from firstorder.evaluation.reporting.terminal import console, refusing, table, wrote
from firstorder.evaluation.runs import diagnosis
from firstorder.evaluation.runs.machine import machine, settings


def diagnose(
    model: Annotated[str, typer.Argument(help="Packaged name, robustbench:NAME, timm:NAME, module:function, ...")],
    data: Annotated[str | None, typer.Option(help="Images; those that come with a packaged model by default.")] = None,
    eps: Annotated[str, typer.Option(help="Radius, as 0.3 or 8/255.")] = "8/255",
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward.")] = 100,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the page, diagnosis.html, and its text.")] = None,
) -> None:
    """Can a model's robust accuracy be trusted? Checks of its outputs, its gradients and the attack.

    The model is taken in the mode in which it is made. Ends with exit code 1 where a check warns.
    """
    with refusing():
        size, make = radius(eps, name="eps"), models.finder(model)
        if data is None and model not in packaged.MODELS:
            raise ValueError(f"{model!r} brings no images; name some with --data")
        images = packaged.get(model).images() if data is None else datasets.load(data, count=count)
        x, y = images.x[:count], images.y[:count]
        findings = diagnosis.diagnose(make(), x, y, eps=size, norm=norm, batch_size=batch_size, seed=seed)
    title = f"{TITLE} {model}, {len(x)} images of {images.name}, {norm} radius {eps}"
    shown = [(f.check, f.verdict, f.figure) for f in findings]
    console.print(table(("check", "verdict", "figure"), shown, title=title, words=3))
    warned = warnings(findings)
    for said in warned:
        console.print(said, highlight=False, markup=False)
    console.print(summary(findings), highlight=False, markup=False)
    if out is not None:
        facts = {
            "model": model,
            "images": f"{len(x)} of {images.name}",
            "norm": norm,
            "radius": eps,
            "batch size": batch_size,
            "seed": seed,
            "command": shlex.join(["firstorder", *sys.argv[1:]]),
            **versions(["torch"]),
            **{key: value for key, value in machine(torch.device("cpu")).items() if value is not None},
            **settings(),
        }
        with refusing():
            wrote(diagnosis_page.write(findings, out, model=model, facts=facts))
    if warned:
        raise typer.Exit(1)
