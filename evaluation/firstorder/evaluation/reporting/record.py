"""A run's results as JSON with a schema, for other programs.

The schema is `assets/schemas/record-1.json`, and `firstorder export RUN --format schema` prints it. Its number changes
with every field that goes, comes or means something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from firstorder.evaluation.names import citations
from firstorder.evaluation.reporting import provenance, summary, trust, verdicts
from firstorder.evaluation.reporting.sheets import Sheet
from firstorder.evaluation.runs.store import Run

Share = Annotated[float, Field(ge=0, le=1)]
Number = float | None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RateRecord(_Strict):
    """A share of images with its 95 % interval."""

    value: Share
    low: Share = Field(description="Of Wilson's 95 % interval.")
    high: Share = Field(description="Likewise.")
    images: int = Field(ge=0, description="How many it is a share of.")


class ResultRecord(_Strict):
    """An attack on a model at a radius."""

    attack: str = Field(description="A name of `attacks`.")
    robust: RateRecord = Field(description="Robust accuracy against it alone; of several seeds the mean.")
    worst: RateRecord = Field(description="The share that withstands every seed.")
    seeds: dict[str, RateRecord] = Field(description="Robust accuracy by seed.")
    forwards: Number = Field(description="Forward passes per attacked image, the mean; null where none was.")
    backwards: Number = Field(description="Backward passes likewise.")
    linf: Number = Field(description="Median L-infinity size of perturbations that succeed; null without any.")
    l2: Number = Field(description="Median L2 size likewise.")
    seconds: Number = Field(description="Per image, on the machine of the run.")
    doubtful: int = Field(description="Images counted as robust that met NaN or infinite logits or gradients.")
    unverified: int = Field(description="Successes that the attack claims and the model does not confirm.")


class ScoreRecord(_Strict):
    """A model at a radius."""

    model: str = Field(description="A name of `models`.")
    eps: float = Field(gt=0, description="The radius, of pixels in [0, 1].")
    clean: RateRecord = Field(description="Accuracy without an attack.")
    robust: RateRecord = Field(description="Against all attacks and seeds at this radius and every smaller one.")
    doubtful: int = Field(description="How many of the robust met NaN or infinite logits or gradients.")
    attacks: list[ResultRecord] = Field(description="The strongest first.")


class ModelRecord(_Strict):
    """A model."""

    name: str
    spec: str = Field(description="What it was called on the command line.")
    digest: str = Field(description="Of its weights, buffers, code and behaviour.")
    architecture: str
    parameters: int
    precision: str = Field(description="Of gradients.")
    reported: Number = Field(description="Robust accuracy that others published, in percent.")


class AttackRecord(_Strict):
    """An attack."""

    name: str
    attack: str = Field(description="Its name in the registry, or AutoAttack's.")
    kind: str = Field(description="bounded, minimum-norm or autoattack.")
    parameters: dict[str, Any]
    step_sizes: dict[str, float] = Field(description="The first step size that was used, by radius.")
    paper: str
    source: str = Field(description="The distribution that it comes from, with its version.")
    citations: list[str] = Field(description="Keys of `bibtex`.")


class DataRecord(_Strict):
    """The images."""

    spec: str = Field(description="What they were called on the command line.")
    digest: str = Field(description="Of all pixels and labels.")
    images: int
    shape: list[int] = Field(description="Channels, height and width.")
    classes: list[str] = Field(description="Their names, where known.")


class Remark(_Strict):
    """A line on the run."""

    about: str
    text: str


class Record(_Strict):
    """The results of a run of `firstorder evaluate`. Shares are in [0, 1], sizes of pixels in [0, 1]."""

    format: Literal["firstorder-record/1"] = Field(description="The version of this schema.")
    norm: Literal["Linf", "L2"] = Field(description="Of the threat model.")
    targeted: bool
    seeds: list[int]
    data: DataRecord
    models: list[ModelRecord]
    attacks: list[AttackRecord]
    results: list[ScoreRecord]
    versions: dict[str, str]
    provenance: list[Remark] = Field(description="How the run was made.")
    limits: list[Remark] = Field(description="What it does not show.")
    errors: list[str] = Field(description="Contradictions with what is proven.")
    notes: list[str] = Field(description="What verdicts leave open.")
    doubts: list[str] = Field(description="What looked wrong.")
    cells: dict[str, int] = Field(description="How many are planned, done and failed.")
    bibtex: str = Field(description="The papers of the attacks, and this package.")


def record(run: Run) -> Record:
    """The results of the finished cells of a run.

    Raises:
        ValueError: a run of another version.
    """
    rows, facts = summary.load(run), run.facts
    scores = summary.leaderboard(rows, facts)
    data, specification = facts["data"], facts["specification"]
    return Record(
        format="firstorder-record/1",
        norm=specification["norm"],
        targeted=bool(specification.get("targeted", False)),
        seeds=specification["seeds"],
        data=DataRecord(
            spec=data["spec"],
            digest=data["digest"],
            images=data["count"],
            shape=data["shape"],
            classes=list(data["classes"]),
        ),
        models=[_model(one) for one in facts["models"]],
        attacks=[_attack(one) for one in facts["attacks"]],
        results=[_score(score) for score in scores],
        versions=facts["versions"],
        provenance=_remarks(provenance.provenance(run)),
        limits=_remarks(provenance.limits(run, rows, scores)),
        errors=verdicts.errors(rows, facts),
        notes=verdicts.notes(rows, facts),
        doubts=[*trust.lines(trust.panels(run, rows)), *summary.doubts(scores), *run.doubts()],
        cells={"planned": len(run.cells), "done": len(run.done()), "failed": len(run.failures())},
        bibtex=bibtex(run),
    )


def bibtex(run: Run) -> str:
    """The papers of the run's attacks, and this package, with a remark on attacks whose papers are not known."""
    used = [one["attack"] for one in run.facts["attacks"]]
    unknown = [f"{one['name']} ({one['paper']})" for one in run.facts["attacks"] if not citations.keys(one["attack"])]
    remark = f"% without an entry here: {' '.join(', '.join(unknown).split())}\n\n" if unknown else ""
    return remark + citations.bibtex(key for attack in used for key in citations.keys(attack))


def _model(one: Mapping[str, Any]) -> ModelRecord:
    words = ("name", "spec", "digest", "architecture", "parameters", "precision")
    return ModelRecord(**{word: one[word] for word in words}, reported=one.get("reported"))


def _attack(one: Mapping[str, Any]) -> AttackRecord:
    words = ("name", "attack", "kind", "parameters", "paper", "source")
    return AttackRecord(
        **{word: one[word] for word in words},
        step_sizes=one.get("step_sizes", {}),
        citations=list(citations.keys(one["attack"])),
    )


def _score(score: summary.Score) -> ScoreRecord:
    return ScoreRecord(
        model=score.model,
        eps=score.eps,
        clean=_rate(score.clean),
        robust=_rate(score.robust),
        doubtful=score.doubtful,
        attacks=[
            ResultRecord(
                attack=one.attack,
                robust=_rate(one.robust),
                worst=_rate(one.worst),
                seeds={str(seed): _rate(rate) for seed, rate in one.seeds.items()},
                forwards=_number(one.forwards),
                backwards=_number(one.backwards),
                linf=_number(one.linf),
                l2=_number(one.l2),
                seconds=_number(one.seconds),
                doubtful=one.doubtful,
                unverified=one.unverified,
            )
            for one in score.attacks
        ],
    )


def _rate(rate: summary.Rate) -> RateRecord:
    low, high = rate.interval
    return RateRecord(value=min(max(rate.value, 0.0), 1.0), low=low, high=high, images=rate.count)


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _remarks(sheet: Sheet) -> list[Remark]:
    return [Remark(about=about, text=text) for about, text in sheet.rows]
