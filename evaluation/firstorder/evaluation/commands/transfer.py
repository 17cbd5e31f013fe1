"""`firstorder transfer`: a run in which examples are carried from model to model, shown as papers on transfer do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from firstorder.evaluation.commands.evaluate import computed, failures
from firstorder.evaluation.names import documents
from firstorder.evaluation.names.attacks import RECOMMENDED, parse
from firstorder.evaluation.reporting import pictures, transfer_outcomes, transfer_report
from firstorder.evaluation.reporting.terminal import console, refusing, say, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.specification import MOST, ModelEntry, Specification, specify
from firstorder.evaluation.runs.store import FACTS, read

ATTACKS = ("i-fgsm", "mi-fgsm", "ni-fgsm", "si-ni-fgsm", "clipped-ngm", RECOMMENDED["clipped-ngm"])

DEFAULTS: dict[str, Any] = {
    "sources": ["cifar10-resnet18"],
    "attacks": ATTACKS,
    "eps": ("16/255",),
    "data": "cifar10",
    "count": 200,
    "batch_size": 20,
    "diagnose": False,
}
"""What a run has that no file specifies; T = 10 beside."""

WIDE = 4
"""With more targets than these the terminal gets a line for each instead of a column."""


def transfer(
    spec: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file of a specification, as for evaluate, or the name of one of firstorder's own "
            "(transfer-screening, transfer-compositions, transfer-frontier); options override it. None is needed."
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Models crafted on; A+B for an ensemble in logits. cifar10-resnet18 by default."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Models that examples are tried on; the sources by default.")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks: si-ni-fgsm:m=3, mi-fgsm+quantised.")] = None,
    defence: Annotated[list[str] | None, typer.Option(help="Defences before targets: jpeg:quality=50.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii; 16/255 by default.")] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of steps T, 10 by default; several draw a curve.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="mnist, cifar10 (by default), an .npz file, or a folder with labels.json.")
    ] = None,
    select: Annotated[
        Literal["all", "all-correct"] | None,
        typer.Option(
            help="The images to attack: those that all models classify correctly, by default, or all; then success is "
            "shown over both."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many of them; 200 by default.")] = None,
    skip: Annotated[int | None, typer.Option(min=0, help="Of these, how many to leave out at the beginning.")] = None,
    targeted: Annotated[
        str | None,
        typer.Option(help="Towards another class: random, least-likely, or its number; untargeted by default."),
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of random defences; 5 by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in a forward; 20 by default.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Of the random draws; several give a mean and a spread.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="ATTACK", help="Compare all attacks with this one, image by image; by default neighbours in rank."
        ),
    ] = None,
    after: Annotated[
        int,
        typer.Option(
            min=0, help="Report the images after so many of the run's alone: those that no attack was chosen on."
        ),
    ] = 0,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the adversarial pictures, PNG of 8 bits. A run that did not keep them is computed anew.",
        ),
    ] = None,
    model_dir: Annotated[Path | None, typer.Option(help="RobustBench's checkpoints; models by default.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the functions that the file names as models.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run, its tables and pictures.")] = Path("runs/transfer"),
) -> None:
    """Do adversarial examples of one model fool others? Success by source, target and attack.

    The others are bare and behind defences. Called again, it goes on where it was interrupted; a folder that holds a
    run, without a specification or options of one, shows that run.
    """
    options = {
        "sources": source,
        "targets": target,
        "attacks": attack,
        "defences": defence,
        "eps": eps,
        "steps": sorted(set(steps or ())),
        "data": data,
        "select": select,
        "count": count,
        "skip": skip,
        "targeted": targeted,
        "draws": draws,
        "batch_size": batch_size,
        "seeds": seed,
        "zoo": None if model_dir is None else {"folder": str(model_dir)},
    }
    given = {key: value for key, value in options.items() if value not in (None, [])}
    with refusing():
        named, lines = ({}, {}) if spec is None else documents.read(spec)
        if spec is None and not given and (out / FACTS).exists():
            named = read(out).facts["specification"]
            if not named.get("targets"):
                raise ValueError(
                    f"the run in {out} carries no examples to targets; firstorder report {out} shows it. Name another "
                    "--out, or what is to be carried with --source and --target"
                )
        own = {"source": "" if spec is None else str(spec), "trust_code": trust_code or not named.get("models")}
        own["lines"] = {place: line for place, line in lines.items() if place[0] not in given}
        specification = specified({**({} if named else DEFAULTS), **named, **given}, keep=save is not None, **own)
        if compare is not None:
            transfer_report.require(compare, [entry.label for entry in specification.attacks])
        _require(after, specification.count)
        run = computed(specification, out, Engine(jobs=jobs, threads=threads))
        _require(after, run.facts["data"]["count"])
    found = transfer_outcomes.outcomes(run, after=after)
    if found:
        _print(found, transfer_report.weights(run))
        wrote(transfer_report.write(run, out, against=compare, after=after))
    if save is not None:
        with refusing():
            wrote(pictures.save(run, save)[:1])
    if failures(run):
        raise typer.Exit(1)


def specified(values: Mapping[str, Any], *, keep: bool = False, **words: Any) -> Specification:
    """What a transfer table computes: examples carried to targets, by attacks that have a radius.

    Args:
        values: of a specification. Models that sources and targets name need no entry of their own; the targets are by
            default all models; images are those that all models classify correctly unless `select` says otherwise.
        keep: whether the adversarial pictures of all images are kept.
        words: of `specify`.

    Raises:
        ValueError: as `specify`, or an attack without a radius.
    """
    listed = values.get("models") or []
    listed = listed if isinstance(listed, list | tuple) else [listed]
    known = {ModelEntry.model_validate(one).label: one for one in listed}
    sources, targets = (_listed(values.get(key)) for key in ("sources", "targets"))
    parts = [name for entry in sources for name in ([entry] if entry in known else entry.split("+"))]
    models = {**known, **{name: name for name in [*parts, *targets] if name not in known}}
    own: dict[str, Any] = {"models": list(models.values()), "targets": targets or list(models)}
    usual: dict[str, Any] = {"select": "all-correct", "pictures": 0}
    if "budget" not in values:
        usual["steps"] = (10,)
    if keep:
        own["pictures"] = values.get("count") or MOST
    found = specify({**usual, **values, **own}, **words)
    for entry in found.attacks:
        if not parse(entry.attack).bounded:
            raise ValueError(
                f"{entry.attack!r} has no radius to stay in, and transfer is measured at a given eps; name another"
            )
    return found


def _require(after: int, count: int | None) -> None:
    if count is not None and after >= count:
        raise ValueError(f"after={after} leaves none of the run's {count} images; lower it, or raise count")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _print(outcomes: list[transfer_outcomes.Outcome], weights: list[str]) -> None:
    steps = transfer_outcomes.at(outcomes)
    wide = len(outcomes[0].fooled) <= WIDE
    header, lines = (transfer_report.table if wide else transfer_report.long_table)(outcomes, steps)
    title = f"success, %, of {transfer_report.images(outcomes)}, T = {steps}"
    words = 2 if wide else 4
    for i in (2, 0):  # the radius and the source, which leave room for names where there is one
        found = {line[i] for line in lines if line[i]}
        if len(found) == 1:
            title += (", ε = " if i else ", from ") + found.pop()
            words -= i < words
            header, *lines = [[*line[:i], *line[i + 1 :]] for line in (header, *lines)]
    console.print(table(header, lines, title=title, words=words))
    for line in [*transfer_report.doubts(outcomes), *weights]:
        say(line)
