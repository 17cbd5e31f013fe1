"""What is to be evaluated: a YAML file, or the same as options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from firstorder.evaluation.names.code import require_trust
from firstorder.evaluation.names.documents import Place, mistakes
from firstorder.evaluation.names.numbers import radius

MOST = 10**9
"""The largest of the whole numbers."""

RANDOM, LEAST_LIKELY = "random", "least-likely"
"""Goals of targeted attacks beside the number of a class."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | int | float | dict) else value


def _joined(value: object) -> object:
    return ",".join(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("every value may be there once")
    return values


def _goal(value: object) -> object:
    """The goal of targeted attacks; empty for untargeted ones. True is random, as specifications may say it."""
    if isinstance(value, bool) or value is None or value == "no":
        return RANDOM if value is True else ""
    if value in ("", RANDOM, LEAST_LIKELY):
        return value
    if str(value).isascii() and str(value).isdecimal() and int(str(value)) <= MOST:
        return str(int(str(value)))
    raise ValueError(f"write {RANDOM}, {LEAST_LIKELY}, the number of a class, or no")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelEntry(_Strict):
    """A model, under the name it has in the report."""

    model: str = Field(min_length=1, description="As in `names.models.SOURCES`.")
    name: str = Field("", description="In the report; what `model` says by default.")
    mean: tuple[float, ...] | None = Field(None, description="Per channel, of a network that wants normalised images.")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="Likewise.")

    reported: float | None = Field(
        None, ge=0, le=100, description="Robust accuracy, in percent, that others published for it at this radius."
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _pair(self) -> ModelEntry:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("give both mean and std, a value for every channel, or none of them")
        return self

    @property
    def label(self) -> str:
        """Its name in the report."""
        return self.name or self.model


class AttackEntry(BaseModel):
    """An attack with hyper-parameters, under the name it has in the report."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    attack: str = Field(min_length=1, description="As in `names.attacks.parse`; or one of AutoAttack's.")
    name: str = Field("", description="In the report; what `attack` says by default, with the parameters.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return {"attack": value} if isinstance(value, str) else value

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters beside those that `attack` itself names."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """Its name in the report."""
        words = ",".join(f"{key}={value}" for key, value in (self.model_extra or {}).items())
        return self.name or (f"{self.attack}{',' if ':' in self.attack else ':'}{words}" if words else self.attack)


class Zoo(_Strict):
    """Where RobustBench's checkpoints are."""

    folder: str = Field(default="models", description="Holds dataset/threat/NAME.pt; downloads go there.")
    dataset: str = Field(default="cifar10", description="RobustBench's name of the data set.")
    threat: str | None = Field(default=None, description="Of the models; `norm` by default.")


Count = Annotated[int, Field(ge=1, le=MOST)]
Radius = Annotated[float, BeforeValidator(radius)]


class Specification(_Strict):
    """Everything that determines a run."""

    models: Annotated[tuple[ModelEntry, ...], BeforeValidator(_listed)] = Field(
        min_length=1,
        description="What is attacked: a packaged name, robustbench:NAME, timm:NAME, torchvision:NAME, "
        "module:function, FILE.py:function, or NETWORK@FILE with weights in .safetensors or .pt.",
    )
    data: Annotated[str, BeforeValidator(_joined)] = Field(
        description="Images: mnist, cifar10 (packaged excerpts), an .npz file with x and y, several of them with "
        "commas between, a folder with labels.json, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, cifar100:DIR "
        "(torchvision's layouts), or robustbench:NAME:DIR."
    )
    select: Literal["all", "all-correct"] = Field(
        "all", description="From which images skip and count take: all, or those that all models classify correctly."
    )
    count: int | None = Field(None, ge=1, le=MOST, description="How many of the images; all by default.")
    skip: int = Field(0, ge=0, le=MOST, description="How many images at the start to leave out.")
    norm: Literal["Linf", "L2"] = Field("Linf", description="Of the threat model.")
    eps: Annotated[tuple[Radius, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        (), description="Radii of the threat model: 0.3 or 8/255. Minimum-norm attacks alone need none."
    )
    attacks: Annotated[tuple[AttackEntry, ...], BeforeValidator(_listed)] = Field(
        min_length=1,
        description="Registered names with parameters, pgd:steps=40; autoattack, firstorder, apgd-t ...; all, for "
        "every registered attack that knows the norm and whose step is within the budget.",
    )
    steps: Annotated[tuple[Count, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        (), description="Numbers of steps of attacks that do not name their own; with several, an attack for each."
    )
    budget: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Gradients per example that iterative attacks get where they do not name their steps.",
    )
    diagnose: bool = Field(
        True, description="Look at every model for what makes a robust accuracy untrustworthy, on 25 of the images."
    )
    audit: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="AutoAttack on so many, at random, of the examples that a verdict gave up; no audit by default.",
    )
    limits: str | None = Field(
        None,
        min_length=1,
        description="CSV file of what others know of the images of the only model: example (its place in the data), "
        "eps, proven and broken (0 or 1).",
    )
    early_stop: bool = Field(True, description="Broken examples leave the batch, in attacks that know which these are.")
    sources: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        (), description="Models that examples are made on, A+B for an ensemble in logits; all models by default."
    )
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        (), description="Models that examples are carried to, which needs every step; none by default."
    )
    transfer: bool = Field(False, description="Carry examples to every model, as targets does to some.")
    defences: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        (), description="Defences that are put before every target, jpeg:quality=50; it is tried bare too."
    )
    draws: int = Field(5, ge=1, le=MOST, description="Draws of a random defence.")
    targeted: Annotated[str, BeforeValidator(_goal)] = Field(
        "",
        description="Towards another class than the label: random, drawn for every image; least-likely, that of the "
        "model attacked; or the number of a class, which leaves out its own images. By default untargeted, as with no.",
    )
    random: bool = Field(False, description="Also models whose forwards are random; what is found is of one draw.")
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_listed), AfterValidator(_distinct)
    ] = Field((0,), min_length=1, description="Of the random draws.")
    shard: int = Field(100, ge=1, le=MOST, description="Examples in a cell, which are attacked together.")
    batch_size: int = Field(100, ge=1, le=MOST, description="Examples in a forward; halved where memory runs out.")
    pictures: int = Field(
        8,
        ge=0,
        le=MOST,
        description="How many of the first examples are kept as pictures; what falls is kept too, up to 16 MB of an "
        "attack at a radius. 0 keeps none.",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")
    precision: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="Of gradients; verdicts are float32."
    )
    prepare: bool = Field(True, description="Take gradients from a faster copy of the model; verdicts are the model's.")
    zoo: Zoo = Field(Zoo(), description="Where RobustBench's checkpoints are.")

    @model_validator(mode="after")
    def _names(self) -> Specification:
        for kind, entries in (("models", self.models), ("attacks", self.attacks)):
            seen: set[str] = set()
            for entry in entries:
                if entry.label in seen:
                    raise ValueError(f"two {kind} are called {entry.label!r}; give one of them another name")
                seen.add(entry.label)
        known = [entry.label for entry in self.models]
        for kind, names in (("sources", [part for name in self.sources for part in self.members(name)]),
                            ("targets", self.targets)):  # fmt: skip
            for name in names:
                if name not in known:
                    raise ValueError(f"{kind} name {name!r}, which is no model of the run; it has {', '.join(known)}")
        if self.precision != "float32" and not self.prepare:
            raise ValueError(f"precision={self.precision} needs prepare=true")
        if self.steps and self.budget is not None:
            raise ValueError("steps and budget both say how long attacks run; give one of them")
        return self

    def members(self, name: str) -> list[str]:
        """The models whose logits are averaged in the source `name`: itself, or those joined by "+"."""
        return [name] if name in (entry.label for entry in self.models) else name.split("+")

    @property
    def made_on(self) -> tuple[str, ...]:
        """The models, and ensembles of them, that examples are made on."""
        return self.sources or tuple(entry.label for entry in self.models)

    @property
    def carried_to(self) -> tuple[str, ...]:
        """The models that examples are carried to."""
        return tuple(entry.label for entry in self.models) if self.transfer and not self.targets else self.targets

    @property
    def interfaces(self) -> tuple[ModelEntry, ...]:
        """The models, and the ensembles among the sources."""
        ensembles = (name for name in self.sources if len(self.members(name)) > 1)
        return (*self.models, *(ModelEntry.model_validate(name) for name in ensembles))


def specify(
    values: Mapping[str, Any],
    *,
    source: str = "",
    lines: Mapping[Place, int] | None = None,
    trust_code: bool = True,
) -> Specification:
    """The specification with `values`, the others at their defaults.

    Args:
        values: by key.
        source: the file that they come from, for messages.
        lines: of the values in the file.
        trust_code: whether models may be functions of modules or files, which run code when they are loaded. Pass False
            for what somebody else may have written.

    Raises:
        ValueError: values that do not fit; one line for each, with its line in `source` where it has one.
    """
    try:
        found = Specification(**values)
    except ValidationError as error:
        message = mistakes(error, tuple(Specification.model_fields), source=source, lines=lines)
        raise ValueError(message) from None
    require_trust([entry.model for entry in found.models], source=source or "the specification", trusted=trust_code)
    return found
