"""All promises on random scenarios: any attack, model, images, labels, bounds, masks and radii at once."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from firstorder.attacks import (
    DDN,
    DLR,
    BlobInteraction,
    BoundedAttack,
    Copies,
    DiverseInput,
    DiversityEnsemble,
    IterativeAttack,
    Margin,
    MinimumNormAttack,
    Oracle,
    Result,
    RobustnessWarning,
    ScaleCopies,
    TorchModel,
    TranslationInvariant,
    VarianceTuning,
    Verdict,
    as_model,
)
from scenarios import FIELDS, KINDS, OURS, TOGETHER, Approximate, Case, Counting, Scenario, scenarios

NO_NUMBER = "logits are NaN or infinite|non-finite gradient"
TINY = 1e-6


LONG = [pytest.param(kind, 1000, marks=pytest.mark.long) for kind in KINDS]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "cases"), [("crowd", 160), ("bounded", 120), ("minimum", 60), *LONG])
def test_every_promise_holds(kind: str, cases: int) -> None:
    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(scenario=scenarios(kind))
    def each(scenario: Scenario) -> None:
        promises(scenario)

    each()


def test_every_parameter_of_our_attacks_is_drawn() -> None:
    """Of all but the verdict, which has a transcription of its own."""
    names = {part.name for cls in OURS.values() if cls is not Verdict for part in dataclasses.fields(cls)}
    assert names - {*FIELDS, *TOGETHER} == set()


# --- what does not fit


def bad(name: str, *values: Any, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(name, {name: value, **more}) for value in values]


PARAMETERS = [
    *bad("eps", -1.0, math.nan, math.inf, True, "0.1", torch.tensor(-1.0), torch.tensor(1), torch.tensor(math.nan)),
    *bad("alpha", 0.0, -1.0, math.nan, "0.1", torch.tensor(0.0), torch.tensor([1])),
    *bad("steps", 0, -1, 1.5, True),
    *bad("norm", "L7", None),
    *bad("restarts", 0, 1.5, random_start=True),
    *bad("restarts", 2, random_start=False),
    *bad("patience", 0, early_stop=True),
    *bad("patience", 3, early_stop=False),
    *bad("memory_budget", 0, 0.5),
    *[
        case
        for name in ("decay", "beta", "c", "sigma", "noise", "zeta", "eta", "max_angle")
        for case in bad(name, -1.0, math.nan, "1")
    ],
    *[case for name in ("gamma", "nsig", "resize_rate", "init_norm") for case in bad(name, 0.0, -1.0, math.inf)],
    *[case for name in ("b", "m", "N", "m1", "m2", "blocks", "M") for case in bad(name, 0, -1, 1.5, True)],
    *[
        case
        for name in ("normaliser", "scope", "preset", "kernel_name", "kernel_gradient", "by")
        for case in bad(name, "x")
    ],
    *bad("beta1", 1.0, -0.1),
    *bad("lam", 0.0, 1.1),
    *bad("rho", -0.1, 1.1, math.nan),
    *bad("alpha_gamma", 1.0, -0.1),
    *bad("annealed", "no"),
    *bad("delta", -0.1, 1.1),
    *bad("rates", (), (0.0,), 1.2),
    *bad("kinds", (), ("x",), "flip rows"),
    *bad("pool", "x", torch.zeros(3), torch.zeros(0, 3, 2, 2)),
    *bad("diversity_prob", -0.1, 1.1),
    *bad("len_kernel", 0, 2),
    *bad("max_norm", -1.0, math.nan, levels=None),
    *bad("levels", 1, 2.5, max_norm=None),
    *bad("levels", 8, max_norm=1.0),
]


def untouched(x: Tensor) -> Tensor:
    raise AssertionError("the model was called")


@pytest.mark.parametrize("name", OURS)
def test_parameters_that_do_not_fit_are_refused(name: str) -> None:
    cls = OURS[name]
    fields = {part.name for part in dataclasses.fields(cls)}
    for word, values in PARAMETERS:
        if set(values) <= fields:
            with pytest.raises(ValueError, match=rf"\b{word}\b"):
                cls(**values)


ARGUMENTS: dict[str, tuple[str, Callable[[Scenario, Case], dict[str, Any]]]] = {
    "NaN": ("images contain NaN", lambda s, c: {"x": c.x.detach() * math.nan}),
    "infinity": ("images", lambda s, c: {"x": c.x.detach() + math.inf}),
    "integers": ("images are torch.int32", lambda s, c: {"x": c.x.int()}),
    "one example": ("images have shape", lambda s, c: {"x": c.x.flatten()}),
    "an array": ("images are a ndarray", lambda s, c: {"x": np.zeros(3)}),
    "outside": ("outside the bounds", lambda s, c: {} if c.bounds is None else {"x": c.x.detach() - 9}),
    "empty bounds": ("bounds", lambda s, c: {"bounds": (1.0, 0.0)}),
    "bounds of another shape": ("bounds", lambda s, c: {"bounds": (torch.zeros(*s.shape, 3), 1.0)}),
    "too few labels": ("labels", lambda s, c: {"y": torch.zeros(s.n + 1).long()}),
    "labels between classes": ("labels", lambda s, c: {"y": c.classes.double()}),
    "negative labels": ("labels", lambda s, c: {"y": c.classes - s.classes}),
    "several classes": ("one-hot", lambda s, c: {"y": torch.ones(s.n, s.classes).long()}),
    "no class": ("one-hot", lambda s, c: {"y": torch.zeros(s.n, s.classes)}),
    "ties": ("one largest entry", lambda s, c: {"y": torch.full((s.n, s.classes), 1 / s.classes)}),
    "a list of labels": ("labels are a list", lambda s, c: {"y": c.classes.tolist()}),
    "soft targets": ("one target class", lambda s, c: {"y": soft(s, c), "targeted": True}),
    "soft rows for the margin": ("Margin", lambda s, c: {"y": soft(s, c), "targeted": False, "loss": Margin()}),
    "another mask": ("mask", lambda s, c: {"mask": torch.ones(*s.shape, s.n + 5)}),
    "a list as mask": ("mask", lambda s, c: {"mask": [1]}),
    "levels without bounds": ("levels", lambda s, c: {"bounds": None, "levels": 8, "max_norm": None}),
    "a bare radius each": ("eps", lambda s, c: {"eps": torch.ones(s.n)} if s.n > 1 and s.shape != (1,) else {}),
    "too many radii": ("eps", lambda s, c: {"eps": torch.ones(s.n + 1, *[1] * len(s.shape))} if s.n > 1 else {}),
    "too many steps": ("alpha", lambda s, c: {"alpha": torch.ones(s.n + 2, *[1] * len(s.shape))}),
    "radii of features under L2": (
        "eps",
        lambda s, c: {"eps": torch.ones(s.n, *s.shape), "norm": "L2"} if len(c.x[0].flatten()) > 1 else {},
    ),
    "the variance after copies": (
        "VarianceTuning",
        lambda s, c: {
            "follows": (ScaleCopies(m=2), VarianceTuning(radius=1.0, N=1)),
            "early_stop": False,
            "patience": None,
        },
    ),
}
"""What the message says, and what changes; nothing where that fits after all."""


def soft(scenario: Scenario, case: Case) -> Tensor:
    rows = torch.nn.functional.one_hot(case.classes, scenario.classes)
    return 0.8 * rows + 0.2 / scenario.classes


KIND = {"levels without bounds": "minimum"}


@pytest.mark.filterwarnings("ignore::firstorder.attacks.RobustnessWarning")
@pytest.mark.parametrize("what", ARGUMENTS)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arguments_that_do_not_fit_are_refused(what: str, data: st.DataObject) -> None:
    message, spoil = ARGUMENTS[what]
    scenario = data.draw(scenarios(KIND.get(what, "bounded")))
    case = scenario.make()
    changed = spoil(scenario, case)
    attack = scenario.attack
    ours = {part.name for part in dataclasses.fields(attack)}
    values = {name: value for name, value in changed.items() if name not in ("x", "y", "mask", "bounds", "targeted")}
    assume(changed and set(values) <= ours and values.get("norm", attack.norms[0]) in attack.norms)
    options = {"targeted": scenario.targeted, "bounds": case.bounds, "mask": case.mask} | {
        name: value for name, value in changed.items() if name in ("mask", "bounds", "targeted")
    }
    y = changed.get("y", case.classes)
    with pytest.raises(ValueError, match=rf"\b{message}"):
        replace(attack, **values)(untouched, changed.get("x", case.x), y, **options)


# --- what fits


def promises(scenario: Scenario) -> None:
    """Attack as the scenario says, and hold the result against every promise that applies."""
    case = scenario.make()
    model, globally = state(case.module), generators()
    given_to = [value for value in (case.x, case.y, case.mask) if value is not None]
    kept = [value.detach().clone() for value in given_to]
    with torch.set_grad_enabled(scenario.grad):
        result = attacked(scenario, case, said=(said := []))
    assert_same(model, state(case.module))
    assert generators() == globally, "global random state"
    for value, before in zip(given_to, kept, strict=True):
        assert torch.equal(value, before), "an argument was changed"
    if result is None:
        return
    assert_usual(case, result)
    assert_said(scenario, case, result, said)
    assert_verdict(scenario, case, result)
    attack = scenario.attack
    if isinstance(attack, BoundedAttack):
        assert_inside(case, attack, result.adversarial)
    assert_again(scenario, case, result)
    if scenario.dtype != torch.float64 or scenario.brittle or isinstance(attack.loss, DLR):
        return  # the gradient of DLR is rounding alone where the label is third
    if isinstance(attack, BoundedAttack):
        assert_first_order(scenario, case)
        assert_stopped(scenario, case, result)
        assert_merged(scenario, case, result)
    else:
        assert_closest(scenario, case, result)
    assert_single(scenario, case, result)


# --- running


def attacked(scenario: Scenario, case: Case, **changed: Any) -> Any:
    """The result; None where a brittle model was rightly refused."""
    options = {"attack": scenario.attack, "x": case.x, "y": case.y, "target": case.target, "mask": case.mask, **changed}
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(scenario.seed) if scenario.seeded else None
    call = options["attack"] if options.get("alone") else options["attack"].run
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RobustnessWarning)
            found = call(
                options["target"],
                options["x"],
                options["y"],
                targeted=scenario.targeted,
                bounds=case.bounds,
                mask=options["mask"],
                generator=options["generator"],
                hook=options.get("hook"),
            )
        options.get("said", []).extend(str(one.message) for one in caught)
        return found
    except ValueError as error:
        if scenario.brittle and re.search(NO_NUMBER, str(error)):
            return None
        raise


def taken(case: Case, index: Tensor) -> dict[str, Any]:
    """The arguments for the examples at `index`."""
    mask = case.mask
    return {
        "x": case.x.detach()[index],
        "y": torch.stack([case.y[i] for i in index.tolist()]),  # older versions of torch index no uint16
        "mask": mask[index] if mask is not None and mask.shape == case.x.shape else mask,
    }


def narrowed(attack: Any, index: Tensor, x: Tensor) -> Any:
    """The attack for the examples at `index`, where it has a radius for each."""
    sizes = {
        name: value[index]
        for name in ("eps", "alpha")
        if isinstance(value := getattr(attack, name, None), Tensor) and value.ndim == x.ndim and len(value) > 1
    }
    return replace(attack, **sizes)


def state(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {f"mode of {name}": part.training for name, part in module.named_modules()}
    for name, parameter in module.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.clone()
        found |= {name: parameter.detach().clone(), f"{name}.grad": grad, f"{name}?": parameter.requires_grad}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"{name} of the model changed"


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# --- promises


def assert_usual(case: Case, result: Result) -> None:
    x, adversarial = case.x.detach(), result.adversarial
    assert (adversarial.shape, adversarial.dtype, adversarial.device) == (x.shape, x.dtype, x.device)
    assert not adversarial.requires_grad
    assert adversarial.isfinite().all()
    if case.limits is not None:
        low, high = case.limits
        assert (adversarial >= low).all()
        assert (adversarial <= high).all()
    if case.mask is not None:
        fixed = (case.mask == 0).expand_as(x)
        assert torch.equal(adversarial[fixed], x[fixed]), "a masked element moved"


def assert_said(scenario: Scenario, case: Case, result: Result, said: list[str]) -> None:
    """What is doubtful is said, and nothing else is."""
    known = "allows any image within the bounds", "met NaN or infinite", "the gradient is zero"
    assert all(any(words in message for words in known) for message in said), said
    assert len(said) == len({message.split()[1] for message in said}), "once"
    assert any(known[1] in message for message in said) == bool(result.doubtful is None or result.doubtful.any())
    attack = scenario.attack
    if not isinstance(attack, BoundedAttack):
        return
    beyond = False
    if case.limits is not None:
        width = (case.limits[1] - case.limits[0]).expand(case.x.shape[1:])
        limit = width if attack.norm == "Linf" else width.norm()
        beyond = bool((torch.as_tensor(attack.eps) > limit).any())
    assert any(known[0] in message for message in said) == beyond


def assert_inside(case: Case, attack: BoundedAttack, adversarial: Tensor) -> None:
    """In the ball, up to the rounding of the dtype."""
    x, ulp = case.x.detach().double(), torch.finfo(case.x.dtype).eps
    delta, eps = (adversarial.double() - x).abs(), torch.as_tensor(attack.eps, dtype=torch.float64)
    largest = float(x.abs().max() + eps.max())
    if attack.norm == "Linf":
        assert (delta <= eps + 2 * ulp * largest).all()
        return
    lengths = delta.flatten(1).norm(dim=1)
    assert (lengths <= eps.flatten() * (1 + 4 * ulp) + ulp * largest * x[0].numel() ** 0.5).all()


def assert_verdict(scenario: Scenario, case: Case, result: Result) -> None:
    """Success is what the model itself says, where it says so clearly; never what is no number."""
    adversarial, x = result.adversarial, case.x.detach()
    with torch.no_grad():
        logits = case.reference(adversarial).double()
    number = logits.isfinite().all(1)
    assert result.success is not None
    assert result.doubtful is not None
    assert not result.success[~number].any()
    assert result.doubtful[~number & ~result.success].all()
    hit = logits.argmax(1) == case.classes
    margin = Margin()(logits, case.classes).abs()
    clear = number & (margin > 16 * torch.finfo(x.dtype).eps * logits.abs().amax(1))
    assert torch.equal(result.success[clear], (hit if scenario.targeted else ~hit)[clear])
    if result.restarts is not None:
        assert torch.equal(result.restarts.any(0), result.success)
    if not isinstance(scenario.attack, MinimumNormAttack):
        return
    found: Any = result
    lengths = (adversarial.double() - x.double()).flatten(1).norm(dim=1)
    close = 8 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    torch.testing.assert_close(found.norm[found.success].double(), lengths[found.success], rtol=close, atol=close)
    assert torch.equal(found.norm.isfinite(), found.success)
    assert torch.equal(found.iterations >= 0, found.success)
    assert (found.iterations <= scenario.attack.steps).all()
    assert torch.equal(adversarial[found.iterations == 0], x[found.iterations == 0])
    top = scenario.attack.max_norm
    if top is None:
        assert torch.equal(adversarial[~found.success & clear], x[~found.success & clear])
    else:
        ulp = torch.finfo(x.dtype).eps
        assert (lengths <= top * (1 + 4 * ulp) + ulp * (x.abs().max() + top) * x[0].numel() ** 0.5).all()
    if scenario.attack.levels is not None and case.limits is not None:
        low, high = (limit.double() for limit in case.limits)
        at = (adversarial.double() - low) / (high - low) * (scenario.attack.levels - 1)
        off = (at - at.round()).abs()
        rounding = 4 * scenario.attack.levels * torch.finfo(x.dtype).eps * (1 + x.abs().max()) / (high - low).min()
        assert (off[adversarial != x] <= rounding).all()


def assert_closest(scenario: Scenario, case: Case, result: Any) -> None:
    """A minimum-norm attack returns the closest of the iterates that its model breaks."""
    if scenario.attack.max_norm is not None or scenario.model == "approximate":
        return
    seen: list[Tensor] = []
    attacked(scenario, case, hook=lambda k, gradient, a: seen.append(a.clone()))
    assert len(seen) == scenario.attack.steps
    with torch.no_grad():
        hit = torch.stack([case.reference(a).argmax(1) == case.classes for a in seen])
    lengths = torch.stack([(a - case.x.detach()).flatten(1).norm(dim=1) for a in seen])
    lengths = torch.where(hit if scenario.targeted else ~hit, lengths, torch.inf)
    assert (result.norm <= lengths.amin(0) + 1e-9).all()


def assert_again(scenario: Scenario, case: Case, result: Result) -> None:
    """The same draws give the same examples, called for them alone, in either grad mode; gradients are those made."""
    counting = Counting(as_model(case.target))
    with torch.set_grad_enabled(not scenario.grad):
        again = attacked(scenario, case, target=counting, alone=True)
    assert torch.equal(again, result.adversarial), "another result for the same seed"
    assert int(result.gradients.sum()) == counting.points[0]
    attack: Any = scenario.attack
    if isinstance(attack, BoundedAttack):
        full = attack.iterations() * scenario.price * attack.restarts
        assert ((result.gradients <= full) if attack.early_stop else (result.gradients == full)).all()


def assert_single(scenario: Scenario, case: Case, result: Result) -> None:
    """A batch is its examples, where nothing is drawn and they do not interact."""
    random_start = isinstance(scenario.attack, BoundedAttack) and scenario.attack.random_start
    if scenario.draws or random_start or (scenario.population and scenario.n > 1):
        return
    for i in range(scenario.n):
        index = torch.tensor([i])
        one = attacked(scenario, case, attack=narrowed(scenario.attack, index, case.x), **taken(case, index))
        near(result.adversarial[index], one.adversarial)
        assert torch.equal(result.success[index], one.success)
        assert torch.equal(result.gradients[index], one.gradients)


def assert_stopped(scenario: Scenario, case: Case, result: Result) -> None:
    """Stopping early breaks no fewer, and changes nothing for those that stand; patience breaks no more than that."""
    attack: Any = scenario.attack
    if not attack.early_stop or scenario.population or scenario.model == "approximate":
        return
    if attack.patience is None:
        full = attacked(scenario, case, attack=replace(attack, early_stop=False))
        assert (result.success | ~full.success).all()
        near(result.adversarial[~result.success], full.adversarial[~result.success])
    elif attack.restarts == 1:
        full = attacked(scenario, case, attack=replace(attack, patience=None))
        assert (full.success | ~result.success).all()
        near(result.adversarial[result.success], full.adversarial[result.success])


def assert_merged(scenario: Scenario, case: Case, result: Result) -> None:
    """Restarts are runs of their own, one after the other, and the worst of them counts."""
    attack: Any = scenario.attack
    if attack.restarts == 1 or (attack.early_stop and (scenario.draws or scenario.population)):
        return
    seed = scenario.seed if scenario.seeded else torch.initial_seed()
    generator = torch.Generator().manual_seed(seed)
    runs = [
        attacked(scenario, case, attack=replace(attack, restarts=1), generator=generator)
        for _ in range(attack.restarts)
    ]
    success = torch.stack([run.success for run in runs])
    assert torch.equal(success.any(0), result.success)
    with torch.no_grad():
        margin = torch.stack([Margin()(case.reference(run.adversarial), case.classes) for run in runs])
    margin = -margin if scenario.targeted else margin
    best = torch.where(success | ~success.any(0), margin, -torch.inf)
    chosen = success.int().argmax(0) if attack.early_stop else best.argmax(0)
    chosen = torch.where(success.any(0), chosen, best.argmax(0))
    expected = torch.stack([run.adversarial for run in runs])[chosen, torch.arange(scenario.n)]
    tied = (best == best.amax(0)).sum(0) > 1
    near(result.adversarial[~tied], expected[~tied])
    if not attack.early_stop:
        assert torch.equal(result.restarts, success)


def assert_first_order(scenario: Scenario, case: Case) -> None:
    """In a tiny ball the examples move the way the attack wants: along the gradient, where there is room."""
    attack: Any = scenario.attack
    if scenario.model == "approximate" or not all(untransformed(part) for part in scenario.parts):
        return
    values = {"eps": TINY, "random_start": False, "restarts": 1, "early_stop": False, "patience": None}
    values |= {"alpha": None} if isinstance(attack, IterativeAttack) else {}
    x, found = case.x.detach(), attacked(scenario, case, attack=replace(attack, **values))
    labels = case.y if scenario.labels == "soft" else case.classes
    uphill = as_model(case.reference).gradient(x, labels, attack.loss).gradient
    uphill = -uphill if scenario.targeted else uphill
    if case.mask is not None:
        uphill = torch.where(case.mask != 0, uphill, 0.0)
    delta = (found.adversarial - x).flatten(1)
    along, slope = (delta * uphill.flatten(1)).sum(1), uphill.flatten(1).norm(dim=1)
    assert (along >= -0.01 * slope * delta.norm(dim=1)).all(), "moved the wrong way"
    if attack.control() is not None:
        return  # of the iterates that break nothing the one of the best margin, which the loss may pull down
    free = uphill.abs() > 1e-6
    if case.limits is not None:
        free &= torch.where(uphill > 0, case.limits[1] - x, x - case.limits[0]) > TINY
    assert ((delta != 0).any(1) | ~free.flatten(1).any(1)).all(), "stayed where it was"


def untransformed(part: Oracle) -> bool:
    """Whether an oracle's gradient is that at the iterate, in a tiny ball."""
    if isinstance(part, ScaleCopies):
        return part.m == 1
    if isinstance(part, TranslationInvariant):
        return part.len_kernel == 1
    if isinstance(part, BlobInteraction):
        return part.c == 0
    if isinstance(part, Copies | DiversityEnsemble):
        return False
    return not isinstance(part, DiverseInput) or part.diversity_prob == 0


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_input_that_the_exact_model_alone_breaks_is_found_at_once() -> None:
    """Random cases found iteration -1 for it."""
    x, y = torch.full((2, 3), 0.5), torch.zeros(2).long()

    def between(mean: float, way: int) -> TorchModel:
        return TorchModel(lambda z: way * torch.stack([z.mean(1) - mean, mean - z.mean(1)], 1))

    result = DDN(steps=2, init_norm=1e-3).run(Approximate(between(0.0, 1), between(0.4999, -1)), x, y)
    assert result.success.all()
    assert torch.equal(result.adversarial, x)
    assert (result.norm.tolist(), result.iterations.tolist()) == ([0, 0], [0, 0])
