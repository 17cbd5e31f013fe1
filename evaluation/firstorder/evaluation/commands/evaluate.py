"""`firstorder evaluate`: many models x attacks x radii x examples, in cells that are never computed twice."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from firstorder.evaluation.commands.options import given, with_options
from firstorder.evaluation.commands.progress import Progress, duration
from firstorder.evaluation.names import documents, models, packaged
from firstorder.evaluation.names.code import runs_code
from firstorder.evaluation.reporting import summary, trust, verdicts
from firstorder.evaluation.reporting.terminal import console, refusing, say, table
from firstorder.evaluation.runs.computing import Engine, begin, compute
from firstorder.evaluation.runs.growth import Growth
from firstorder.evaluation.runs.growth import known as known_facts
from firstorder.evaluation.runs.plan import Plan, plan
from firstorder.evaluation.runs.specification import Specification, specify
from firstorder.evaluation.runs.store import FACTS, Run, Store, read

FLAGS = {
    "models": "--model",
    "attacks": "--attack",
    "seeds": "--seed",
    "sources": "--source",
    "targets": "--target",
    "defences": "--defence",
}
"""Options that are repeated, in the singular."""


def evaluate(
    spec: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file with the keys below, or the name of one of firstorder's own (evaluation, "
            "robustbench-linf); options override it."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; one that is there goes on, and grows.")] = None,
    only: Annotated[bool, typer.Option("--only", help="A run that is there becomes what is asked for alone.")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="A model or an attack that the run loses.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the functions that a file, or the run's folder, names as models.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the plan, write nothing.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who computes the cells.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; Ray starts here without one.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Of each Ray worker, also a fraction of one.")] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")] = False,
    **options: Any,
) -> None:
    """Evaluate models against attacks, resumably, on one machine or on a cluster.

    A run that was stopped goes on when it is called again. Models, attacks, radii and seeds that are new in a call are
    added to those that the run has.
    """
    keys = given(options, Specification)
    with refusing():
        asked = _specification(spec, out, keys, trust_code=trust_code)
        growth = Growth(only=only, remove=tuple(remove or ()), trust_code=trust_code)
        if dry_run:
            store = None if out is None else Store(out)
            chosen = plan(asked, store, growth)
            for line in chosen.notices:
                say(line)
            _print_plan(chosen, store, jobs)
            return
        if out is None:
            raise ValueError("a run needs a folder; name it with --out")
        who = Engine(name=engine, address=address, jobs=jobs, threads=threads, gpus=gpus)
        who.check()
        chosen, store = begin(asked, out, shlex.join(["firstorder", *sys.argv[1:]]), growth=growth, tell=say)
    if not (quiet or console.is_terminal):
        _print_plan(chosen, store, jobs)
    failed = _compute(chosen, store, who, _again(out, chosen.specification), quiet)
    _print_result(out)
    if failed:
        raise typer.Exit(1)


def _specification(path: Path | None, out: Path | None, keys: Mapping[str, Any], *, trust_code: bool) -> Specification:
    """What is asked for: a file and options, or the run's own specification and options."""
    values, lines = ({}, {}) if path is None else documents.read(path)
    source = "" if path is None else str(path)
    if path is None and out is not None and (out / FACTS).exists():
        facts, _ = known_facts(Store(out)) if keys else (read(out).facts, None)
        values, source = facts.get("specification", {}), str(out / FACTS)
    nested = {key: {**values.get(key, {}), **value} for key, value in keys.items() if isinstance(value, dict)}
    return specify(
        {**values, **keys, **nested},
        source=source,
        lines={place: line for place, line in lines.items() if place[0] not in keys},
        trust_code=trust_code or "models" not in values or "models" in keys,
    )


def _again(out: Path, specification: Specification) -> str:
    """The command with which a run goes on."""
    trust = " --trust-code" if any(runs_code(entry.model) for entry in specification.models) else ""
    return f"firstorder evaluate --out {shlex.quote(str(out))}{trust}"


def computed(specification: Specification, out: Path, engine: Engine, *, quiet: bool = False) -> Run:
    """The run of a specification in its folder, with a progress bar; what a command shows a view of.

    Raises:
        ValueError: anything that does not fit, before anything is written.
        typer.Exit: stopped by the keyboard.
    """
    growth = Growth(only=True)  # a view shows what is asked for
    engine.check()
    command = shlex.join(["firstorder", *sys.argv[1:]])
    chosen, store = begin(specification, out, command, growth=growth, tell=say)
    _compute(chosen, store, engine, f"the same command, or {_again(out, chosen.specification)}", quiet)
    return read(out)


def computed_by_data(
    names: Sequence[str],
    data: str | None,
    out: Path,
    engine: Engine,
    *,
    default: str | None = None,
    entries: Mapping[str, object] | None = None,
    **keys: object,
) -> list[Run]:
    """A run for all models that are attacked on the same images, in a folder of `out` that has the images' name.

    Args:
        names: of the models; packaged ones may bring their images.
        data: the images, for all models.
        out: the folder of folders.
        engine: who computes the cells.
        default: the images of models that bring none.
        entries: what the specification says of a model, where it says more than the name.
        keys: of the specification.

    Raises:
        ValueError: anything that does not fit, before anything is written.
    """
    groups: dict[str, list[object]] = {}
    for model in dict.fromkeys(names):
        models.finder(model)  # fails for a name that names nothing
        groups.setdefault(packaged.data_of(model, data, default), []).append((entries or {}).get(model, model))
    asked = [specify({**keys, "models": own, "data": images}) for images, own in groups.items()]
    folders = [out / re.sub(r"[^A-Za-z0-9._-]+", "-", images).strip("-.") for images in groups]
    if len(asked) > 1:
        for one in asked:
            plan(one)
    return [computed(one, folder, engine) for one, folder in zip(asked, folders, strict=True)]


def failures(run: Run) -> int:
    """Print what looked wrong, what failed, and how to try it again; how many cells did."""
    for doubt in run.doubts():
        say(f"doubtful: {doubt}")
    failed = run.failures()
    for cell, error in failed:
        message = f"failed: {cell.model}, {cell.attack}, examples {cell.start} to {cell.stop - 1}: {error}"
        say(message)
    if failed:
        again = _again(run.store.folder, Specification(**run.facts["specification"]))
        say(f"failed cells are tried again by: {again}")
    return len(failed)


def _compute(chosen: Plan, store: Store, engine: Engine, again: str, quiet: bool) -> int:
    """Compute what is not done, and show it; how many cells failed."""
    with Progress(chosen, quiet=quiet) as progress:
        try:
            return compute(
                chosen, store, engine, found=progress.found, computed=progress.computed, diagnosing=progress.diagnosing
            )
        except KeyboardInterrupt:
            count = sum(store.done(cell.key) for cell in chosen.cells)
            progress.close()
            typer.echo(
                f"stopped; {count} of {len(chosen.cells)} cells are done and kept. Go on with: {again}", err=True
            )
            raise typer.Exit(130) from None


def _print_plan(chosen: Plan, store: Store | None, jobs: int) -> None:
    counts = Counter((cell.model, cell.attack) for cell in chosen.cells)
    price = {one.name: "its own" if one.gradients is None else f"{one.gradients}" for one in chosen.adversaries}
    rows = [
        (known.entry.label, name, str(count), price[name])
        for known in chosen.models
        for name in price
        if (count := counts[known.entry.label, name])
    ]
    console.print(table(("model", "attack", "cells", "gradients per image"), rows, words=2))
    seconds = {known.entry.label: known.seconds for known in chosen.models}
    left = [cell for cell in chosen.cells if store is None or not store.done(cell.key)]
    estimates = [seconds[cell.model] * (chosen.gradients(cell) or 0) for cell in left]
    unknown = any(chosen.gradients(cell) is None for cell in left)
    total = sum(chosen.gradients(cell) or 0 for cell in left)
    models = sum(store is None or not store.done(cell.key) for cell in chosen.diagnoses)
    diagnosed = f"{models} model{'s are' if models > 1 else ' is'} diagnosed first. " if models else ""
    say(
        f"{len(chosen.cells)} cells, {len(chosen.cells) - len(left)} of them done; {chosen.examples.count} examples "
        f"of shape {tuple(chosen.examples.shape)}. {diagnosed}Left: at most {total} gradients, about "
        f"{duration(sum(estimates) / jobs)} with {jobs} process{'es' if jobs > 1 else ''}"
        f"{', and what AutoAttack takes' if unknown else ''}."
    )


def _print_result(out: Path) -> None:
    run = read(out)
    rows = summary.load(run)
    board = summary.leaderboard(rows, run.facts)
    made = Table(box=SIMPLE_HEAD)
    made.add_column("model", overflow="fold")
    for heading in ("radius", "examples", "clean", "robust", "95 %"):
        made.add_column(heading, justify="right", no_wrap=True)
    reported = {known["name"]: known.get("reported") for known in run.facts["models"]}
    shown = len(run.facts["specification"]["eps"]) == 1 and any(value is not None for value in reported.values())
    if shown:
        made.add_column("reported", justify="right", no_wrap=True)
    made.add_column("strongest attack", overflow="fold")
    for line in board:
        low, high = line.robust.interval
        strongest = line.attacks[0]
        made.add_row(
            escape(line.model),
            f"{line.eps:.4g}",
            str(line.robust.count),
            f"{100 * line.clean.value:.2f}",
            f"{100 * line.robust.value:.2f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            *(["" if reported[line.model] is None else f"{reported[line.model]:.2f}"] if shown else []),
            escape(f"{strongest.attack} ({100 * strongest.robust.value:.2f})"),
        )
    if board:
        console.print(made)
    for error in verdicts.errors(rows, run.facts):
        say(f"error: {error}")
    for note in verdicts.notes(rows, run.facts):
        say(note)
    for doubt in [*trust.lines(trust.panels(run, rows)), *summary.doubts(board)]:
        say(f"doubtful: {doubt}")
    failures(run)
    say(f"kept in {out}; a page of it: firstorder report {out}")


with_options(evaluate, Specification, flags=FLAGS)
