"""The promises to users, on every attack through every host."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import BOUNDED, CASES, EPS, HOSTS, ROW_IDS, ROWS, TOLERANCE, Case, Net, images, predicted
from firstorder.attacks import Margin, Normalised, registry
from firstorder.attacks.distribution import DISTRIBUTION

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_bounded_attack = pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.name)
every_row = pytest.mark.parametrize(("case", "norm"), ROWS, ids=ROW_IDS)
every_separate_row = pytest.mark.parametrize(
    ("case", "norm"), [row for row in ROWS if not row[0].population], ids=[r for r in ROW_IDS if "blob" not in r]
)
every_host = pytest.mark.parametrize("host", HOSTS)


def test_the_table_has_every_attack_of_the_package() -> None:
    ours = {name for name, source in registry().sources.items() if source == DISTRIBUTION}
    assert ours == {case.name for case in CASES}


def size(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=torch.inf if norm == "Linf" else 2, dim=1)


@every_row
@every_host
@pytest.mark.parametrize("targeted", [False, True])
def test_feasible_and_effective(case: Case, norm: str, host: str, targeted: bool, model: Net) -> None:
    x = images()
    y = predicted(model, x)
    y = (y + 3) % 10 if targeted else y
    adversarial = HOSTS[host](case, model, x, y, norm=norm, targeted=targeted)
    assert adversarial.shape == x.shape
    assert adversarial.dtype == x.dtype
    assert adversarial.device == x.device
    assert not adversarial.requires_grad
    assert torch.isfinite(adversarial).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if not case.bounded:
        hit = predicted(model, adversarial) == y
        assert (hit if targeted else ~hit).all(), "every example must be adversarial"
        return
    assert (size(adversarial - x, norm) <= EPS[norm] + TOLERANCE).all()
    with torch.no_grad():
        before, after = (F.cross_entropy(model(a), y, reduction="none") for a in (x, adversarial))
    gain = before - after if targeted else after - before
    assert (gain > 0.1).all(), "every example must have moved the way the attack wants"
    assert (size(adversarial - x, norm) > 0.5 * EPS[norm]).all()


class Fragile(Net):
    """A network that fails at the n-th forward."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ArithmeticError("the model broke")
        return super().forward(x)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
    }


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in before:
        assert before[part].keys() == after[part].keys()
        for name, value in before[part].items():
            same = torch.equal(value, after[part][name]) if isinstance(value, Tensor) else value == after[part][name]
            assert same, f"{part} of {name} changed"


def disturb(model: nn.Module) -> None:
    """Give the model state that a careless attack would lose: mixed modes, gradients, a frozen parameter."""
    model.train()
    model.get_submodule("features.1").eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25 * index)
    next(model.parameters()).requires_grad_(False)


@every_attack
@every_host
@pytest.mark.parametrize("fail_at", [0, 4])
def test_the_model_is_as_it_was(case: Case, host: str, fail_at: int) -> None:
    model = Fragile(fail_at)
    x = images()
    y = predicted(Net(), x) if case.early else torch.arange(6)
    disturb(model)
    before = snapshot(model)
    if fail_at:
        steps: dict[str, Any] = {"steps": 6} if "steps" in case.parameters else {"random_start": True, "restarts": 4}
        steps |= {"eps": 1e-3} if case.early else {}
        with pytest.raises(ArithmeticError):
            HOSTS[host](case, model, x, y, **steps)
    else:
        HOSTS[host](case, model, x, y)
    assert_equal(before, snapshot(model))


@every_attack
def test_buffers_survive_an_attack_in_training_mode(case: Case) -> None:
    import firstorder.torchattacks

    model = Net().train()
    attack = getattr(firstorder.torchattacks, case.cls.__name__)(model, **case.required())
    attack.set_model_training_mode(model_training=True, batchnorm_training=True)
    before = snapshot(model)
    attack(images(), torch.arange(6))
    assert_equal(before, snapshot(model))


@every_separate_row
@every_host
def test_a_batch_equals_its_examples(case: Case, norm: str, host: str, model: Net) -> None:
    model, x = model.double(), images().double()
    y = predicted(model, x)
    whole = HOSTS[host](case, model, x, y, norm=norm, **case.fixed)
    single = [HOSTS[host](case, model, x[i : i + 1], y[i : i + 1], norm=norm, **case.fixed) for i in range(len(x))]
    torch.testing.assert_close(whole, torch.cat(single), rtol=0, atol=1e-12)


@every_bounded_attack
@every_host
def test_draws_come_from_the_callers_seed_alone(case: Case, host: str, model: Net) -> None:
    x, y = images(), torch.arange(6)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = (HOSTS[host](case, model, x, y, random_start=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert case.early or not torch.equal(one, other)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@every_attack
@every_host
def test_works_under_no_grad(case: Case, host: str, model: Net) -> None:
    x, y = images(), torch.arange(6)
    expected = HOSTS[host](case, model, x, y)
    with torch.no_grad():
        assert torch.equal(HOSTS[host](case, model, x, y), expected)


@every_attack
def test_inference_mode_is_refused_with_the_remedy(case: Case, model: Net) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        case.build()(model, images(), torch.arange(6))


@every_attack
@every_host
def test_one_hot_labels_equal_indices(case: Case, host: str, model: Net) -> None:
    x, y = images(), torch.arange(6)
    expected = HOSTS[host](case, model, x, y)
    for one_hot in (F.one_hot(y, 10), F.one_hot(y, 10).float()):
        assert torch.equal(HOSTS[host](case, model, x, one_hot), expected)


@every_row
@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4, 3), (3, 5, 9)])
def test_any_input_rank(case: Case, norm: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = images(5, shape=shape)
    if case.of_images and len(shape) != 3:
        with pytest.raises(ValueError, match=r"images \(N, C, H, W\), these have shape"):
            case.build(norm)(lambda z: z, x, torch.arange(5))
        return
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10), nn.Tanh(), nn.Linear(10, 4))
    y = predicted(model, x)
    result = case.build(norm, **case.required(shape)).run(model, x, y)
    assert result.adversarial.shape == x.shape
    if case.bounded:
        assert (size(result.adversarial - x, norm) <= EPS[norm] + TOLERANCE).all()
    margin = Margin()
    with torch.no_grad():
        assert (margin(model(result.adversarial), y) > margin(model(x), y)).all()


@every_row
@pytest.mark.parametrize("host", ["core", "art"])
def test_a_mask_is_respected(case: Case, norm: str, host: str, model: Net) -> None:
    x = images()
    y = predicted(model, x)
    mask = torch.zeros(3, 6, 5)
    mask[:, 2:5] = 1
    delta = HOSTS[host](case, model, x, y, norm=norm, mask=mask) - x
    assert (delta[:, mask == 0] == 0).all()
    assert (delta[:, mask == 1].abs().flatten(1).amax(1) > 0.01).all()


@every_attack
def test_the_batch_may_be_empty(case: Case, model: Net) -> None:
    x = images()[:0]
    assert case.build()(model, x, torch.arange(0)).shape == x.shape


@every_bounded_attack
@every_host
def test_a_zero_radius_returns_the_input(case: Case, host: str, model: Net) -> None:
    class Zero(Case):
        def build(self, norm: str = "Linf", **more: Any) -> Any:
            return self.cls(norm=norm, eps=0.0, **{**self.parameters, **more})

    x = images()
    assert torch.equal(HOSTS[host](Zero(case.name, case.parameters), model, x, torch.arange(6)), x)


@pytest.mark.parametrize("case", [c for c in CASES if not c.population], ids=lambda case: case.name)
def test_a_zero_gradient_gives_a_zero_step(case: Case) -> None:
    """Without interaction: a population moves apart where nothing else drives it."""
    x = images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 10))
    nn.init.zeros_(model[1].weight)
    assert torch.equal(case.build(**case.fixed)(model, x, torch.arange(6)), x)


@every_attack
@every_host
def test_nothing_is_printed(case: Case, host: str, model: Net, capfd: pytest.CaptureFixture[str]) -> None:
    HOSTS[host](case, model, images(), torch.arange(6))
    assert capfd.readouterr() == ("", "")


@every_row
def test_a_model_with_a_shared_or_expanded_gradient(case: Case, norm: str) -> None:
    """The memory of the gradient belongs to the model: it may be expanded, or a tensor the model keeps."""
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    kept = weight.clone()
    x = images()
    y = (x.sum((2, 3)) @ weight).argmax(1)
    adversarial = case.build(norm)(lambda z: z.sum((2, 3)) @ weight, x, y)
    assert torch.equal(weight, kept)
    assert not torch.equal(adversarial, x)


@pytest.mark.parametrize(("case", "norm"), [row for row in ROWS if row[0].bounded], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case: Case, norm: str, dtype: torch.dtype) -> None:
    """Small and large gradients give the steps that float32 gives, up to the rounding of the dtype.

    An attack that follows losses needs them large enough to differ in the dtype.
    """
    x = images().double()
    for scale in (100.0,) if case.name == "apgd" else (1e-3, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(90, 10)).double()
        model[1].weight.data.mul_(scale)
        y = (predicted(model, x) + 1) % 10
        full = case.build(norm, **case.fixed)(model, x, y)
        half = case.build(norm, **case.fixed)(model.to(dtype), x.to(dtype), y)
        assert half.dtype == dtype
        tolerance = 0.01 if norm == "Linf" else 0.1
        assert ((half.double() - full).abs() <= tolerance).double().mean() > 0.9


def test_tiny_gradients_are_normalised_in_l2() -> None:
    for scale in (1e-30, 1.0, 1e20):
        m = torch.full((1, 4), scale)
        unit, _ = Normalised()(m, None, torch.empty_like(m))
        torch.testing.assert_close(unit, torch.full((1, 4), 0.5))


def test_the_models_own_error_has_a_note(model: Net) -> None:
    with pytest.raises(RuntimeError, match="expected input") as caught:
        CASES[0].build()(model, images(shape=(4, 6, 5)), torch.arange(6))
    assert re.search(r"raised by the model for images of shape \(6, 4, 6, 5\)", caught.value.__notes__[0])
