"""The verdict beside AutoAttack and single attacks, on nets that others trained: what each finds, and at what price.

    python -m firstorder.evaluation.studies.verdict --models DIR --mnist mnist:ROOT --cifar10 FILE.npz [--net NAME ...]

DIR holds a file NAME.safetensors for every net and `architectures.py`, whose function `load(path)` makes the module;
its code is run. The metadata of a file, under "zoo", name its data, norm and radius. `--net` may
also name a packaged robust model. Every net is a run of its own in the folder of the results: called again, the study
goes on, also with other nets or attacks.

In `verdicts/` of DIR may be what complete verifiers say of single images; it is converted to limits, and an attack that
breaks a proven image is reported as an error. With `--indices` the study is on the images of such a file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from firstorder.evaluation import evaluate
from firstorder.evaluation.names.numbers import radius as size
from firstorder.evaluation.reporting import drawing, figures, summary, verdicts
from firstorder.evaluation.reporting.tables import csv_text, markdown, radius
from firstorder.evaluation.reporting.terminal import console, refusing, say, table, wrote
from firstorder.evaluation.runs.computing import Engine
from firstorder.evaluation.runs.limits import COLUMNS, Limit
from firstorder.evaluation.runs.store import Run
from firstorder.evaluation.studies.published import Net, chosen, limits, nets
from firstorder.files import write_text

AUTOATTACK = "AutoAttack"

ATTACKS: dict[str, str] = {
    AUTOATTACK: "autoattack",
    "PMA-100": 'apgd:steps=100,loss="probability-margin"',
    "PGD-100 x 10": "pgd:steps=100,restarts=10,random_start=true,alpha=eps/4",
    "Verdict 0": "verdict:effort=0",
    "Verdict 1": "verdict:effort=1",
    "Verdict 2": "verdict:effort=2",
}
"""By the name in the table."""

HEADER = (
    "net", "norm", "eps", "images", "attack", "robust", "only AutoAttack", "only this", "forwards", "backwards",
    "passes ratio", "backwards ratio", "proven",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """An attack on a net.

    Attributes:
        net, norm, eps: what is attacked, and within which ball.
        images: how many.
        attack: its name.
        robust: the share of all images that withstand it.
        missed: how many images AutoAttack alone of the two breaks; None without AutoAttack.
        more: how many it alone breaks; likewise.
        forwards, backwards: the mean of all images, also those that are misclassified as they are.
        passes_ratio, backwards_ratio: how many times as many forwards and backwards, or backwards, AutoAttack takes.
        proven: the share of all images that is proven robust; None where that is known of none.
    """

    net: str
    norm: str
    eps: float
    images: int
    attack: str
    robust: float
    missed: int | None
    more: int | None
    forwards: float
    backwards: float
    passes_ratio: float | None
    backwards_ratio: float | None
    proven: float | None


def specification(
    net: Net,
    spec: str,
    attacks: Iterable[str],
    folder: Path,
    *,
    known: Sequence[Limit] = (),
    places: Sequence[int] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """The run of a net; the files that it needs are written into `folder`.

    Args:
        net: which.
        spec: the data.
        attacks: of `ATTACKS`.
        folder: of the study.
        known: what is known of images, by their place in the test set.
        places: of the images there; None for all in order.
        keys: of the specification, beside.
    """
    where = {place: i for i, place in enumerate(places)} if places is not None else None
    lines = [one if where is None else one._replace(example=where.get(one.example, -1)) for one in known]
    first, count = keys.get("skip") or 0, keys.get("count")
    lines = [one for one in lines if one.example >= first and (count is None or one.example < first + count)]
    path = folder / "limits" / f"{net.name}.csv"
    if lines:
        write_text(path, csv_text(COLUMNS, [(e, f"{eps!r}", int(p), int(b)) for e, eps, p, b in lines]))
    return {
        "models": {"model": net.name if net.path is None else _maker(net.path, folder), "name": net.name},
        "data": spec,
        "norm": net.norm,
        "eps": net.eps,
        "attacks": [{"attack": ATTACKS[name], "name": name} for name in attacks],
        "limits": str(path) if lines else None,
        "pictures": 0,
        "diagnose": False,
        **keys,
    }


def _maker(path: Path, folder: Path) -> str:
    """Write a file whose function makes the net of `path`; returns what names it in a specification."""
    maker = folder / "models" / f"{path.stem.replace('.', '_')}.py"
    library = path.parent / "architectures.py"
    write_text(
        maker,
        "from importlib.util import module_from_spec, spec_from_file_location\n\n"
        f"found = spec_from_file_location('architectures', {str(library)!r})\n"
        "library = module_from_spec(found)\nfound.loader.exec_module(library)\n\n\n"
        f"def net():\n    return library.load({str(path)!r})\n",
    )
    return f"{maker}:net"


def lines(run: Run) -> list[Line]:
    """What a run of the study found: a line for every attack that is finished."""
    rows, facts = summary.load(run), run.facts
    rows = rows[rows["seed"] == facts["specification"]["seeds"][0]]
    (net,), (eps,) = facts["models"], facts["specification"]["eps"]
    own = {name: part.set_index("example") for name, part in rows.groupby("attack")}
    count = facts["data"]["count"]
    done = {name: own[name] for name in summary.names(facts, "attacks") if name in own and len(own[name]) == count}
    proven = {row[0] for row in facts["limits"] or () if row[2] and row[1] >= eps * (1 - 1e-5)}
    best = done.get(AUTOATTACK)
    return [
        Line(
            net=net["name"],
            norm=facts["specification"]["norm"],
            eps=eps,
            images=count,
            attack=name,
            robust=float((part["reach"] > eps).mean()),
            missed=None if best is None else int(((best["reach"] <= eps) & (part["reach"] > eps)).sum()),
            more=None if best is None else int(((best["reach"] > eps) & (part["reach"] <= eps)).sum()),
            forwards=float(part["forwards"].mean()),
            backwards=float(part["backwards"].mean()),
            passes_ratio=None if best is None else _ratio(best, part, ["forwards", "backwards"]),
            backwards_ratio=None if best is None else _ratio(best, part, ["backwards"]),
            proven=len(proven) / count if proven else None,
        )
        for name, part in done.items()
    ]


def _ratio(one: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> float | None:
    below = float(other[columns].sum().sum())
    return float(one[columns].sum().sum()) / below if below else None


def picture(found: Sequence[Line]) -> Figure:
    """Robust accuracy against passes: a panel for every net, the proven share as a dashed line."""
    names, palette = list(dict.fromkeys(line.net for line in found)), figures.colors(tuple(ATTACKS))
    wide = min(len(names), 4)
    tall = -(-len(names) // wide)
    figure = Figure(figsize=(3.4 * wide, 1.0 + 2.7 * tall), layout="constrained")
    panels: Any = figure.subplots(tall, wide, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        own = [line for line in found if line.net == name]
        for line in own:
            passes = line.forwards + line.backwards
            axes.scatter([passes], [100 * line.robust], color=palette[line.attack], s=36, label=line.attack, zorder=3)
        if own[0].proven is not None:
            axes.axhline(100 * own[0].proven, linestyle="--", linewidth=1, color="gray")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name}\n{own[0].norm}, ε = {radius(own[0].eps)}, {own[0].images} images", fontsize=8)
        axes.set_xlabel("forward + backward passes per image", fontsize=8)
        axes.set_ylabel("robust accuracy, %", fontsize=8)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, 2 * wide), fontsize=8, frameon=False
    )
    return figure


def write(found: Sequence[Line], notes: Sequence[str], out: Path) -> list[Path]:
    """Write the table as CSV and Markdown, and the picture; returns the paths."""
    text = f"{markdown(HEADER, map(_cells, found), words=5)}\n"
    for name, content in {
        "verdict.csv": csv_text(HEADER, [tuple(vars(line).values()) for line in found]),
        "verdict.md": text + "".join(f"\n{note}.\n" for note in notes),
    }.items():
        write_text(out / name, content)
    with drawing.style():
        drawing.save(picture(found), out, "verdict")
    return [out / name for name in ("verdict.csv", "verdict.md", "verdict.png", "verdict.svg")]


def _cells(line: Line) -> list[str]:
    found = [line.net, line.norm, radius(line.eps), str(line.images), line.attack, f"{100 * line.robust:.2f}"]
    found += ["" if number is None else str(number) for number in (line.missed, line.more)]
    numbers = (line.forwards, line.backwards, line.passes_ratio, line.backwards_ratio)
    found += ["" if number is None else f"{number:.1f}" for number in numbers]
    return [*found, "" if line.proven is None else f"{100 * line.proven:.2f}"]


def main(
    models: Annotated[Path, typer.Option(help="Folder with NAME.safetensors and architectures.py, whose code is run.")],
    mnist: Annotated[
        str | None, typer.Option(help="The images, as in an evaluation: mnist:ROOT, or an .npz file.")
    ] = None,
    fashion_mnist: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    cifar10: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    net: Annotated[
        list[str] | None, typer.Option(help="Which nets; by default all of the folder whose images are given.")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help=f"Which of {', '.join(ATTACKS)}; all by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 500,
    skip: Annotated[int, typer.Option(min=0, help="Images at the start to leave out.")] = 0,
    indices: Annotated[
        Path | None, typer.Option(help="CSV with set, test_index and label: these images alone.")
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radius, as 0.3 or 8/255; by default that of each net.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; torch chooses by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs, tables and the picture.")] = Path("runs/verdict"),
) -> None:
    """Print what every attack finds on every net, and at what price."""
    data = {"mnist": mnist, "fashion-mnist": fashion_mnist, "cifar10": cifar10}
    found, notes = [], []
    with refusing():
        unknown = [name for name in attack or () if name not in ATTACKS]
        if unknown:
            raise ValueError(f"--attack {unknown[0]}: choose {', '.join(ATTACKS)}")
        every = nets(models, net or ())
        every = [one for one in every if net or data.get(one.data)]
        missing = sorted({one.data for one in every if not data.get(one.data)})
        if missing or not every:
            raise ValueError(f"no images are given; add {', '.join(f'--{name}' for name in missing or data)}")
        known = limits(models / "verdicts")
        for one in every:
            one = one if eps is None else replace(one, eps=size(eps, name="eps"))
            spec, places = str(data[one.data]), None
            if indices is not None:
                spec, places = chosen(spec, indices, one.data, out)
            keys = {"count": count, "skip": skip, "seeds": seed}
            asked = specification(
                one,
                spec,
                [name for name in ATTACKS if not attack or name in attack],
                out,
                known=known.get(one.name, ()),
                places=places,
                **keys,
            )
            part = "all" if indices is None else indices.stem
            folder = out / "runs" / f"{one.name}-{radius(one.eps).replace('/', '_')}-{part}-{skip}-{count}-{seed}"
            run = evaluate(asked, folder, trust_code=True, engine=Engine(jobs=jobs, threads=threads)).run
            own = lines(run)
            found += own
            loaded = summary.load(run)
            notes += [f"error: {line}" for line in verdicts.errors(loaded, run.facts)]
            notes += verdicts.notes(loaded, run.facts)
            notes += [f"failed: {failure.cell.attack} on {one.name}: {failure.error}" for failure in run.failures()]
            shown = [(line.attack, *_cells(line)[5:8], f"{line.forwards + line.backwards:.1f}") for line in own]
            console.print(table((*HEADER[4:8], "passes"), shown, title=one.name))
    for note in notes:
        say(note)
    if found:
        wrote(write(found, notes, out))


if __name__ == "__main__":
    typer.run(main)
