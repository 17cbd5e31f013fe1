"""The report of a run: a page that needs nothing else, its text, and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from firstorder.attacks import UNDECIDED
from firstorder.evaluation.names.packaged import ASSETS
from firstorder.evaluation.reporting import (
    figures,
    summary,
    transfer_figures,
    transfer_outcomes,
    transfer_report,
    trust,
    verdicts,
)
from firstorder.evaluation.reporting.figures import TOGETHER, Picture
from firstorder.evaluation.reporting.summary import Curve, Rate, Score
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
PICTURED = ["model", "target", "attack", "eps", "example", "label", "clean_label", "adversarial_label", "adversarial"]


@dataclass(frozen=True)
class Drawing:
    """A figure as the page shows it.

    Attributes:
        name: of its files, without suffix.
        svg: to be put into the page.
        width: in inches.
        subject: the model and the radius that it is about.
        title, caption: what it shows, in plain text.
    """

    name: str
    svg: Markup
    width: float
    subject: str
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A model's part of the report.

    Attributes:
        fact: what the run says of the model.
        anchor: its address in the page.
        radii: the model at every radius, each with its figures.
        figures: of all radii.
    """

    fact: dict[str, Any]
    anchor: str
    radii: list[tuple[Score, list[Drawing]]] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)


def write(run: Run, out: Path) -> list[Path]:
    """Write report.html, report.md and figures/ into `out` and return the paths of the first two and of the figures."""
    with figures.style():
        page = _Page(run, out / FIGURES)
    context = page.context()
    for name, environment in ((PAGE, _environment(autoescape=True)), (TEXT, _environment(finalize=escaped))):
        write_text(out / name, environment.get_template(f"evaluation{Path(name).suffix}").render(context))
    return [
        out / PAGE,
        out / TEXT,
        *(out / FIGURES / f"{name}.{kind}" for name in page.drawn for kind in ("svg", "png")),
    ]


def escaped(value: object) -> str:
    """A value as text of a line of Markdown: nothing in it is markup, unless it says so."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)


class _Page:
    """Everything that is on the page; its figures are written as it is made."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.facts, self.folder = run, run.facts, folder
        self.drawn: list[str] = []
        self.rows = summary.load(run)
        self.scores = summary.leaderboard(self.rows, self.facts)
        self.trust = trust.panels(run, self.rows)
        self.palette = figures.colors(summary.names(self.facts, "attacks"))
        self.sections = [self._section(i, fact) for i, fact in enumerate(self.facts["models"], 1)]
        carried = (self.rows["model"] != self.rows["target"]).any() or self.facts["specification"].get("defences")
        self.outcomes = transfer_outcomes.outcomes(self.run) if carried else []
        self.together, self.transfer = self._together(), self._transfer()

    def context(self) -> dict[str, Any]:
        """What the templates know."""
        return {
            "facts": self.facts,
            "scores": self.scores,
            "sections": self.sections,
            "palette": self.palette,
            "together": self.together,
            "transfer": self.transfer,
            "carried": transfer_report.tables(self.outcomes),
            "failures": self.run.failures(),
            "trust": self.trust,
            "doubts": [*trust.lines(self.trust), *summary.doubts(self.scores), *self.run.doubts()],
            "errors": verdicts.errors(self.rows, self.facts),
            "notes": verdicts.notes(self.rows, self.facts),
            "done": len(self.run.done()),
            "planned": len(self.run.cells),
            "several_seeds": len(self.facts["specification"]["seeds"]) > 1,
            "datatables": Markup((ASSETS / "vendor/datatables/dataTables.min.js").read_text(encoding="utf-8")),
            "license": Markup((ASSETS / "vendor/datatables/License.txt").read_text(encoding="utf-8")),
            "TOGETHER": TOGETHER,
        }

    def _draw(self, figure: Figure, name: str, subject: str, title: str, caption: str) -> Drawing:
        self.drawn.append(name)
        svg = Markup(figures.save(figure, self.folder, name))  # matplotlib escapes text in SVG
        return Drawing(name, svg, figure.get_figwidth(), subject, title, caption)

    def _section(self, i: int, fact: dict[str, Any]) -> Section:
        model = fact["name"]
        anchor = "-".join(["model", str(i), *re.findall("[a-z0-9]+", model.lower())])[:48].rstrip("-")
        section = Section(fact, anchor)
        scores = [score for score in self.scores if score.model == model]
        if not scores:
            return section
        curves = summary.radius_curves(self.rows, self.facts, model)
        chart = figures.radius_chart(_named(curves), self.palette, summary.radii(self.facts))
        known = "Attacks with a radius are known at the marked radii, minimum-norm attacks at every radius."
        known = known if any(curve.stairs for curve in curves) else "Known at the marked radii."
        caption = f"{known} The thick line is the worst case of every example. On {curves[-1].count} examples."
        section.figures.append(self._draw(chart, f"{anchor}-radius", model, "Robust accuracy by radius", caption))
        for score in scores:
            section.radii.append((score, self._at(score, anchor)))
        section.figures.extend(self._pictures(scores[-1], anchor))
        return section

    def _at(self, score: Score, anchor: str) -> list[Drawing]:
        model, eps = score.model, score.eps
        where, name = f"{model}, ε = {radius(eps)}", f"{anchor}-eps-{summary.radii(self.facts).index(eps) + 1}"
        curves = summary.query_curves(self.rows, self.facts, model, eps)
        caption = (
            "Examples that are robust after so many passes each; the thick line is the best attack for every example."
        )
        if not all(curve.exact for curve in curves):
            caption += " Dashed: an attack that goes on after its success; its examples fall only where it ends."
        chart = figures.query_chart(_named(curves), self.palette)
        drawings = [self._draw(chart, f"{name}-passes", where, "Robustness by passes", caption)]
        shared = summary.overlap(self.rows, self.facts, model, eps)
        if shared.sets:
            caption = (
                "How many examples are broken by exactly the attacks that are dotted below. Beside an attack's name: "
                f"how many it breaks in all. {shared.robust} examples withstand every attack at this radius."
            )
            chart = figures.overlap_chart(shared, self.palette)
            drawings.append(
                self._draw(chart, f"{name}-overlap", where, "Which attacks break the same examples", caption)
            )
        return drawings

    def _together(self) -> list[Drawing]:
        models, radii = summary.names(self.facts, "models"), summary.radii(self.facts)
        palette = figures.colors(models)
        curves = {model: summary.radius_curves(self.rows, self.facts, model)[-1:] for model in models}
        known = {model: found[0] for model, found in curves.items() if found}
        last = [score for score in self.scores if score.eps == self.scores[-1].eps]
        if not last:
            return []
        caption = "The worst case of every example, all attacks and seeds together."
        chart = figures.radius_chart(known, palette, radii)
        drawings = [self._draw(chart, "models-radius", "all models", "Robust accuracy by radius", caption)]
        eps = f"ε = {radius(last[0].eps)}"
        chart = figures.attack_chart(last, palette)
        caption = "Every attack on its own and all together; bars are 95 % intervals."
        return [
            *drawings,
            self._draw(chart, "models-attacks", "all models", f"Robust accuracy by attack, {eps}", caption),
        ]

    def _transfer(self) -> list[Drawing]:
        found = [*self._frontier(), *self._defences()]
        if not (self.rows["model"] != self.rows["target"]).any():
            return found
        models, attacks = summary.names(self.facts, "models"), summary.names(self.facts, "attacks")
        for i, eps in enumerate(summary.radii(self.facts), 1):
            matrices = {attack: summary.transfer(self.rows, self.facts, attack, eps) for attack in attacks}
            matrices = {attack: m for attack, m in matrices.items() if any(rate for line in m for rate in line)}
            if matrices:
                caption = (
                    "Percent of the examples that both models classify correctly; on the diagonal, the model itself."
                )
                chart = figures.transfer_chart(matrices, models)
                title = f"Transfer at ε = {radius(eps)}"
                found.append(self._draw(chart, f"transfer-eps-{i}", "all models", title, caption))
        return found

    def _frontier(self) -> list[Drawing]:
        chart = transfer_figures.priced_chart(self.outcomes)
        if chart is None:
            return []
        caption = (
            "Success against the gradients that an image took, on targets that the examples were not made on. The step "
            "line is the best success at that price or below, and its attacks are named; bars span the seeds."
        )
        return [self._draw(chart, "frontier", "all models", "Success against gradients", caption)]

    def _defences(self) -> list[Drawing]:
        if not self.outcomes or not self.facts["specification"].get("defences"):
            return []
        caption = (
            "Percent of all examples that the target takes for another class in the end, within the radius; behind a "
            "random defence the share of draws. The line of the clean examples shows what the defence itself costs."
        )
        chart, title = transfer_figures.defence_chart(self.outcomes), "Targets behind defences"
        return [self._draw(chart, "defences", "all models", title, caption)]

    def _pictures(self, score: Score, anchor: str, *, most: int = 4, attacks: int = 3) -> list[Drawing]:
        shape = tuple(self.facts["data"]["shape"])
        kept = self._kept(score) if len(shape) == 3 and shape[0] in (1, 3) else pd.DataFrame()
        if kept.empty:
            return []
        strongest = [result.attack for result in score.attacks if (kept["attack"] == result.attack).any()][:attacks]
        shown = kept[kept["attack"].isin(strongest)]
        ranked = shown.groupby("example").agg(right=("right", "first"), count=("attack", "size")).reset_index()
        chosen = ranked.sort_values(["right", "count", "example"], ascending=[False, False, True])["example"][:most]
        shown = shown[shown["example"].isin(chosen)]
        strongest = [attack for attack in strongest if (shown["attack"] == attack).any()]
        grid: list[list[Picture | None]] = []
        for example in sorted(chosen):
            original = self.run.examples(int(example), int(example) + 1)[0].numpy()
            own = {row.attack: row for row in shown[shown["example"] == example].itertuples()}
            grid.append([self._picture(own[a], original) if a in own else None for a in strongest])
        largest = max(float(np.abs(p.image - p.original).max()) for line in grid for p in line if p is not None)
        factor = _two_digits(0.5 / largest) if largest else 1.0
        caption = (
            f"Each example as it is, then what an attack made of it with the difference, times {factor:g}, on grey. "
            "Below a picture: what the model takes it for, green where it is right."
        )
        chart, title = figures.picture_chart(grid, factor), f"Pictures, ε = {radius(score.eps)}"
        return [self._draw(chart, f"{anchor}-pictures", score.model, title, caption)]

    def _kept(self, score: Score) -> pd.DataFrame:
        """The rows with a picture, of the model at the radius, one for every example and attack."""
        parts = []
        for table in self.run.tables(PICTURED):
            part = table.filter(table["adversarial"].is_valid()).to_pandas()
            own = (part["model"] == score.model) & (part["target"] == score.model)
            parts.append(part[own & ((part["eps"] == score.eps) | part["eps"].isna())])
        kept = pd.concat(parts).drop_duplicates(["example", "attack"])
        return kept.assign(right=kept["label"] == kept["clean_label"])

    def _picture(self, row: Any, original: np.ndarray[Any, Any]) -> Picture:
        image = np.frombuffer(row.adversarial, dtype="<f4").reshape(original.shape)
        labels = (self._class(label) for label in (row.label, row.clean_label, row.adversarial_label))
        return Picture(row.attack, original, image, *labels)

    def _class(self, label: int) -> str:
        classes = self.facts["data"]["classes"]
        if label == UNDECIDED:
            return "NaN"
        return classes[label] if label < len(classes) else str(label)


def _named(curves: Sequence[Curve]) -> dict[str, Curve]:
    return {curve.attack or TOGETHER: curve for curve in curves}


def _two_digits(value: float) -> float:
    """The largest number of two significant digits that is not above a positive `value`."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return float(f"{floor(value / unit + 1e-9) * unit:.12g}")


def _environment(**options: Any) -> Environment:
    loader = PackageLoader("firstorder.evaluation")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters.update(
        radius=radius,
        percent=lambda rate: f"{100 * rate.value:.1f}",
        interval=_interval,
        number=lambda value, form: format(value, form) if isfinite(value) else "–",
        short=lambda digest: digest[:12],
        value=_value,
        trust_html=trust.html,
        trust_markdown=lambda panels: trust.markdown(panels, escaped),
    )
    return environment


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * low:.1f} – {100 * high:.1f}"


def _value(value: object) -> str:
    """A plain value of the specification in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None or value == "" else f"{value:.6g}" if isinstance(value, float) else str(value)
