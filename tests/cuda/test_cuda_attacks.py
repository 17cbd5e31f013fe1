"""Every attack on a GPU through every host: as on the CPU, on one device, without waiting for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_device import CUDA, DEVICE, between, needs_cuda, on, states
from torch import Tensor, nn

from cases import CASES, EPS, HOSTS, ROW_IDS, ROWS, TOLERANCE, Case, Net, images, predicted
from firstorder.attacks import DDN, NIFGSM, PGD, SINIFGSM, VMIFGSM, Batched, BoundedAttack, Ensemble, TorchModel
from test_contract import Fragile, assert_equal, disturb, size, snapshot
from test_devices import MODULES

pytestmark = pytest.mark.cuda

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_row = pytest.mark.parametrize(("case", "norm"), ROWS, ids=ROW_IDS)
every_host = pytest.mark.parametrize("host", HOSTS)


def through(host: str, case: Case, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    pytest.importorskip(MODULES[host])
    return HOSTS[host](case, model, x, y, **options)


def wide(**options: Any) -> tuple[Net, Tensor]:
    """The network and images in float64, on the CPU."""
    return Net(**options).eval().double(), images().double()


@every_row
@every_host
@pytest.mark.parametrize("targeted", [False, True])
def test_the_same_as_on_the_cpu(case: Case, norm: str, host: str, targeted: bool) -> None:
    """Where nothing is drawn, in float64 to 1e-6."""
    model, x = wide()
    y = predicted(model, x)
    y = (y + 3) % 10 if targeted else y
    options = {"norm": norm, "targeted": targeted, **case.fixed}
    expected = through(host, case, model, x, y, **options)
    found = through(host, case, model.to(DEVICE), x.to(DEVICE), y.to(DEVICE), **options)
    assert on(found)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found.cpu(), x, atol=1e-3)


@every_row
@every_host
def test_draws_are_the_generators(case: Case, norm: str, host: str) -> None:
    model, x = wide()
    model, x = model.to(DEVICE), x.to(DEVICE)
    y, before = predicted(model, x), states()
    known = {field.name for field in dataclasses.fields(case.cls)}
    starts = {"random_start": True} if "random_start" in known else {}
    short = {"alpha": 1e-4} if "alpha" in known else {}  # steps that do not end in the same corner from everywhere
    one, again, other = (
        through(host, case, model, x, y, norm=norm, seed=seed, **starts, **short) for seed in (3, 3, 4)
    )
    torch.testing.assert_close(one, again, rtol=0, atol=1e-6)
    if not case.early:  # that one may end before it draws anything
        assert bool(starts or case.fixed) == (not torch.allclose(one, other, rtol=0, atol=1e-6))
    assert all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    if case.bounded:
        assert (size(one - x, norm) <= EPS[norm] + TOLERANCE).all()


@every_attack
@every_host
@pytest.mark.parametrize("fail_at", [0, 4])
def test_the_model_is_as_it_was(case: Case, host: str, fail_at: int) -> None:
    model = Fragile(fail_at).to(DEVICE)
    disturb(model)
    before, x = snapshot(model), images().to(DEVICE)
    y = predicted(Net().to(DEVICE), x) if case.early else torch.arange(6, device=DEVICE)
    if fail_at:
        steps: dict[str, Any] = {"steps": 6} if "steps" in case.parameters else {"random_start": True, "restarts": 4}
        steps |= {"eps": 1e-3} if case.early else {}
        with pytest.raises(ArithmeticError):
            through(host, case, model, x, y, **steps)
    else:
        through(host, case, model, x, y)
    assert_equal(before, snapshot(model))
    assert all(on(t) for t in (*model.parameters(), *model.buffers()))


@every_row
def test_everything_that_is_found_is_on_the_device(case: Case, norm: str) -> None:
    model, x = wide()
    model, x = model.to(DEVICE), x.to(DEVICE)
    known = {field.name for field in dataclasses.fields(case.cls)}
    wanted: dict[str, Any] = {"restarts": 2, "random_start": True, "memory_budget": 1, "max_norm": 0.1}
    attack = case.build(norm, **{name: value for name, value in wanted.items() if name in known})
    if isinstance(attack, BoundedAttack) and attack.parts(x[0].numel()).oracle.at_iterate:
        attack = dataclasses.replace(attack, early_stop=True, patience=2)
    y, mask = predicted(model, x), torch.zeros(6, 5, device=DEVICE)
    mask[1:4] = 1
    result = attack.run(model, x, y, mask=mask, bounds=([0.0] * 3, [1.0] * 3))
    assert all(on(value) for value in vars(result).values() if isinstance(value, Tensor))
    assert torch.equal(result.adversarial[..., 4:, :], x[..., 4:, :])
    assert torch.equal(result.success, predicted(model, result.adversarial) != y)


# The loop


@every_row
def test_the_loop_never_waits_for_the_device(case: Case, norm: str) -> None:
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    y = predicted(model, x)
    hook, end = between(case.parameters.get("steps", 1))
    try:
        case.build(norm)(model, x, y, hook=hook)
    finally:
        end()


@needs_cuda
def test_waiting_is_seen() -> None:
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    y = predicted(model, x)
    hook, end = between(4)
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            PGD(eps=0.001, steps=4, early_stop=True)(model, x, y, hook=hook)
    finally:
        end()


@pytest.mark.parametrize(
    "options", [{"early_stop": True}, {"early_stop": True, "patience": 2}, {"restarts": 3}], ids=str
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_early_stopping_and_restarts(options: dict[str, Any], norm: str) -> None:
    """They break what the plain attack on the CPU breaks."""
    model, x = wide()
    y = predicted(model, x)
    eps = 0.3 * EPS[norm]
    attack = PGD(eps=eps, norm=norm, steps=8, **(options if "patience" in options else {}))
    expected = attack.run(model, x, y)
    start = {"random_start": True} if "restarts" in options else {}
    there = dataclasses.replace(attack, **options, **start)
    found = there.run(model.to(DEVICE), x.to(DEVICE), y.to(DEVICE))
    assert torch.equal(found.success, predicted(model, found.adversarial) != y.to(DEVICE))
    assert expected.success.any()
    if not start:
        assert torch.equal(found.success.cpu(), expected.success)
        assert (found.gradients <= 8).all()
    else:
        assert found.restarts.shape == (3, 6)


@pytest.mark.parametrize("attack", [SINIFGSM(steps=3, m=5), VMIFGSM(steps=3, N=7), NIFGSM(steps=3)], ids=repr)
def test_a_memory_budget_changes_nothing(attack: BoundedAttack) -> None:
    model, x = wide()
    model, x = model.to(DEVICE), x.to(DEVICE)
    y = predicted(model, x)
    one = TorchModel(model).footprint(x)
    assert one > x[0].nbytes
    found = [dataclasses.replace(attack, memory_budget=b)(model, x, y) for b in (None, 1, 13 * one)]
    if not isinstance(attack, VMIFGSM):  # whose draws come in other pieces
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-9)
    assert all(on(a) for a in found)


# Models


def test_ensembles_and_batches() -> None:
    model = (
        Ensemble([Net(seed=seed) for seed in range(3)], weights=[1, 2, 3], sizes=[None, (6, 5), None]).eval().double()
    )
    x = images().double()
    y = predicted(model, x)
    attack = PGD(steps=4, random_start=False)
    expected = attack(model, x, y)
    model.to(DEVICE)
    for there in (model, Batched(TorchModel(model), 4)):
        found = attack.run(there, x.to(DEVICE), y.to(DEVICE))
        torch.testing.assert_close(found.adversarial.cpu(), expected, rtol=0, atol=1e-6)


@every_row
def test_channels_last(case: Case, norm: str) -> None:
    model, x = wide()
    y = predicted(model, x)
    expected = case.build(norm, **case.fixed)(model.to(DEVICE), x.to(DEVICE), y.to(DEVICE))
    turned: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    there = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    found = case.build(norm, **case.fixed)(turned, there, y.to(DEVICE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@every_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case: Case, norm: str, dtype: torch.dtype) -> None:
    """The steps that float64 gives, up to the rounding of the dtype; the network's own examples are worse for it."""
    x = images().double().to(DEVICE)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(90, 10)).double().to(DEVICE)
    with torch.no_grad():
        flat[1].weight.copy_(torch.randn(10, 90, generator=torch.Generator().manual_seed(0)) / 10)
    y = (predicted(flat, x) + 1) % 10
    full = case.build(norm, **case.fixed)(flat, x, y)
    half = case.build(norm, **case.fixed)(flat.to(dtype), x.to(dtype), y)
    assert half.dtype == dtype
    if case.bounded:
        assert ((half.double() - full).abs() <= (0.01 if norm == "Linf" else 0.1)).double().mean() > 0.9
    model, x = Net().eval().to(DEVICE, dtype), images().to(DEVICE, dtype)
    y = predicted(model, x)
    found = case.build(norm).run(model, x, y)
    assert found.adversarial.dtype == dtype
    assert found.adversarial.isfinite().all()
    assert torch.equal(found.success, predicted(model, found.adversarial) != y)
    if case.bounded:
        assert (size(found.adversarial.double() - x.double(), norm) <= EPS[norm] * 1.05 + 0.01).all()
        losses = [F.cross_entropy(model(a), y).item() for a in (x, found.adversarial)]
        assert losses[1] > losses[0]
    else:
        assert found.success.all()


@every_row
def test_under_autocast(case: Case, norm: str) -> None:
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = predicted(model, x)
        found = case.build(norm).run(model, x, y)
        assert torch.equal(found.success, predicted(model, found.adversarial) != y)
    assert found.adversarial.dtype == torch.float32
    assert found.success.any()


def test_devices_that_differ_are_refused() -> None:
    if not CUDA:
        pytest.skip("of CUDA alone")
    model, x, y = Net().eval().to(DEVICE), images(), torch.arange(6)
    with pytest.raises(RuntimeError) as caught:
        PGD()(model, x, y)
    assert "convert the images with x.to('cuda:0', torch.float32)" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="generator is on cpu"):
        PGD()(model, x.to(DEVICE), y, generator=torch.Generator())
    assert on(DDN(steps=3)(model, x.to(DEVICE), y)), "labels are moved"
