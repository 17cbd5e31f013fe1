"""The report of a run: a page, what of its examples is beside it, its text, and its figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from firstorder.evaluation.reporting import (
    drawing,
    export,
    figures,
    leaderboard,
    provenance,
    stills,
    summary,
    transfer_figures,
    transfer_outcomes,
    transfer_report,
    trust,
    verdicts,
)
from firstorder.evaluation.reporting.document import Drawing, Heat, environment
from firstorder.evaluation.reporting.figures import TOGETHER
from firstorder.evaluation.reporting.gallery import INLINE, Gallery, gallery
from firstorder.evaluation.reporting.record import bibtex
from firstorder.evaluation.reporting.sheets import copies
from firstorder.evaluation.reporting.summary import Curve, Score
from firstorder.evaluation.reporting.tables import radius
from firstorder.evaluation.runs.store import Run
from firstorder.files import write_text

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"


@dataclass(frozen=True)
class Section:
    """A model's part of the report.

    Attributes:
        fact: what the run says of the model.
        anchor: its address in the page.
        radii: the model at every radius, each with its figures.
        figures: of all radii.
        pictures: of some examples, for a page without a script.
    """

    fact: dict[str, Any]
    anchor: str
    radii: list[tuple[Score, list[Drawing]]] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)
    pictures: list[Drawing] = field(default_factory=list)


def write(
    run: Run, out: Path, *, info: Mapping[str, Mapping[str, Any]] | None = None, inline: int = INLINE
) -> list[Path]:
    """Write report.html, report.md, figures/ and, where the examples need it, examples/ into `out`; returns the paths.

    Args:
        run: finished or not.
        out: the folder.
        info: RobustBench's model_info, by the model's name in the run; see `leaderboard.model_info`.
        inline: bytes of examples up to which they are a part of the page.
    """
    with drawing.style():
        page = _Page(run, out / FIGURES, info or {})
    shown = gallery(run, out, inline=inline)
    context = page.context(shown)
    for name, templates in ((PAGE, environment(autoescape=True)), (TEXT, environment(finalize=escaped))):
        templates.filters.update(markup=Markup, trust_html=trust.html)
        templates.filters.update(trust_markdown=lambda panels: trust.markdown(panels, escaped))
        write_text(out / name, templates.get_template(f"evaluation{Path(name).suffix}").render(context))
    return [
        out / PAGE,
        out / TEXT,
        *(out / FIGURES / f"{name}.{kind}" for name in page.drawn for kind in ("svg", "png")),
        *shown.paths,
    ]


def escaped(value: object) -> str:
    """A value as text of a line of Markdown: nothing in it is markup, unless it says so."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)


class _Page:
    """Everything that is on the page; its figures are written as it is made."""

    def __init__(self, run: Run, folder: Path, info: Mapping[str, Mapping[str, Any]]) -> None:
        self.run, self.facts, self.folder = run, run.facts, folder
        self.drawn: list[str] = []
        self.rows = summary.load(run)
        self.scores = summary.leaderboard(self.rows, self.facts)
        self.trust = trust.panels(run, self.rows)
        self.board = leaderboard.board(self.rows, self.facts, self.scores, info, self.trust)
        self.palette = figures.colors(summary.names(self.facts, "attacks"))
        self.sections = [self._section(i, fact) for i, fact in enumerate(self.facts["models"], 1)]
        carried = (self.rows["model"] != self.rows["target"]).any() or self.facts["specification"].get("defences")
        self.outcomes = transfer_outcomes.outcomes(self.run) if carried else []
        self.together, self.transfer = self._together(), self._transfer()

    def _copies(self) -> Markup:
        """Buttons that copy the leaderboard in every form, and what to cite."""
        if not self.scores:
            return Markup()
        sheet = leaderboard.sheet(self.board, export.leaderboard_title(self.run))
        return Markup(copies("leaderboard-copies", sheet.forms() | {"bibtex": bibtex(self.run)}))

    def context(self, shown: Gallery) -> dict[str, Any]:
        """What the templates know."""
        head = [("summary", "Summary"), ("leaderboard", "Leaderboard")]
        head += [("examples", "Examples")] * bool(shown.count) + [("attacks", "Attacks")]
        head += [("transfer", "Transfer")] * bool(self.transfer)
        models = [(section.anchor, section.fact["name"]) for section in self.sections]
        return {
            "sections_of_page": [*head, *models, ("trust", "Trust"), ("limits", "Limits"), ("protocol", "Protocol")],
            "boards": [(eps, list(rows)) for eps, rows in groupby(self.board, key=lambda row: row.eps)],
            "anchors": {name: anchor for anchor, name in models},
            "gallery": shown,
            "facts": self.facts,
            "scores": self.scores,
            "sections": self.sections,
            "palette": self.palette,
            "together": self.together,
            "transfer": self.transfer,
            "carried": transfer_report.tables(self.outcomes),
            "failures": self.run.failures(),
            "trust": self.trust,
            "limits": provenance.limits(self.run, self.rows, self.scores),
            "provenance": provenance.provenance(self.run),
            "copies": self._copies(),
            "attack_copies": Markup(copies("attacks-copies", export.attacks(self.run).forms())),
            "filled": leaderboard.filled(self.board),
            "doubts": [*trust.lines(self.trust), *summary.doubts(self.scores), *self.run.doubts()],
            "errors": verdicts.errors(self.rows, self.facts),
            "notes": verdicts.notes(self.rows, self.facts),
            "done": len(self.run.done()),
            "planned": len(self.run.cells),
            "several_seeds": len(self.facts["specification"]["seeds"]) > 1,
            "TOGETHER": TOGETHER,
        }

    def _draw(
        self, draw: Callable[[float], Figure], name: str, subject: str, title: str, caption: str, **more: Any
    ) -> Drawing:
        self.drawn.append(name)
        svg, width = drawing.both(draw, self.folder, name)
        return Drawing(name=name, svg=svg, width=width, subject=subject, title=title, caption=caption, **more)

    def _section(self, i: int, fact: dict[str, Any]) -> Section:
        model = fact["name"]
        anchor = "-".join(["model", str(i), *re.findall("[a-z0-9]+", model.lower())])[:48].rstrip("-")
        section = Section(fact, anchor)
        scores = [score for score in self.scores if score.model == model]
        if not scores:
            return section
        curves = summary.radius_curves(self.rows, self.facts, model)
        radii = summary.radii(self.facts)
        known = "Attacks with a radius are known at the marked radii, minimum-norm attacks at every radius."
        known = known if any(curve.stairs for curve in curves) else "Known at the marked radii."
        caption = f"{known} The thick line is the worst case of every example. On {curves[-1].count} examples."
        section.figures.append(
            self._draw(
                lambda width: figures.radius_chart(_named(curves), self.palette, radii, width=width),
                f"{anchor}-radius", model, "Robust accuracy by radius", caption,
            )
        )  # fmt: skip
        for score in scores:
            section.radii.append((score, self._at(score, anchor)))
        section.pictures.extend(self._pictures(scores[-1], anchor))
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
        drawings = [
            self._draw(
                lambda width: figures.query_chart(_named(curves), self.palette, width=width),
                f"{name}-passes", where, "Robustness by passes", caption,
            )
        ]  # fmt: skip
        shared = summary.overlap(self.rows, self.facts, model, eps)
        if shared.sets:
            caption = (
                "How many examples are broken by exactly the attacks that are dotted below. Beside an attack's name: "
                f"how many it breaks in all. Lines are 95 % intervals. {shared.robust} examples withstand every attack."
            )
            drawings.append(
                self._draw(
                    lambda width: figures.overlap_chart(shared, self.palette, width=width),
                    f"{name}-overlap", where, "Which attacks break the same examples", caption,
                )
            )  # fmt: skip
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
        drawings = [
            self._draw(
                lambda width: figures.radius_chart(known, palette, radii, width=width),
                "models-radius", "all models", "Robust accuracy by radius", caption,
            )
        ]  # fmt: skip
        title = f"Robust accuracy by attack, ε = {radius(last[0].eps)}"
        caption = "Every attack on its own and all together; bars are 95 % intervals."
        return [
            *drawings,
            self._draw(
                lambda width: figures.attack_chart(last, palette, width=width),
                "models-attacks", "all models", title, caption,
            ),
        ]  # fmt: skip

    def _transfer(self) -> list[Drawing]:
        found = [*self._views(), *self._defences()]
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
                heat: list[Heat] = [
                    (attack, models, list(zip(models, m, strict=True))) for attack, m in matrices.items()
                ]
                title, corner = f"Transfer at ε = {radius(eps)}", "made on ↓ tried on →"
                name, chart = f"transfer-eps-{i}", figures.transfer_chart(matrices, models)
                found.append(self._heat(chart, name, title, caption, heat, corner))
        return found

    def _views(self) -> list[Drawing]:
        return [
            self._draw(draw, name, "all models", title, caption)
            for name, title, caption, draw in transfer_figures.views(self.outcomes)
        ]

    def _defences(self) -> list[Drawing]:
        if not self.outcomes or not self.facts["specification"].get("defences"):
            return []
        caption = (
            "Percent of all examples that the target takes for another class in the end, within the radius; behind a "
            "random defence the share of draws. The line of the clean examples shows what the defence itself costs."
        )
        chart, heat = transfer_figures.defence_chart(self.outcomes), transfer_figures.defence_heat(self.outcomes)
        return [self._heat(chart, "defences", "Targets behind defences", caption, [heat], "examples ↓ target →")]

    def _heat(self, chart: Figure, name: str, title: str, caption: str, heat: Sequence[Heat], corner: str) -> Drawing:
        return self._draw(lambda _: chart, name, "all models", title, caption, heat=heat, corner=corner)

    def _pictures(self, score: Score, anchor: str) -> list[Drawing]:
        found = stills.stills(self.run, score)
        if found is None:
            return []
        chart, factor = found
        caption = (
            f"Each example as it is, then the perturbation δ of an attack, times {factor:g}, on grey, and what came of "
            "it; those that fell come first. Below a picture: what the model takes it for, bold where that is wrong."
        )
        title = f"Pictures, ε = {radius(score.eps)}"
        return [self._draw(lambda _: chart, f"{anchor}-pictures", score.model, title, caption)]


def _named(curves: Sequence[Curve]) -> dict[str, Curve]:
    return {curve.attack or TOGETHER: curve for curve in curves}
