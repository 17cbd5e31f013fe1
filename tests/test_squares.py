"""Random search by blocks, against a transcription with explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from firstorder.attacks import Verdict
from firstorder.attacks.squares import Blocks, SquareSearch

SHAPE, EPS, STEPS = (2, 6, 5), 0.2, 40


def model(kind: str = "images", seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(SHAPE) if kind == "images" else 12
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    return net


def batch(net: nn.Module, kind: str = "images") -> tuple[Tensor, Tensor]:
    shape = SHAPE if kind == "images" else (12,)
    x = torch.rand(9, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return x, net(x).argmax(1)


def margin(net: nn.Module, a: Tensor, y: int) -> float:
    """How far the label is above every other class."""
    with torch.no_grad():
        z = net(a[None])[0].tolist()
    return float(z[y] - max(value for k, value in enumerate(z) if k != y))


def slow(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor, start: Tensor) -> tuple[list[Tensor], list[int]]:
    """The best iterates, and the forwards of the loop."""
    shares, sides = (0.3, 0.02), x.shape[2:] if x.ndim > 2 else x.shape[1:]
    channels = x.shape[1] if x.ndim > 2 else 1
    generator, found, spent = torch.Generator().manual_seed(8), [], []
    draws = [
        torch.rand(1, len(x), len(sides) + channels, generator=generator, dtype=torch.float64)[0] for _ in range(STEPS)
    ]
    for i, begin in enumerate(start):
        best, top, candidate = begin, math.inf, begin
        for t in range(STEPS + 1):
            now = margin(net, candidate, int(y[i]))
            if now < top:
                best, top = candidate, now
            if now < 0 or t == STEPS:
                break
            share = shares[0] * (shares[1] / shares[0]) ** (t / STEPS)
            drawn = draws[t][i].tolist()
            candidate = best.clone()
            for place in torch.cartesian_prod(*(torch.arange(n) for n in x[i].shape)).reshape(-1, x[i].ndim).tolist():
                channel, at = (place[0], place[1:]) if x.ndim > 2 else (0, place)
                inside = True
                for axis, side in enumerate(sides):
                    length = max(round(side * share ** (1 / len(sides))), 1)
                    first = int(drawn[axis] * (side - length + 1))
                    inside = inside and first <= at[axis] < first + length
                if inside and bool(mask[(i, *place)]):
                    sign = 1 if drawn[len(sides) + channel] >= 0.5 else -1
                    value = float(x[(i, *place)]) + sign * EPS
                    candidate[tuple(place)] = min(max(value, 0.0), 1.0)
        found.append(best)
        spent.append(t)
    return found, spent


@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_transcription(kind: str, masked: bool) -> None:
    net = model(kind)
    x, y = batch(net, kind)
    mask = torch.ones_like(x, dtype=torch.bool)
    if masked:
        mask[..., 1] = False
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = torch.where(mask, (x + EPS * (2 * noise - 1)).clamp(0, 1), x)
    best, spent = slow(net, x, y, mask, start)
    attack = SquareSearch(eps=EPS, steps=STEPS, shares=(0.3, 0.02), loss="margin", early_stop=True)
    calls: list[int] = []
    handle = net.register_forward_hook(lambda _, given, out: calls.append(int(out.requires_grad)))
    result = attack.run(net, x, y, start=start, mask=mask, generator=torch.Generator().manual_seed(8))
    handle.remove()
    assert not any(calls)  # no forward was for a gradient
    assert result.gradients.tolist() == [0] * len(x)
    assert result.success is not None
    broken = [margin(net, a, int(k)) < 0 for a, k in zip(best, y, strict=True)]
    assert result.success.tolist() == broken
    assert len(set(broken)) == 2  # or the test shows one case alone
    assert len(set(spent)) > 2
    torch.testing.assert_close(result.adversarial, torch.stack(best), rtol=0, atol=1e-12)


def test_shares_are_refused() -> None:
    for shares in ((0.0, 0.1), (0.1, 1.5)):
        with pytest.raises(ValueError, match="shares="):
            Blocks(shares=shares, steps=3)


def test_the_verdict_of_effort_2_goes_on_from_its_best_points() -> None:
    net = model()
    x, y = batch(net)
    plan = Verdict(effort=2).plan()
    chosen = [stage for stage in plan.closing if isinstance(stage.attack, SquareSearch)]
    assert chosen
    assert all(stage.resume and stage.gradients == 0 for stage in chosen)
    for other in (Verdict(effort=0).plan(), Verdict(effort=2, norm="L2").plan(), Verdict(loss=None).plan()):
        assert not any(isinstance(stage.attack, SquareSearch) for stage in (*other.first, *other.closing))
    still = Verdict(effort=2, random_start=False, restarts=1).plan()
    assert not any(isinstance(stage.attack, SquareSearch) for stage in (*still.first, *still.closing))
    result = Verdict(eps=0.05, effort=2, restarts=1).run(net, x, y, generator=torch.Generator().manual_seed(0))
    robust = ~result.success
    assert robust.any()
    assert (result.forwards - result.gradients)[robust].min() > 3000  # three searches of 1000 forwards
