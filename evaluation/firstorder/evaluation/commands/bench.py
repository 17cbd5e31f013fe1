"""`firstorder bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from firstorder.attacks import validation
from firstorder.evaluation.bench import comparison, report
from firstorder.evaluation.bench import device as devices
from firstorder.evaluation.bench.pairs import baseline, per_step
from firstorder.evaluation.bench.scenes import SCENES, Scene, quick
from firstorder.evaluation.names.devices import processor
from firstorder.evaluation.reporting.terminal import bars, console, refusing, say, table, wrote

MEASURES = ("step", "verdict")


def bench(
    family: Annotated[
        str | None,
        typer.Option(
            help="Time one family through every host instead: bounded, minimum-norm, transfer, translation, population "
            "or prepared."
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(s.name for s in SCENES)}; all.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help="step, verdict; both by default.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Paired rounds of steps: 5, of a family 31.")] = None,
    verdict_rounds: Annotated[int, typer.Option(min=1, help="Rounds of verdicts.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="For torch: 2, of a family 1.")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="Every package in every verdict; takes long.")] = False,
    short: Annotated[bool, typer.Option("--quick", help="A tenth of the images and of the steps.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --family: 128 (at most 500); with --device: 512.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a run, with --family: 20; with --device: 10.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Time steps on this device instead, by its own clock: cuda, cuda:1 (cpu to try it)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the picture.")] = Path("runs/bench"),
) -> None:
    """Compare the speed of attacks with other packages.

    It measures a step, and the time until robust accuracy is known.
    """
    with refusing():
        if device is not None:
            _device(processor(device), batch_size or 512, steps or 10, rounds or 5, out)
            return
        if family is not None:
            _family(
                family, model or ["mnist-cnn"], rounds or 31, min(batch_size or 128, 500), steps or 20, threads or 1
            )
            return
        measures = measure or list(MEASURES)
        for name in measures:
            validation.choice("measure", name, MEASURES)
        scenes = [_scene(name) for name in model] if model else list(SCENES)
        found = _compare(
            [quick(scene) if short else scene for scene in scenes],
            measures,
            step_rounds=rounds or 5,
            verdict_rounds=verdict_rounds,
            threads=threads or 2,
            everything=everyone,
        )
    for sheet in report.sheets(found):
        console.print(table(sheet.headings, sheet.rows, title=sheet.title))
    if absent := found.absent():
        say(f"not installed, so left out: {', '.join(absent)}")
    wrote(report.write(found, out))


def _scene(name: str) -> Scene:
    known = {scene.name: scene for scene in SCENES}
    if name not in known:
        raise ValueError(f"model={name!r} is not part of the comparison; choose {' or '.join(known)}")
    return known[name]


def _compare(
    scenes: list[Scene], measures: list[str], *, step_rounds: int, verdict_rounds: int, threads: int, everything: bool
) -> report.Comparison:
    with bars() as bar:
        task = bar.add_task("", total=None)
        steps, verdicts = [], []
        for scene in scenes:

            def progress(name: str, scene: Scene = scene) -> None:
                bar.update(task, description=f"{scene.name}: {name}", advance=1)

            if "step" in measures:
                steps.append(comparison.steps(scene, rounds=step_rounds, threads=threads, progress=progress))
            if "verdict" in measures:
                verdicts += [
                    comparison.verdicts(
                        scene, setting, rounds=verdict_rounds, threads=threads, everything=everything, progress=progress
                    )
                    for setting in scene.verdicts
                ]
    return report.Comparison(
        steps=steps, verdicts=verdicts, threads=threads, step_rounds=step_rounds, verdict_rounds=verdict_rounds
    )


def _device(device: torch.device, batch: int, steps: int, rounds: int, out: Path) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts: dict[str, object] = {"device": name, "torch": torch.__version__, "steps": steps, "rounds": rounds}
    found: list[devices.Row] = []
    for rows in devices.rows(device, batch=batch, steps=steps, rounds=rounds):
        found += rows
        title = f"{rows[0].model}: {name}, torch {torch.__version__}, {steps} steps, median of {rounds}"
        cells = [devices.cells(row)[1:] for row in rows]
        console.print(table(devices.HEADER[1:], cells, title=title))
        devices.write(found, out, facts=facts)  # partial results are kept
    if device.type == "cuda":
        share = devices.share(device, batch=batch, steps=steps)
        facts["the model's own kernels' share of the step"] = f"{100 * share:.1f} %"
        say(f"share of a float32 step in the model's own kernels: {100 * share:.1f} %")
    wrote(devices.write(found, out, facts=facts))


def _family(family: str, models: list[str], rounds: int, batch_size: int, steps: int, threads: int) -> None:
    (model,) = models if len(models) == 1 else (None,)
    if model is None:
        raise ValueError(f"--family takes one --model, not {', '.join(models)}")
    scene = _scene(model)
    case = scene.case(replace(scene.step, images=batch_size))
    x, y = case.x, case.y
    costs = per_step(case.module, x, y, family=family, steps=steps, rounds=rounds, threads=threads)
    title = (
        f"time per step / {baseline(family)}\n{model}, batch {len(x)}, {steps} steps, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
    rows = [(cost.name, f"{cost.median:.3f}", f"{cost.low:.3f}", f"{cost.high:.3f}") for cost in costs]
    console.print(table(("contender", f"median of {rounds}", "lowest", "highest"), rows, title=title))
