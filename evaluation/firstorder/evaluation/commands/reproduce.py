"""`firstorder reproduce`: the tables and figures of the papers, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from firstorder.attacks.distribution import DISTRIBUTION
from firstorder.evaluation.commands.evaluate import computed, failures
from firstorder.evaluation.commands.transfer import specified
from firstorder.evaluation.names.citations import PAPERS
from firstorder.evaluation.names.papers import Item, item, items
from firstorder.evaluation.reporting import paper_page, paper_tables, readings
from firstorder.evaluation.reporting.paper_tables import Table
from firstorder.evaluation.reporting.readings import Result
from firstorder.evaluation.reporting.terminal import bars, console, refusing, say, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.specification import specify
from firstorder.files import replacing, write_text

LIST, PAGE, RECORD = "list", "page", "record"


def reproduce(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[list|page|record|ITEM...]",
            help="list prints all items; page writes docs/papers.md; record keeps what was computed for both; else "
            "items to compute, qg-fig4. list by default.",
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models in place of the item's.")] = None,
    data: Annotated[str | None, typer.Option(help="Images in place of the item's, as for evaluate and train.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many images.")] = None,
    small: Annotated[bool, typer.Option("--small", help="At the smallest size, which decides nothing.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the functions that are named as models.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder with a folder for each item.")] = Path("runs/papers"),
) -> None:
    """Check the package against its papers, table by table and figure by figure.

    An item is computed on the models named, resumably; a table, a picture, and a reading of every claim are written.
    """
    words = what or [LIST]
    with refusing():
        if words == [LIST]:
            _list(out)
            return
        if words == [RECORD]:
            wrote([paper_page.record(out)])
            return
        if words == [PAGE]:
            path = Path("docs/papers.md")
            write_text(path, paper_page.page())
            wrote([path])
            return
        chosen = {name: item(name) for name in words}
        for name, one in chosen.items():
            if one.kind == "command":
                raise ValueError(f"{name} is {_elsewhere(one)}")
        given = {"models": model, "data": data, "count": count}
        keys = {key: value for key, value in given.items() if value}
        for name, one in chosen.items():
            tables = _computed(
                name, one, keys, out / name, small=small, trust_code=trust_code, jobs=jobs, threads=threads
            )
            found = readings.result(one, tables, small=small, count=count, version=version(DISTRIBUTION))
            _print(name, one, found)
            wrote(readings.write(name, one, tables, found, out / name))


def _elsewhere(one: Item) -> str:
    """How an item that the mechanism does not compute is shown."""
    if one.command:
        return f"shown by a command of its own: {one.command}"
    return f"out of reach: {one.reason}"


def _computed(
    name: str,
    one: Item,
    keys: Mapping[str, Any],
    out: Path,
    *,
    small: bool,
    trust_code: bool,
    jobs: int,
    threads: int | None,
) -> list[Table]:
    """The tables of an item, computed where they are not yet.

    Raises:
        ValueError: an item that needs images or a model that are not named; what a run or a study refuses.
    """
    missing = {"--data": "data", "--model": "models"}.get(one.needs.partition(" ")[0])
    if missing is not None and missing not in keys and not small:
        raise ValueError(f"{name} needs {one.needs}; add it")
    if one.kind == "study":
        return [_study(one, keys, out, small=small, trust_code=trust_code, jobs=jobs, threads=threads)]
    if one.kind == "measurement":
        return _measured(one, keys, out, small=small, threads=threads)
    own = dict(keys)
    if one.kind == "transfer" and "models" in own:
        own |= {"sources": own["models"], "targets": own.pop("models")}
    values = {"diagnose": False, "pictures": 0, **one.specification, **(one.small if small else {}), **own}
    words: dict[str, Any] = {"source": name, "trust_code": trust_code or "models" in keys}
    specification = specified(values, **words) if one.kind == "transfer" else specify(values, **words)
    run = computed(specification, out / "run", Engine(jobs=jobs, threads=threads))
    if failures(run):
        raise typer.Exit(1)
    if one.kind == "transfer":
        return paper_tables.successes(run)
    return paper_tables.sizes(run) if one.kind == "norms" else paper_tables.accuracies(run, worst=one.worst)


def _study(
    one: Item,
    keys: Mapping[str, Any],
    out: Path,
    *,
    small: bool,
    trust_code: bool,
    jobs: int,
    threads: int | None,
) -> Table:
    from firstorder.evaluation.training import measures, report, study

    given = dict(keys)
    models = given.pop("models", [])
    if len(models) > 1:
        raise ValueError(f"a study trains one network; name one of {', '.join(models)}")
    base = {**given, **({"model": models[0]} if models else {})}
    if "count" in base:
        base["examples"] = base.pop("count")
    chosen = study.Study(**one.specification)
    if small:
        own = dict(one.small)
        chosen = chosen.model_copy(update={"seeds": tuple(own.pop("seeds", chosen.seeds))})
        base = {**own, **base}
    runs = (out.parent / one.runs if one.runs else out) / "run"
    cells = study.cells(chosen, runs, trust_code=trust_code or bool(models), **base)
    with bars() as bar:
        task = bar.add_task("training", total=len(cells))
        outcomes = study.execute(
            cells, jobs=jobs, threads=threads or 1, progress=lambda cell: bar.update(task, advance=1)
        )
    wrote(study.write(study.summary(outcomes, chosen.paper), outcomes, out))
    if one.report:
        first = [cell.folder for cell in cells if cell.configuration.seed == chosen.seeds[0]]
        wrote(report.write([report.read(folder) for folder in first], out / "report")[:1])
    return study.table(outcomes, measures.named([row for claim in one.claims for row in claim.rows]))


def _measured(one: Item, keys: Mapping[str, Any], out: Path, *, small: bool, threads: int | None) -> list[Table]:
    import torch

    from firstorder.evaluation.studies.measurements import measure

    if threads is not None:
        torch.set_num_threads(threads)
    values = {**one.specification, **(one.small if small else {}), **keys}
    models = values.pop("models", [])
    if len(models) > 1:
        raise ValueError(f"this measures one network; name one of {', '.join(models)}")
    found = measure(values.pop("measure"), {**values, **({"model": models[0]} if models else {})})
    for name, figure in found.figures.items():
        with replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    wrote([out / f"{name}.png" for name in found.figures])
    return found.tables


def _print(name: str, one: Item, found: Result) -> None:
    for shown, own in zip(found.tables, found.findings, strict=True):
        say(f"{name}: {shown['title']}")
        console.print(table(("row", shown["unit"], "paper"), readings.figures(one, shown)))
        console.print(table(readings.CLAIM, [readings.words(finding) for finding in own]))
    size = " (at the smallest size, which decides nothing)" if found.small else ""
    say(f"{one.item}: {found.reading}{size}")


def _list(out: Path) -> None:
    """Print all items, with what was found in `out` or before."""
    kept, counts = paper_page.recorded(), Counter[str]()
    header = ("name", "item", "shows", "cost", "reading")
    for key, short in paper_page.SHORT.items():
        rows = []
        for name, one in items().items():
            if one.paper != key:
                continue
            own = readings.kept(name, out / name)
            if own is None or own["small"]:
                own = kept.get(name)
            reading = own["reading"] if own else one.reading or "not computed"
            counts[reading] += 1
            rows.append((name, one.item, one.shows, one.cost, reading))
        say(f"{PAPERS[key].title} ({short})")
        console.print(table(header, rows, words=len(header)))
    message = ", ".join(f"{count} {reading}" for reading, count in counts.most_common())
    console.print(f"{sum(counts.values())} items: {message}; costs are for one core", highlight=False)
