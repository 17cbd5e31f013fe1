"""Bad input is a ValueError that names the value and the remedy, before the model's gradient is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Case, Net, images
from firstorder.attacks import (
    ANU,
    DLR,
    FGSM,
    MIFGSM,
    NGM,
    NIFGSM,
    PGD,
    PQGD,
    SINIFGSM,
    Clipped,
    ClippedNGM,
    Quantised,
    validation,
)

X, Y = images(), torch.arange(6)


class Untouched(nn.Module):
    """A model whose use is a failure of the test."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model was called before the input was checked")


BAD_BATCHES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "NaN": (X / 0 * 0, Y, {}, "NaN"),
    "above the bounds": (X * 255, Y, {}, r"outside the bounds \[0, 1\]"),
    "below the bounds": (X - 0.5, Y, {}, "outside the bounds"),
    "bytes": ((X * 255).byte(), Y, {}, "uint8.*float"),
    "array": (X.numpy(), Y, {}, "ndarray.*tensor"),
    "one image": (X[0, 0, 0], Y, {}, r"x\[None\]"),
    "too few labels": (X, Y[:3], {}, "6 images but 3 labels"),
    "float labels": (X, Y.float(), {}, r"float32.*long"),
    "label rank": (X, Y.reshape(1, 6, 1), {}, r"shape \(1, 6, 1\)"),
    "empty one-hot rows": (X, torch.zeros(6, 10), {}, "one-hot"),
    "bounds the wrong way": (X, Y, {"bounds": (1.0, 0.0)}, "bounds"),
    "bounds per wrong channel": (X, Y, {"bounds": ([0.0, 0.0, 0.0, 0.0], 1.0)}, "per channel"),
    "mask": (X, Y, {"mask": torch.ones(4, 4)}, r"mask.*\(4, 4\)"),
    "NaN in the mask": (X, Y, {"mask": torch.full_like(X, torch.nan)}, "mask contains NaN; pass 0 or False"),
    "one bound": (X, Y, {"bounds": (None, 1)}, r"bounds=\(None, 1\) are no pair; give \(lowest, highest\)"),
    "three bounds": (X, Y, {"bounds": (0, 0.5, 1)}, r"bounds=\(0, 0\.5, 1\) are no pair"),
    "a number for bounds": (X, Y, {"bounds": 1}, "bounds=1 are no pair"),
    "a seed for a generator": (X, Y, {"generator": 3}, r"torch\.Generator\('cpu'\)\.manual_seed\(3\)"),
    "a word for a generator": (X, Y, {"generator": "cpu"}, r"a str; pass a torch\.Generator"),
    "a word for targeted": (X, Y, {"targeted": "no"}, "targeted='no' must be a bool"),
    "a tensor for targeted": (X, Y, {"targeted": Y > 2}, "targeted=tensor.* must be a bool"),
    "sparse": (X.to_sparse(), Y, {}, r"sparse_coo; pass x\.to_dense\(\)"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_bad_batches(case: Case, bad: str) -> None:
    x, y, options, message = BAD_BATCHES[bad]
    with pytest.raises(ValueError, match=message):
        case.build()(Untouched(), x, y, **options)


class Ending(nn.Module):
    """A model that ends in `end`, and counts backward passes."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body, self.end = nn.Sequential(nn.Flatten(), nn.Linear(90, 10)), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(x))


BAD_MODELS: dict[str, tuple[Any, str]] = {
    "tuple": (lambda z: (z, z), r"tuple.*Select\(model, 0\)"),
    "one class": (lambda z: z[:, :1], "one class"),
    "one dimension": (lambda z: z[:, 0], "shape"),
    "two dimensions": (lambda z: z[:, None], "shape"),
    "NaN weights": (lambda z: z * torch.nan, "NaN"),
    "four classes": (lambda z: z[:, :4], r"0\.\.5.*0\.\.3"),
    "detached": (lambda z: z.detach(), "differentiably"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("bad", BAD_MODELS)
def test_bad_models(case: Case, bad: str) -> None:
    end, message = BAD_MODELS[bad]
    with pytest.raises(ValueError, match=message):
        case.build()(Ending(end), X, Y)


def test_a_model_must_be_callable() -> None:
    with pytest.raises(ValueError, match="callable"):
        PGD()("resnet18", X, Y)  # type: ignore[arg-type]


def test_dtypes_that_disagree_are_in_the_note(model: Net) -> None:
    with pytest.raises(RuntimeError) as caught:
        PGD()(model, X.double(), Y)
    assert "convert the images with x.to('cpu', torch.float32)" in caught.value.__notes__[0]


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(ValueError, match="at least 3 classes"):
        PGD(loss=DLR())(Ending(lambda z: z[:, :2]), X, Y % 2)


def test_the_generator_must_be_on_the_device() -> None:
    with pytest.raises(ValueError, match=r"generator is on cpu, the images on cuda"):
        validation.source(torch.Generator(), torch.device("cuda"))


BAD_PARAMETERS: dict[str, tuple[Any, str]] = {
    "eps < 0": (lambda: PGD(eps=-0.1), "eps=-0.1"),
    "eps NaN": (lambda: PGD(eps=float("nan")), "eps=nan"),
    "eps text": (lambda: PGD(eps="8/255"), "eps='8/255'"),  # type: ignore[arg-type]
    "steps < 1": (lambda: PGD(steps=0), "steps=0"),
    "steps fraction": (lambda: PGD(steps=1.5), "steps=1.5"),  # type: ignore[arg-type]
    "alpha zero": (lambda: PGD(alpha=0), "alpha=0"),
    "norm": (lambda: PGD(norm="L1"), "norm='L1'"),
    "PQGD in L2": (lambda: PQGD(norm="L2"), "norm='L2'"),
    "levels": (lambda: PQGD(b=0), "b=0"),
    "restarts": (lambda: PGD(restarts=0), "restarts=0"),
    "equal restarts": (lambda: FGSM(restarts=3), "random_start"),
    "early stop": (lambda: NIFGSM(early_stop=True), "early_stop"),
    "early stop SI": (lambda: SINIFGSM(early_stop=True), "early_stop"),
    "decay": (lambda: MIFGSM(decay=-1), "decay=-1"),
    "normaliser": (lambda: MIFGSM(normaliser="max"), "normaliser='max'"),  # type: ignore[arg-type]
    "copies": (lambda: SINIFGSM(m=0), "m=0"),
    "beta1": (lambda: NGM(beta1=1.0), "beta1=1.0"),
    "lam": (lambda: NGM(lam=0.0), "lam=0.0"),
    "gamma": (lambda: ClippedNGM(gamma=0), "gamma=0"),
    "scope": (lambda: Clipped(scope="batch"), "scope='batch'"),  # type: ignore[arg-type]
    "quantised levels": (lambda: Quantised(levels=-5), "levels=-5"),
    "budget": (lambda: SINIFGSM(memory_budget=0), "memory_budget=0"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_switches_take_no_words(case: Case) -> None:
    """A text counts as True, whatever it says."""
    cls = type(case.build())
    names = [field.name for field in dataclasses.fields(cls) if field.type in ("bool", bool)]
    for name in names:
        for value in ("false", "no", 2, None):
            with pytest.raises(ValueError, match=f"{name}={value!r} must be a bool"):
                cls(**{name: value})
    assert names or cls.__name__ == "DDN"


@pytest.mark.parametrize("bad", BAD_PARAMETERS)
def test_bad_parameters(bad: str) -> None:
    build, message = BAD_PARAMETERS[bad]
    with pytest.raises(ValueError, match=message):
        build()


def test_bounds_and_switches_in_other_types(model: Net) -> None:
    def found(start: Any, bounds: Any) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return PGD(eps=0.05, steps=2, random_start=start)(model, X, Y, bounds=bounds, generator=source)

    expected = found(True, (0.0, 1.0))
    for start, bounds in ((1, [0.0, 1.0]), (np.bool_(True), np.array([0.0, 1.0])), (True, torch.tensor([0.0, 1.0]))):
        assert torch.equal(found(start, bounds), expected)
    goals = (Y + 1) % 6
    assert torch.equal(
        ANU(steps=3)(model, X, goals, targeted=np.bool_(True)),  # type: ignore[arg-type]
        ANU(steps=3)(model, X, goals, targeted=True),
    )
