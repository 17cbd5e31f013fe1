"""The configuration of a run of training: a YAML file, or the same as options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from firstorder.evaluation.names.code import require_trust
from firstorder.evaluation.names.documents import Place, mistakes
from firstorder.evaluation.names.methods import method
from firstorder.evaluation.names.numbers import radius
from firstorder.files import write_text

FILE = "config.yaml"


def _limit(value: object) -> object:
    """A limit: "auto", or a number, as a radius is written."""
    if value is None or value == "auto":
        return value
    try:
        return radius(value)
    except ValueError:
        raise ValueError("write a finite number above 0, as 0.3, or auto") from None


class Configuration(BaseModel):
    """Everything that determines a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(
        description="Training images: mnist:DIR, fashion-mnist:DIR or cifar10:DIR (torchvision's layouts), an .npz "
        "file with x and y, a folder with labels.json, imagefolder:DIR, hf:NAME-or-FOLDER; wds:SHARDS, whose pictures "
        "stay in their files; or mnist, cifar10 (packaged excerpts)."
    )
    test: str | None = Field(None, description="Test images, likewise; torchvision's layouts have their own.")
    examples: int | None = Field(None, ge=1, description="How many training images to use; all by default.")
    test_examples: int | None = Field(None, ge=1, description="How many test images to use; all by default.")
    window: int = Field(
        10_000, ge=1, description="Of wds: data, how far the order of an epoch takes a picture from its place in them."
    )
    validation: int = Field(1000, ge=1, description="Images held out of the training set, to choose the best epoch by.")
    model: str = Field(
        "small-cnn",
        description="small-cnn, small-resnet, resnet18, timm:NAME, torchvision:NAME, module:function or "
        "FILE.py:function.",
    )
    objective: Literal["vanilla", "trades", "mart", "natural"] = Field(
        "vanilla",
        description="What is minimised; natural trains without an attack, and eps is the evaluation attack's alone.",
    )
    beta: float = Field(6.0, ge=0, description="Weight of the divergence in trades and mart.")
    awp: float = Field(0.0, ge=0, description="Relative size of adversarial weight perturbations.")
    attack: str = Field(
        "pgd:steps=10,random_start=true",
        description="Inner attack: a registered name with parameters, as in pqgd:steps=10 or verdict:stages=1; a "
        "bounded one gets eps and, where it is silent, alpha = eps / 4, a minimum-norm one gets max_norm = eps.",
    )
    eps: Annotated[float, BeforeValidator(radius)] = Field(
        8 / 255, description="Radius of the threat model: 0.3 or 8/255."
    )
    prepare: bool = Field(
        False,
        description="Whether the inner attack takes its gradients from a prepared copy of the network, in evaluation "
        "mode and faster, with the weights of every step.",
    )
    method: str = Field(
        "engm",
        description="How the gradients of the examples are combined: engm, a-engm, n-engm, f-engm, msgd, mgnc, sngm, "
        "or another method that `firstorder attacks` lists, with parameters as in a-engm:tau=10, mgnc:clip=5 or "
        "engm:alpha=auto.",
    )
    alpha: Annotated[float | Literal["auto"] | None, BeforeValidator(_limit)] = Field(
        None,
        description="Limit of engm, a-engm, n-engm and methods like them; the method's own by default; auto is the "
        "0.25-quantile of the norms of the first epoch, which is plain training.",
    )
    alpha_parameters: float | None = Field(
        None,
        ge=1,
        description="Parameters of the network that alpha was chosen for, 11.1e6 in ENGM's paper: alpha grows with the "
        "square root of the ratio of the model's to these.",
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="SGD (momentum 0.9) or Adam.")
    lr: float = Field(0.1, gt=0, description="Learning rate at its highest.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of SGD.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    schedule: Literal["constant", "drops", "cosine", "one-cycle"] = Field("drops", description="Of the learning rate.")
    drops: tuple[float, ...] = Field((0.5, 0.75), description="Shares of the training where it drops to a tenth.")
    epochs: int = Field(100, ge=1, description="Passes over the images.")
    batch_size: int = Field(128, ge=1, description="Images a step.")
    accumulate: int = Field(1, ge=1, description="Backwards a step.")
    ramp: float = Field(0.0, ge=0, le=1, description="Share of the training over which eps grows to its full size.")
    augment: Literal["none", "crop-flip"] = Field("none", description="Random crops (4 pixels) and flips.")
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = Field("32-true", description="Full or mixed.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of everything random.")
    judge_steps: int = Field(
        20, ge=1, description="Steps of the evaluation attack of an epoch, PGD with the margin loss."
    )
    radii: tuple[Annotated[float, BeforeValidator(radius)], ...] = Field(
        (), description="Further radii at which the best weights are evaluated at the end."
    )
    validate_every: int = Field(1, ge=1, description="Epochs from one evaluation to the next.")
    save_every: int | None = Field(None, ge=1, description="Steps between saved states, beside every epoch's end.")
    diagnose: int = Field(256, ge=0, description="Images whose gradients are measured after every epoch.")
    landscape: int = Field(4, ge=0, description="Images for the loss landscape of the best and the last weights.")

    @field_validator("method")
    @classmethod
    def _registered(cls, value: str) -> str:
        method(value)
        return value

    @field_validator("drops")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share < 1 for share in value):
            raise ValueError("name shares of the training between 0 and 1")
        return value


def configure(
    values: Mapping[str, Any],
    *,
    source: str = "",
    lines: Mapping[Place, int] | None = None,
    trust_code: bool = True,
) -> Configuration:
    """The configuration with `values`, the others at their defaults.

    Args:
        values: by key.
        source: where they come from, for messages.
        lines: of the values in the file.
        trust_code: whether the network may be a function of a module or file, which runs code when it is made. Pass
            False for what somebody else may have written.

    Raises:
        ValueError: values that do not fit; one line for each, with its line in `source` where it has one.
    """
    try:
        found = Configuration(**values)
    except ValidationError as error:
        known = tuple(Configuration.model_fields)
        raise ValueError(mistakes(error, known, source=source, lines=lines)) from None
    require_trust([found.model], source=source or "the configuration", trusted=trust_code)
    return found


def write(configuration: Configuration, path: Path) -> None:
    """Write a configuration that `documents.read` reads, atomically."""
    write_text(path, yaml.safe_dump(configuration.model_dump(mode="json"), sort_keys=False))
