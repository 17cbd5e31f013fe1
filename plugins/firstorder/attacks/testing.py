"""The promises of an attack as checks for attacks of other packages.

    from firstorder.attacks.testing import check_attack
    check_attack(MyAttack)                      # or check_attack(MyAttack(steps=5)); raises AssertionError

`CHECKS` has them one by one, for pytest.mark.parametrize.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstorder.attacks.base import Attack
from firstorder.attacks.bounded import BoundedAttack
from firstorder.attacks.inspection import RobustnessWarning

Check = Callable[[Attack[Any]], None]

TOLERANCE = 1e-6
"""How far rounding in float32 may carry an example beyond the ball, in units of images in [0, 1]; bounds are exact."""


class Network(nn.Module):
    """A small classifier of images (N, 3, 6, 5) in ten classes, with BatchNorm, dropout and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(beta=4))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(240, 10))
        for parameter in self.parameters():
            values = torch.rand(parameter.shape, generator=source) * 2 - 1
            parameter.data.copy_(values / max(parameter[0].numel(), 4) ** 0.5 * 1.5)
        self.features.get_parameter("1.weight").data.abs_().add_(0.5)
        self.fail = self.overflow = False
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        self.calls += 1
        if self.fail:
            raise ArithmeticError("the model broke")
        logits: Tensor = self.head(self.features(x))
        return logits + torch.nan if self.overflow and self.calls > 1 else logits


def check_attack(attack: type[Attack[Any]] | Attack[Any]) -> None:
    """Require of an attack what users rely on.

    Args:
        attack: a class whose parameters have defaults, or an attack, best a small one: it is run some thirty times.

    Raises:
        AssertionError: a promise is broken; the message names the check and what it found.
    """
    for name, check in CHECKS.items():
        try:
            check(instance(attack))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def instance(attack: type[Attack[Any]] | Attack[Any]) -> Attack[Any]:
    """The attack itself, or a class's with its defaults."""
    assert isinstance(attack, Attack) or (isinstance(attack, type) and issubclass(attack, Attack)), (
        f"{attack!r} is no subclass of firstorder.attacks.Attack"
    )
    return attack if isinstance(attack, Attack) else attack()


def is_a_frozen_dataclass(attack: Attack[Any]) -> None:
    """An attack is its hyper-parameters: a frozen dataclass that can be copied with other ones."""
    cls = type(attack)
    assert is_dataclass(attack), f"{cls.__name__} is no dataclass; decorate it with @dataclass(frozen=True)"
    own = cls.__dict__.get("__dataclass_params__")
    assert getattr(own, "frozen", False), f"{cls.__name__} is not frozen; decorate it with @dataclass(frozen=True)"
    assert all(field.kw_only for field in fields(attack)), "its fields must be keyword-only: kw_only=True"
    copied = replace(attack)
    assert type(copied) is cls, "a copy with the same parameters is of another class"


def stays_feasible(attack: Attack[Any]) -> None:
    """Within the ball and the bounds, of the shape, dtype and device of the images, detached and finite."""
    model, x, y = _setting()
    for dtype in (torch.float32, torch.float64):
        images = x.to(dtype)
        found = _run(attack, model.to(dtype), images, y)
        assert found.shape == x.shape, f"the shape is {tuple(found.shape)}, not {tuple(x.shape)}"
        assert found.dtype == dtype, f"the dtype is {found.dtype}, not {dtype}"
        assert found.device == x.device, f"the device is {found.device}, not {x.device}"
        assert not found.requires_grad, "the result is not detached"
        assert bool(found.isfinite().all()), "the result is not finite"
        assert float(found.min()) >= 0, f"the bounds are left: {float(found.min())}"
        assert float(found.max()) <= 1, f"the bounds are left: {float(found.max())}"
        if isinstance(attack, BoundedAttack):
            size = torch.linalg.vector_norm((found - images).flatten(1), torch.inf if attack.norm == "Linf" else 2, 1)
            excess = float((size - torch.as_tensor(attack.eps).flatten()).amax())
            assert excess <= TOLERANCE, f"the ball of radius {attack.eps} is left by {excess:g}"


def does_something(attack: Attack[Any]) -> None:
    """The loss rises for every example, or it is broken."""
    model, x, y = _setting()
    found = _run(attack, model, x, y)
    with torch.no_grad():
        before, logits = F.cross_entropy(model(x), y, reduction="none"), model(found)
    better = (F.cross_entropy(logits, y, reduction="none") > before) | (logits.argmax(1) != y)
    assert bool(better.all()), f"{int((~better).sum())} of {len(x)} examples did not come closer to being misclassified"


def reports_what_it_found(attack: Attack[Any]) -> None:
    """`run` returns the examples that the call returns, and their success as a forward of one's own finds it."""
    model, x, y = _setting()
    result = attack.run(model, x, y, generator=_source())
    assert torch.equal(result.adversarial, _run(attack, model, x, y)), "run() and the call find different examples"
    with torch.no_grad():
        broken = model(result.adversarial).argmax(1) != y
    assert result.success is not None, "run() must return success"
    assert torch.equal(result.success, broken), f"success is {result.success.tolist()}, in truth {broken.tolist()}"
    assert result.gradients.shape == (len(x),), "gradients must be (N,)"
    assert bool((result.gradients >= 0).all()), "gradients are counts"


def leaves_the_model_as_it_was(attack: Attack[Any]) -> None:
    """Parameters, gradients, buffers and the mode of every part come back, also after an exception."""
    for fail in (False, True):
        model, x, y = _setting()
        model.train()
        model.features[1].eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        next(model.parameters()).requires_grad_(False)
        before = _state(model)
        model.fail = fail
        if fail:
            _raises(ArithmeticError, lambda: attack(model, x, y, generator=_source()))  # noqa: B023
        else:
            _run(attack, model, x, y)
        changed = [name for name, value in _state(model).items() if not _same(value, before[name])]
        assert not changed, f"changed{' after an exception' if fail else ''}: {', '.join(changed)}"


def keeps_examples_apart(attack: Attack[Any]) -> None:
    """No example's result depends on another's image, unless the class says `population = True`."""
    if attack.population:
        return
    model, x, y = _setting()
    model, x = model.double(), x.double()
    other = x.clone()
    other[0] = x[0].flip(-1) * 0.5
    one, two = (_run(attack, model, images, y) for images in (x, other))
    assert torch.allclose(one[1:], two[1:], rtol=0, atol=1e-9), "examples change with another example's image"


def draws_from_the_generator(attack: Attack[Any]) -> None:
    """The caller's generator decides every draw; no global random state is touched."""
    model, x, y = _setting()
    before = torch.get_rng_state()
    one, two = (_run(attack, model, x, y) for _ in range(2))
    assert torch.equal(one, two), "the same generator gives different results"
    _ = attack(model, x, y)
    assert torch.equal(before, torch.get_rng_state()), "torch's global random state was touched"


def works_where_gradients_are_off(attack: Attack[Any]) -> None:
    """Under torch.no_grad() as without; inference mode is refused with the remedy."""
    model, x, y = _setting()
    with torch.no_grad():
        found = _run(attack, model, x, y)
    assert torch.equal(found, _run(attack, model, x, y)), "the result differs under torch.no_grad()"
    with torch.inference_mode():
        said = _raises(RuntimeError, lambda: attack(model, x, y))
    assert "no_grad" in said, f"inference mode needs the remedy torch.no_grad(), not: {said}"


def reads_labels(attack: Attack[Any]) -> None:
    """One-hot rows and integers of any width are the same labels; a target is moved towards, or refused."""
    model, x, y = _setting()
    expected = _run(attack, model, x, y)
    for labels in (F.one_hot(y, 10), F.one_hot(y, 10).float(), y.to(torch.uint8), y.to(torch.int32)):
        assert torch.equal(_run(attack, model, x, labels), expected), f"other results for labels of {labels.dtype}"
    target = (y + 3) % 10
    try:
        found = attack(model, x, target, targeted=True, generator=_source())
    except ValueError:
        return
    with torch.no_grad():
        before, logits = F.cross_entropy(model(x), target, reduction="none"), model(found)
    closer = (F.cross_entropy(logits, target, reduction="none") < before) | (logits.argmax(1) == target)
    assert bool(closer.all()), "in targeted mode examples do not come closer to their targets"


def respects_the_mask(attack: Attack[Any]) -> None:
    """Where the mask is zero the image stays as it is."""
    model, x, y = _setting()
    mask = torch.zeros(3, 6, 5)
    mask[:, 2:5] = 1
    moved = attack(model, x, y, mask=mask, generator=_source()) - x
    assert not bool(moved[:, mask == 0].any()), "pixels moved where the mask is zero"
    assert bool(moved[:, mask == 1].any()), "nothing moved where the mask is one"


def refuses_bad_input(attack: Attack[Any]) -> None:
    """A ValueError before the model is called; an empty batch is no error."""
    model, x, y = _setting()
    model.fail = True
    bad: list[tuple[str, Any, Any]] = [
        ("NaN", x * torch.nan, y),
        ("images in [0, 255]", x * 255, y),
        ("bytes", (x * 255).byte(), y),
        ("too few labels", x, y[:3]),
        ("rows of several classes", x, F.one_hot(y, 10) + F.one_hot((y + 1) % 10, 10)),
        ("negative labels", x, y - 10),
    ]
    for what, images, labels in bad:
        said = _raises(ValueError, lambda: attack(model, images, labels))  # noqa: B023
        assert said, f"the refusal of {what} says nothing"
    assert attack(model, x[:0], y[:0]).shape == x[:0].shape, "an empty batch comes back as another shape"
    model.fail = False
    _raises(ValueError, lambda: attack(model, x, y + 5))


def takes_no_nan_for_success(attack: Attack[Any]) -> None:
    """Logits that become NaN break nothing, and the result is finite; or the attack refuses to go on."""
    model, x, y = _setting()
    model.overflow, model.calls = True, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        try:
            result = attack.run(model, x, y, generator=_source())
        except ValueError:
            return
    assert result.success is not None, "run() must return success"
    assert not bool(result.success.any()), "NaN logits count as success"
    assert bool(result.adversarial.isfinite().all()), "the result is not finite"


def passes_the_models_own_exception(attack: Attack[Any]) -> None:
    """An exception of the user's model reaches the user as it is."""
    model, x, y = _setting()
    model.fail = True
    said = _raises(ArithmeticError, lambda: attack(model, x, y))
    assert said == "the model broke", f"it became {said!r}"


def prints_nothing(attack: Attack[Any]) -> None:
    """Progress is for logging."""
    model, x, y = _setting()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        _run(attack, model, x, y)
    assert not out.getvalue() + err.getvalue(), f"printed: {(out.getvalue() + err.getvalue())[:200]!r}"


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        check.__name__: check
        for check in (
            is_a_frozen_dataclass,
            stays_feasible,
            does_something,
            reports_what_it_found,
            leaves_the_model_as_it_was,
            keeps_examples_apart,
            draws_from_the_generator,
            works_where_gradients_are_off,
            reads_labels,
            respects_the_mask,
            refuses_bad_input,
            takes_no_nan_for_success,
            passes_the_models_own_exception,
            prints_nothing,
        )
    }
)
"""The checks by name, in the order in which `check_attack` makes them."""


def _setting() -> tuple[Network, Tensor, Tensor]:
    """A model, images (6, 3, 6, 5) in [0, 1], some of them at the bounds, and the model's own classes."""
    model = Network().eval()
    x = (1.2 * torch.rand(6, 3, 6, 5, generator=_source()) - 0.1).clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y


def _source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _run(attack: Attack[Any], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attack(model, x, y, generator=_source())


def _raises(kind: type[BaseException], call: Callable[[], object]) -> str:
    """What the exception of this kind says that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise AssertionError(f"no {kind.__name__} was raised")


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {f"mode of {name or 'the model'}": part.training for name, part in model.named_modules()}
    for name, parameter in model.named_parameters():
        found |= {name: parameter.detach().clone(), f"{name}.requires_grad": parameter.requires_grad}
        found[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other
