"""Whatever a user brings: labels of every kind, models of every kind, outputs of every kind, radii of every shape.

Exact, or a warning, or a clear refusal: never wrong in silence.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import CASES, Case, Net, images, predicted
from firstorder.attacks import (
    ANU,
    BIM,
    DDN,
    DLR,
    FGSM,
    MIFGSM,
    PGD,
    PQGD,
    SINIFGSM,
    VMIFGSM,
    Clipped,
    Margin,
    RobustnessWarning,
    Select,
    TorchModel,
    TwoLogits,
)

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
X, Y = images(), torch.arange(6)
ATTACK = PGD(eps=0.05, steps=4)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A warning without a reason is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustnessWarning)
        yield


# --- labels


@every_attack
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_integer_labels_of_any_width(case: Case, dtype: torch.dtype, model: Net) -> None:
    assert torch.equal(case.build()(model, X, Y.to(dtype)), case.build()(model, X, Y))


MIXED = 0.7 * F.one_hot(Y, 10) + 0.3 * F.one_hot((Y + 4) % 10, 10)
BAD_ROWS: dict[str, tuple[Tensor, str]] = {
    "two classes at once": (F.one_hot(Y, 10) + F.one_hot((Y + 1) % 10, 10), "one-hot"),
    "two classes at once, float": ((F.one_hot(Y, 10) + F.one_hot((Y + 1) % 10, 10)).float(), "one-hot"),
    "a row of zeros": (F.one_hot(Y, 10) * (Y > 0)[:, None], "one-hot"),
    "logits": (torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), "one-hot"),
    "a negative share": (MIXED + 0.1 * F.one_hot((Y + 1) % 10, 10) - 0.1 * F.one_hot((Y + 2) % 10, 10), "one-hot"),
    "NaN": (MIXED * torch.nan, "one-hot"),
    "255 for 1": (255 * F.one_hot(Y, 10), "one-hot"),
    "ties": (0.5 * F.one_hot(Y, 10) + 0.5 * F.one_hot((Y + 1) % 10, 10), "one largest entry"),
    "negative indices": (Y - 1, "counted from 0"),
}


@every_attack
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_that_name_no_class(case: Case, bad: str) -> None:
    def untouched(x: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    rows, message = BAD_ROWS[bad]
    with pytest.raises(ValueError, match=message):
        case.build()(untouched, X, rows)


@every_attack
def test_soft_labels_are_honoured(case: Case, model: Net) -> None:
    """As a loss of the user's own that has the rows: the whole row counts, and success is leaving its largest entry."""
    y = predicted(model, X)
    rows = 0.7 * F.one_hot(y, 10) + 0.3 * F.one_hot((y + 4) % 10, 10)
    if case.early:
        with pytest.raises(ValueError, match="Margin is not defined for rows of probabilities"):
            case.build()(model, X, rows)
        return

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        return -(rows[: len(logits)].repeat(len(logits) // len(X) or 1, 1) * logits.log_softmax(1)).sum(1)

    soft = case.build().run(model, X, rows)
    expected = case.build(loss=own).run(model, X, y)
    torch.testing.assert_close(soft.adversarial, expected.adversarial, rtol=0, atol=1e-5)
    assert torch.equal(soft.success, predicted(model, soft.adversarial) != y)
    hard = case.build()(model, X, y)
    assert (case.name in ("ddn", "anu")) or not torch.allclose(soft.adversarial, hard, rtol=0, atol=1e-4)


def test_soft_labels_move_with_those_that_stay_robust(model: Net) -> None:
    y = predicted(model, X)
    rows = 0.6 * F.one_hot(y, 10) + 0.4 * F.one_hot((y + 1) % 10, 10)
    attack = PGD(eps=0.05, steps=6, random_start=False, early_stop=True)
    together = attack.run(model, X, rows)
    alone = [attack.run(model, X[i : i + 1], rows[i : i + 1]) for i in range(6)]
    assert len(set(together.gradients.tolist())) > 1
    torch.testing.assert_close(together.adversarial, torch.cat([one.adversarial for one in alone]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [Margin(), DLR()])
def test_losses_that_know_single_classes_alone(loss: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(loss).__name__} is not defined for rows of probabilities"):
        PGD(loss=loss)(lambda x: pytest.fail("called"), X, MIXED)
    with pytest.raises(ValueError, match="one target class"):
        PGD()(lambda x: pytest.fail("called"), X, MIXED, targeted=True)


def test_rows_of_another_number_of_classes(model: Net) -> None:
    for rows in (F.one_hot(Y, 12), F.one_hot(Y, 7), torch.cat([MIXED, 0 * MIXED[:, :1]], 1)):
        with pytest.raises(ValueError, match="the model has 10"):
            PGD()(model, X, rows)


# --- no forward of its own


class Counting(nn.Module):
    """Counts forwards and backwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        z: Tensor = self.inner(x)
        if z.requires_grad:
            z.register_hook(self._back)
        return z

    def _back(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("steps", [1, 10])
def test_as_many_forwards_and_backwards_as_steps(steps: int, model: Net) -> None:
    counting = Counting(model)
    PGD(steps=steps)(counting, X, Y)
    assert (counting.forwards, counting.backwards) == (steps, steps)
    PGD(steps=steps).run(counting, X, Y)
    assert (counting.forwards, counting.backwards) == (2 * steps + 1, 2 * steps)


def test_one_graph_under_compile(model: Net) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    PGD(steps=3)(torch.compile(model, backend=backend), X, Y)
    assert len(graphs) == 1


class Wrapped(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrapped = Net().eval(), forward

    def forward(self, x: Tensor) -> Any:
        return self.wrapped(self.body, x)


Output = namedtuple("Output", ["hidden", "logits"])


def fixed(body: nn.Module, x: Tensor) -> Tensor:
    return body(x.view(6, 3, 6, 5))


def sloped(body: nn.Module, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(body(x).logsumexp(1).sum(), x, create_graph=True)
    return body(x + 0.01 * slope)


WORKING: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "casts its input": lambda body, x: body.double()(x.double()).float(),
    "takes one batch size": fixed,
    "differentiates itself": sloped,
    "non-reentrant checkpoint": lambda body, x: checkpoint(body, x, use_reentrant=False),
    "changes a copy in place": lambda body, x: body(x.clone().sub_(0.1)),
    "returns an entry": lambda body, x: {"loss": None, "logits": body(x)},
    "returns a named tuple": lambda body, x: Output(x, body(x)),
    "returns float64": lambda body, x: body(x).double(),
    "returns bfloat16": lambda body, x: body(x).bfloat16(),
}


@every_attack
@pytest.mark.parametrize("kind", WORKING)
def test_models_that_work_are_attacked(case: Case, kind: str) -> None:
    if kind == "takes one batch size" and (case.stacked or case.early):
        pytest.skip("copies are stacked, or the broken leave the batch")
    model = Wrapped(WORKING[kind])
    result = case.build().run(model, X, Y)
    assert (result.adversarial != X).any()
    assert result.adversarial.dtype == X.dtype
    assert result.success is not None


def test_exported_and_scripted_models() -> None:
    body = Net().eval()
    exported = torch.export.export(body, (X,)).module()
    expected = PGD(steps=3)(body, X, Y)
    for model in (exported, torch.jit.freeze(torch.jit.script(body)), torch.jit.trace(body, X)):
        torch.testing.assert_close(PGD(steps=3)(model, X, Y), expected, rtol=0, atol=1e-5)


def in_place(body: nn.Module, x: Tensor) -> Tensor:
    return body(x.sub_(0.1))


def in_place_view(body: nn.Module, x: Tensor) -> Tensor:
    x[:, 0] -= 0.1
    return body(x)


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "detached before the weights": (lambda body, x: body(x.detach()), "do not depend differentiably on its input"),
    "detached after the weights": (lambda body, x: body(x).detach(), "do not depend differentiably on its input"),
    "re-entrant checkpoint": (lambda body, x: checkpoint(body, x, use_reentrant=True), "use_reentrant=False"),
    "in place": (in_place, r"x = x\.clone\(\)"),
    "in place on a view": (in_place_view, r"x = x\.clone\(\)"),
    "a tuple": (lambda body, x: (body(x), x), r"nn\.Module.*Select\(model, 0\)"),
    "another entry": (lambda body, x: {"scores": body(x)}, r"Select\(model, 'scores'\)"),
    "None": (lambda body, x: None, "NoneType"),
    "one output": (lambda body, x: body(x)[:, :1], r"TwoLogits\(model\)"),
    "one dimension": (lambda body, x: body(x)[:, 0], r"TwoLogits\(model\)"),
    "a map of logits": (lambda body, x: body(x)[..., None], r"\(\d, 10, 1\) for \d images"),
    "integers": (lambda body, x: body(x).long(), "int64"),
    "no gradient allowed": (torch.no_grad()(lambda body, x: body(x)), "do not depend differentiably on its input"),
}


@every_attack
@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_attacked(case: Case, kind: str) -> None:
    forward, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        case.build()(Wrapped(forward), X, Y)


def test_in_place_changes_are_seen_without_gradients_too() -> None:
    with pytest.raises(ValueError, match=r"x = x\.clone\(\)"):
        TorchModel(Wrapped(in_place)).logits(X.clone())


@every_attack
def test_the_models_own_exceptions_pass(case: Case) -> None:
    class OwnError(Exception):
        pass

    def forward(body: nn.Module, x: Tensor) -> Tensor:
        raise OwnError("locked")

    with pytest.raises(OwnError) as caught:
        case.build()(Wrapped(forward), X, Y)
    assert str(caught.value) == "locked"
    assert "raised by the model for images of shape" in caught.value.__notes__[0]


# --- outputs


def test_the_wrappers_that_messages_name() -> None:
    body = Net().eval()
    expected = ATTACK(body, X, Y)
    assert torch.equal(ATTACK(Select(Wrapped(lambda body, x: (body(x), x))), X, Y), expected)
    assert torch.equal(ATTACK(Select(Wrapped(lambda body, x: {"s": body(x)}), "s"), X, Y), expected)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_two_logits_of_one(sigmoid: bool) -> None:
    body = Net().eval()
    one = Wrapped(lambda body, x: body(x)[:, :1].sigmoid() if sigmoid else body(x)[:, 0])
    wrapped = TwoLogits(one, sigmoid=sigmoid)
    z = body(X)[:, :1]
    torch.testing.assert_close(wrapped(X), torch.cat([torch.zeros_like(z), z], 1), rtol=1e-4, atol=1e-4)
    y = predicted(wrapped, X)
    adversarial = ATTACK(wrapped, X, y)
    moved = (body(adversarial) - body(X))[:, 0] * (1 - 2 * y)
    assert (moved > 0).all(), "away from the label"


# --- doubtful numbers


def brittle(where: Tensor, value: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """Logits that are no numbers for the examples at `where`, away from their clean images."""

    def forward(body: nn.Module, x: Tensor) -> Tensor:
        moved = (x.detach() - X).abs().flatten(1).amax(1) > 1e-4
        return torch.where((moved & where)[:, None], body(x) * 0 + value, body(x))

    return forward


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("attack", [FGSM(eps=0.1), BIM(eps=0.1, steps=6), DDN(steps=20), ANU(steps=20), PQGD(eps=0.1)])
def test_what_is_no_number_is_no_success(attack: Any, value: float) -> None:
    model = Wrapped(brittle(Y < 3, value))
    y = predicted(model, X)
    if isinstance(attack, PQGD):  # a random start would move the images before the first gradient
        attack = PQGD(eps=0.1, steps=6, random_start=False)
    with pytest.warns(RobustnessWarning, match="3 of 6 examples met NaN or infinite"):
        result = attack.run(model, X, y)
    assert result.doubtful.tolist() == [True] * 3 + [False] * 3
    assert not result.success[:3].any()
    assert result.success[3:].any()
    assert result.adversarial.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        assert attack(model, X, y).isfinite().all()


@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_may_still_break_what_met_nan(early_stop: bool) -> None:
    calls = []

    def forward(body: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return body(x) * (torch.nan if len(calls) == 2 else 1.0)

    model = Wrapped(forward)
    y = predicted(Net().eval(), X)
    attack = PGD(eps=0.1, steps=8, restarts=3, early_stop=early_stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        result = attack.run(model, X, y)
    assert result.success.all()
    assert not result.doubtful.any()


def test_nan_at_once_is_an_error() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ATTACK(Wrapped(lambda body, x, value=value: body(x) + value), X, Y)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.nan

    with pytest.raises(ValueError, match="non-finite gradient"):
        ATTACK(Wrapped(lambda body, x: body(Steep.apply(x))), X, Y)


SUSPICIOUS: dict[str, tuple[Any, Callable[[nn.Module, Tensor], Tensor], str]] = {
    "softmax": (ATTACK, lambda body, x: body(x).softmax(1), "probabilities"),
    "softmax in half precision": (ATTACK, lambda body, x: body(x).softmax(1).bfloat16(), "probabilities"),
    "no gradient": (ATTACK, lambda body, x: body(x.round() + 0 * x), "the gradient is zero at 6 of 6"),
    "eps of bytes": (PGD(eps=8.0, steps=2), lambda body, x: body(x), r"eps=8 allows any image.*eps=8/255"),
    "L2 eps of bytes": (PGD(eps=128.0, norm="L2", steps=2), lambda body, x: body(x), "eps=128 allows any image"),
    "a tensor of eps": (PGD(eps=torch.tensor(2.0), steps=2), lambda body, x: body(x), "eps=2 allows any image"),
}


@pytest.mark.parametrize("kind", SUSPICIOUS)
def test_suspicious_inputs_are_reported(kind: str) -> None:
    attack, forward, message = SUSPICIOUS[kind]
    with pytest.warns(RobustnessWarning, match=message) as caught:
        attack(Wrapped(forward), X, Y)
    assert len(caught) == 1


@every_attack
def test_nothing_is_reported_without_a_reason(case: Case, model: Net) -> None:
    """The fixture turns warnings into errors."""
    case.build().run(model, X, predicted(model, X))
    case.build().run(lambda x: model(x).log_softmax(1), X, Y)


def test_a_random_model_is_reported() -> None:
    """Where the verdict's forward disagrees with the one that took an example out."""
    calls = []

    def forward(body: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return body(x).roll(len(calls) % 2, 1)

    y = predicted(Net().eval(), X)
    with pytest.warns(RobustnessWarning, match="it is random"):
        PGD(eps=0.01, steps=2, early_stop=True).run(Wrapped(forward), X, y)
    with pytest.warns(RobustnessWarning, match="it is random"):
        DDN(steps=4).run(Wrapped(forward), X, y)


# --- sizes of every shape

EXAMPLES = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.05, 0.08]).reshape(6, 1, 1, 1)
FEATURES = torch.linspace(0, 0.08, 90).reshape(3, 6, 5)
CHANNELS = torch.tensor([0.0, 0.02, 0.06]).reshape(3, 1, 1)
SIZED = [case for case in CASES if case.bounded and not case.population]


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.name)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("more", [{}, {"direction": Clipped()}], ids=["own rule", "a length"])
def test_a_radius_for_every_example(case: Case, norm: str, more: dict[str, Any], model: Net) -> None:
    """Each example as under its own radius alone; the step follows the radius."""
    if norm not in case.cls.norms:
        pytest.skip("a norm the attack lacks")
    model, x = model.double(), X.double()
    words = {"norm": norm, **case.fixed, **more}
    together = case.build(**{**words, "eps": EXAMPLES.double()})(model, x, Y)
    for i in range(6):
        alone = case.build(**{**words, "eps": float(EXAMPLES[i].double())})(model, x[i : i + 1], Y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    assert torch.equal(together[0], x[0])


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.name)
@pytest.mark.parametrize("eps", [FEATURES, CHANNELS, FEATURES[None], CHANNELS * EXAMPLES.clamp_min(0.01) * 20], ids=str)
def test_a_radius_for_every_feature(case: Case, eps: Tensor, model: Net) -> None:
    found = case.build(eps=eps)(model, X, Y)
    moved = (found - X).abs()
    assert (moved <= eps + 1e-6).all()
    assert moved.amax() > 0.5 * eps.amax()
    if case.fixed == {} and case.name not in ("ngm", "clipped-ng", "clipped-ngm"):  # lengths know one radius each
        same = case.build(eps=torch.full((3, 6, 5), 0.05))(model, X, Y)
        torch.testing.assert_close(same, case.build(eps=0.05)(model, X, Y), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"early_stop": True}, {"restarts": 3}, {"restarts": 3, "early_stop": True}], ids=str
)
@pytest.mark.parametrize("attack", [PGD, VMIFGSM])
def test_radii_stay_with_their_examples(attack: Any, options: dict[str, Any], model: Net) -> None:
    y = predicted(model, X)
    words = {"steps": 6, "random_start": "restarts" in options, **options}
    found = attack(eps=EXAMPLES, alpha=EXAMPLES.clamp_min(1e-3) / 4, **words).run(model, X, y)
    moved = (found.adversarial - X).abs().flatten(1).amax(1)
    assert (moved <= EXAMPLES.flatten() + 1e-6).all()
    assert 0 < int(found.success.sum()) < 6
    assert torch.equal(found.success, predicted(model, found.adversarial) != y)
    assert (moved[1:] > 0.2 * EXAMPLES.flatten()[1:]).all()


def test_alpha_of_its_own_for_every_example(model: Net) -> None:
    alpha = torch.tensor([1e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3]).reshape(6, 1, 1, 1)
    moved = (BIM(eps=0.3, alpha=alpha, steps=1)(model, X, Y) - X).abs().flatten(1).amax(1)
    torch.testing.assert_close(moved, alpha.flatten(), rtol=1e-3, atol=1e-7)


BAD_SIZES: dict[str, tuple[Any, str]] = {
    "bare": (lambda: PGD(eps=torch.full((6,), 0.1)), r"\(6,\).*eps\.reshape\(-1, 1, 1, 1\)"),
    "other batch": (lambda: PGD(eps=torch.full((5, 1, 1, 1), 0.1)), r"\(5, 1, 1, 1\)"),
    "other shape": (lambda: PGD(eps=torch.full((3, 5, 6), 0.1)), r"\(3, 5, 6\)"),
    "alpha": (lambda: MIFGSM(alpha=torch.full((6, 1), 0.1)), "alpha has shape"),
    "negative": (lambda: PGD(eps=-EXAMPLES), "finite and at least 0"),
    "NaN": (lambda: PGD(eps=EXAMPLES * torch.nan), "finite"),
    "zero alpha": (lambda: PGD(alpha=EXAMPLES), "greater than 0"),
    "integers": (lambda: PGD(eps=torch.ones(6, 1, 1, 1, dtype=torch.long)), r"int64.*float"),
    "features in L2": (lambda: PGD(eps=FEATURES, norm="L2"), "nothing under L2"),
}


@pytest.mark.parametrize("kind", BAD_SIZES)
def test_sizes_that_fit_nothing(kind: str) -> None:
    build, message = BAD_SIZES[kind]
    with pytest.raises(ValueError, match=message):
        build()(lambda x: pytest.fail("called"), X, Y)


def test_a_bare_size_of_flat_examples_is_ambiguous() -> None:
    x, model = images(6, shape=(6,)), nn.Linear(6, 10)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        PGD(eps=torch.full((6,), 0.1))(model, x, Y)
    eps = torch.linspace(0, 0.1, 4)
    moved = (PGD(eps=eps)(nn.Linear(4, 10), x[:, :4], Y) - x[:, :4]).abs()
    assert (moved <= eps + 1e-6).all()
    assert SINIFGSM(eps=torch.tensor(0.1))(model, x, Y).shape == x.shape


@dataclass(frozen=True)
class Capped:
    """A third-party rule that cuts components off."""

    gamma: float | None = 0.1
    scale: str = "component"

    def init(self, x: Tensor) -> None:
        return None

    def __call__(self, m: Tensor, state: None, out: Tensor) -> tuple[Tensor, None]:
        return torch.clamp(m, -0.1, 0.1, out=out), state


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_scale_that_a_rule_declares_decides_on_its_step(norm: str, model: Net) -> None:
    ours = MIFGSM(norm=norm, direction=Clipped(gamma=0.1, scope="element"))
    theirs = MIFGSM(norm=norm, direction=Capped())
    assert ours.step_size(ours.direction, 90) == theirs.step_size(theirs.direction, 90)
    with pytest.raises(ValueError, match="no gamma, its limit"):
        MIFGSM(direction=Capped(gamma=None))(model, X, Y)
    assert MIFGSM(direction=Capped(gamma=None), alpha=0.1)(model, X, Y).shape == X.shape


# --- state


class Replacing(nn.Module):
    """A forward that replaces its buffer and changes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net().eval()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(10), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        z: Tensor = self.body(x)
        self.last.copy_(z.detach().mean(0))
        return z


@every_attack
def test_buffers_that_were_replaced_are_put_back(case: Case) -> None:
    model = Replacing()
    count, last = model.count, model.last
    case.build(**({"memory_budget": None} if case.bounded else {})).run(model, X, Y)
    assert model.count is count
    assert float(count) == 0
    assert model.last is last
    assert not last.any()


@pytest.mark.parametrize("early_stop", [False, True])
def test_targeted_restarts_keep_the_nearest(early_stop: bool, model: Net) -> None:
    """Of restarts that all failed, the one that came nearest to the target."""
    x, y = X, (predicted(model, X) + 5) % 10
    options = {"eps": 0.01, "alpha": 0.004, "steps": 2}
    merged = PGD(restarts=4, early_stop=early_stop, **options).run(
        model, x, y, targeted=True, generator=torch.Generator().manual_seed(3)
    )
    source = torch.Generator().manual_seed(3)
    single = [PGD(**options).run(model, x, y, targeted=True, generator=source) for _ in range(4)]
    assert not merged.success.any()
    with torch.no_grad():
        gaps = torch.stack([Margin()(model(one.adversarial), y) for one in single])
        found = Margin()(model(merged.adversarial), y)
    assert (gaps.amax(0) - gaps.amin(0) > 1e-3).all()
    torch.testing.assert_close(found, gaps.amin(0))
