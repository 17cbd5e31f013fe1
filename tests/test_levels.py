"""Bounded attacks on levels: what is saved as bytes is what was found, in the ball and with the same prediction."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import BOUNDED, EPS, HOSTS, TOLERANCE, Case, Net, images, predicted
from firstorder.attacks import BIM, FGSM, PGD
from firstorder.attacks.levels import BallGrid, Levels, grid

ROWS = [(case, norm) for case in BOUNDED for norm in case.cls.norms]
IDS = [f"{case.name}-{norm}" for case, norm in ROWS]
PLAIN = Case("i-fgsm", {"steps": 4})


def stored(a: Tensor) -> Tensor:
    """Images in [0, 1], saved as bytes and loaded again."""
    return (a * 255).round().to(torch.uint8).to(a.dtype) / 255


def sizes(delta: Tensor, norm: str) -> Tensor:
    order = torch.inf if norm == "Linf" else 2
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)


def on_grid(n: int = 6) -> Tensor:
    return stored(images(n))


# --- every attack


@pytest.mark.parametrize("off", [False, True], ids=["bytes", "between"])
@pytest.mark.parametrize(("case", "norm"), ROWS, ids=IDS)
def test_what_is_stored_is_what_was_found(case: Case, norm: str, off: bool) -> None:
    """Of images that are bytes, and of images that lie between bytes."""
    model, x = Net().eval(), images() if off else on_grid()
    y, seen = predicted(model, x), []
    attack = case.build(norm, levels=256)
    source = torch.Generator().manual_seed(0)
    result = attack.run(model, x, y, generator=source, hook=lambda t, g, a: seen.append(a.clone()))
    for a in (*seen, result.adversarial):
        assert torch.equal(stored(a), a)
        assert (sizes(a - x, norm) <= EPS[norm] + TOLERANCE).all()
        assert a.min() >= 0
        assert a.max() <= 1
    assert result.success is not None
    assert torch.equal(predicted(model, stored(result.adversarial)) != y, result.success)
    free = case.build(norm).run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(stored(free.adversarial), free.adversarial)
    losses = [nn.functional.cross_entropy(model(a), y, reduction="none") for a in (x, result.adversarial)]
    assert (losses[1] > losses[0]).all()
    assert result.success.sum() >= free.success.sum() - 1


@pytest.mark.parametrize("host", HOSTS)
def test_through_every_host(host: str) -> None:
    model, x = Net().eval(), on_grid()
    y = predicted(model, x)
    found = HOSTS[host](PLAIN, model, x, y, levels=256)
    assert torch.equal(stored(found), found)
    assert (sizes(found - x, "Linf") <= EPS["Linf"] + TOLERANCE).all()
    assert not torch.equal(found, HOSTS[host](PLAIN, model, x, y))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize(
    "options", [{"restarts": 3}, {"early_stop": True}, {"early_stop": True, "restarts": 2}], ids=str
)
def test_with_restarts_and_where_examples_leave(norm: str, options: dict[str, Any]) -> None:
    model, x = Net().eval(), on_grid()
    y = predicted(model, x)
    result = PGD(eps=EPS[norm], norm=norm, steps=8, levels=256, **options).run(model, x, y)
    assert torch.equal(stored(result.adversarial), result.adversarial)
    assert (sizes(result.adversarial - x, norm) <= EPS[norm] + TOLERANCE).all()
    assert result.success is not None
    assert torch.equal(predicted(model, result.adversarial) != y, result.success)
    assert result.success.any()


@pytest.mark.parametrize("norm", EPS)
def test_examples_are_independent(norm: str) -> None:
    model, x = Net().eval(), images()
    y = predicted(model, x)
    attack = BIM(eps=EPS[norm], norm=norm, steps=5, levels=32)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    assert torch.equal(attack(model, x, y), alone)


@pytest.mark.parametrize("norm", EPS)
def test_steps_shorter_than_a_level_add_up(norm: str) -> None:
    """Steps of a tenth of a level, or of an L2 length far below one in every element, go as far as long ones."""
    model, x = Net().eval(), on_grid()
    y = predicted(model, x)
    eps, alpha = (8 / 255, 0.1 / 255) if norm == "Linf" else (EPS[norm], EPS[norm] / 100)
    found = BIM(eps=eps, norm=norm, steps=100, alpha=alpha, levels=256)(model, x, y)
    free = BIM(eps=eps, norm=norm, steps=100, alpha=alpha)(model, x, y)
    assert (sizes(found - x, norm) > 0.9 * sizes(free - x, norm)).all()


# --- limits


@pytest.mark.parametrize("norm", EPS)
def test_what_a_mask_keeps_is_not_rounded(norm: str) -> None:
    model, x = Net().eval(), images()
    y = predicted(model, x)
    mask = torch.ones(3, 6, 5)
    mask[1] = 0
    found = PGD(eps=EPS[norm], norm=norm, steps=4, levels=256)(model, x, y, mask=mask)
    assert torch.equal(found[:, 1], x[:, 1])
    assert torch.equal(stored(found)[:, ::2], found[:, ::2])
    assert (found != x)[:, ::2].any()
    assert (sizes(found - x, norm) <= EPS[norm] + TOLERANCE).all()


@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (1, 3, 6, 5)], ids=str)
def test_tensor_radii(shape: tuple[int, ...]) -> None:
    model, x = Net().eval(), on_grid()
    y = predicted(model, x)
    eps = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    eps.flatten()[0] = 0
    for early_stop in (False, True):
        found = PGD(eps=eps, alpha=0.02, steps=4, levels=256, early_stop=early_stop)(model, x, y)
        assert torch.equal(stored(found), found)
        assert ((found - x).abs() <= eps + TOLERANCE).all()
        assert (found != x).any()
    if shape[1:] == (1, 1, 1):
        found = PGD(eps=10 * eps, alpha=0.2, norm="L2", steps=4, early_stop=True, levels=256)(model, x, y)
        assert torch.equal(stored(found), found)
        assert (sizes(found - x, "L2") <= 10 * eps.flatten() + TOLERANCE).all()


@pytest.mark.parametrize("norm", EPS)
def test_other_bounds(norm: str) -> None:
    """Images in [0, 255] are whole numbers; limits of channels have levels of their own."""
    model, x = Net().eval(), on_grid()
    y = predicted(model, x)
    attack = BIM(eps=255 * EPS[norm], norm=norm, steps=4, levels=256)
    found = attack(lambda z: model(z / 255), x * 255, y, bounds=(0, 255))
    assert torch.equal(found, found.round())
    assert (sizes(found - x * 255, norm) <= 255 * EPS[norm] + 1e-4).all()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    bounds = ((0 - mean) / std, (1 - mean) / std)
    eps: Any = EPS[norm] / std if norm == "Linf" else EPS[norm]
    z = (x - mean) / std
    found = BIM(eps=eps, norm=norm, steps=4, levels=256)(lambda z: model(z * std + mean), z, y, bounds=bounds)
    at = (found * std + mean) * 255
    assert (at - at.round()).abs().max() < 1e-3
    assert (found != z).any()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions(norm: str, dtype: torch.dtype) -> None:
    """The level that is stored is the one that was found, and what half precision makes of it is in the ball."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 10)).to(dtype)
    x = images().to(dtype)
    found = BIM(eps=EPS[norm], norm=norm, steps=4, levels=256)(model, x, predicted(model, x))
    whole = torch.promote_types(dtype, torch.float32)
    again = (found.to(whole) * 255).round().to(torch.uint8).to(whole) / 255
    assert torch.equal(again.to(dtype), found)
    slack = 1e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert (sizes(found - x, norm) <= EPS[norm] + slack).all()
    assert (found != x).any()


@pytest.mark.parametrize("up", [True, False])
def test_a_ball_of_whole_levels_is_used_to_its_end(up: bool) -> None:
    """eps = k/255 from bytes is k levels in every pixel, whatever rounding says; eps = 0 leaves bytes as they are."""
    x, y = (torch.arange(256.0) / 255).reshape(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    linear = nn.Linear(256, 2)
    model = nn.Sequential(nn.Flatten(), linear)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-0.01], [0.01]]).expand(2, 256) * (1 if up else -1))
    for k in range(33):
        found = FGSM(eps=k / 255, levels=256)(model, x, y)
        at = (x * 255).round() + (k if up else -k)
        assert torch.equal(found, at.clamp(0, 255) / 255)
    assert torch.equal(FGSM(eps=0.0, norm="L2", levels=256)(model, x, y), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "levels=1 must be an integer of at least 2"),
        ({"levels": 2.5}, "levels=2.5 must be an integer"),
    ],
)
def test_what_is_no_number_of_levels_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**options)


@pytest.mark.parametrize("norm", EPS)
def test_a_ball_without_a_level_is_refused_before_any_work(norm: str) -> None:
    def untouched(x: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    x = images()
    x[2:] = stored(x[2:])
    attack = BIM(eps=0.1 / 255, norm=norm, steps=2, levels=256)
    with pytest.raises(ValueError, match=r"levels=256 has no image within eps of 2 of the 6 images.*round them first"):
        attack(untouched, x, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="levels=256 needs finite bounds"):
        attack(untouched, stored(x), torch.zeros(6, dtype=torch.long), bounds=None)
    model = Net().eval()
    assert torch.equal(attack(model, stored(x), predicted(model, x)), stored(x))


# --- the points


elements = st.integers(0, 1000).map(lambda n: n / 1000)


@settings(max_examples=200, deadline=None)
@given(x=elements, a=elements, eps=st.integers(1, 300).map(lambda n: n / 1000), count=st.integers(2, 256))
def test_the_nearest_level_of_an_interval(x: float, a: float, eps: float, count: int) -> None:
    """Against all levels, in fractions."""
    center, at = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[a]], dtype=torch.float64)
    levels = Levels(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), count)
    box = grid("Linf", center, eps, levels, None)
    exact = [Fraction(k, count - 1) for k in range(count)]
    limits = Fraction(round(x * 1000), 1000), Fraction(round(eps * 1000), 1000)
    inside = [k for k in exact if abs(k - limits[0]) <= limits[1]]
    assert bool(box.empty()) == (not inside)
    if not inside:
        return
    found = box.nearest(at)
    k = Fraction(round(float(found) * (count - 1)), count - 1)
    assert float(found) == float(k)
    assert k in inside
    target = min(max(Fraction(round(a * 1000), 1000), limits[0] - limits[1]), limits[0] + limits[1])
    assert abs(k - target) <= min(abs(k - target) for k in inside) + Fraction(1, 10**6)


def slow_point(x: list[float], a: list[float], eps: float, count: int) -> list[int]:
    """The levels of the last rounded point inside, on the way in 2^10 parts, element by element."""
    top = count - 1
    base = [round(v * top) for v in x]
    for part in range(1024, -1, -1):
        ks = [b + round(part / 1024 * (v * top - b)) for b, v in zip(base, a, strict=True)]
        ks = [min(max(k, 0), top) for k in ks]
        if sum((k / top - v) ** 2 for k, v in zip(ks, x, strict=True)) ** 0.5 <= eps:
            return ks
    raise AssertionError("no point is inside")


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.sampled_from([8, 32, 256]), eps=st.sampled_from([0.2, 0.5, 1.0]))
def test_the_last_point_of_a_ball(seed: int, count: int, eps: float) -> None:
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 5, generator=source, dtype=torch.float64)
    a = torch.rand(3, 5, generator=source, dtype=torch.float64)
    ball = BallGrid(Levels(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype), count), x, eps, 2, None)
    found = (ball.nearest(a) * (count - 1)).round().long().tolist()
    assert not ball.empty().any()
    assert found == [slow_point(p, q, eps, count) for p, q in zip(x.tolist(), a.tolist(), strict=True)]


def test_a_ball_in_another_norm() -> None:
    x, a = images(4).flatten(1), images(4, seed=1).flatten(1)
    ball = grid("L1", x, 6.0, Levels(torch.zeros(()), torch.ones(()), 64), None)
    found = ball.nearest(a)
    assert torch.equal((found * 63).round() / 63, found)
    assert ((found - x).abs().sum(1) <= 6.0 + 1e-5).all()
    assert ((found - x).abs().sum(1) > 5.5).all()


def test_a_grid_is_narrowed_to_the_examples_left() -> None:
    x = images()
    ball = grid("L2", x, torch.arange(6.0).reshape(6, 1, 1, 1), Levels(torch.zeros(()), torch.ones(()), 9), None)
    part = ball.take(torch.tensor([4, 1]))
    assert torch.equal(part.nearest(1 - x[[4, 1]]), ball.nearest(1 - x)[[4, 1]])
