"""Per-example gradients and training on a GPU: cuDNN's BatchNorm, autocast, Fabric."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_device import CUDA, DEVICE, needs_cuda, no_waiting, note, on
from torch import Tensor, nn

from cases import images
from firstorder.attacks import PGD
from firstorder.training import AWP, ENGM, MART, METHODS, TRADES, PerExample, Vanilla
from firstorder.training.per_example import IGNORED
from test_training_gradients import NETS, Batched, batched, entropy, error, flat, network, own_copies, reference

pytestmark = pytest.mark.cuda

TOGETHER, EACH = 0.03, 0.1
"""How far norms under autocast may be from float64's, relative: the vector of them, and any one, each a few roundings
of 2^-8 on the way there and back."""


def weigh(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE) * 2


def placed(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = network(name)
    return model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)


def warnings(caplog: pytest.LogCaptureFixture, *, beside: str | None = None) -> list[str]:
    """The warnings of the log; one of `beside` must be among them, and is left out."""
    found = [record for record in caplog.records if record.levelno >= logging.WARNING]
    if beside is not None:
        assert [record.msg for record in found].count(beside) == 1
    return [record.getMessage() for record in found if record.msg != beside]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_are_those_of_one_backward_per_example(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = placed(name)
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    each = reference(model, entropy, x, y)
    gradients = PerExample(model)(entropy(model, x, y))
    weights, bound = weigh(len(x)), 1e-4 if dtype == torch.float32 else 1e-10
    assert on(gradients.norms)
    assert error(gradients.norms, each.norm(dim=1)) <= bound
    found = gradients.weighted(weights.to(dtype))
    assert all(g is None or on(g) for g in found)
    assert error(flat(found, gradients.parameters), weights @ each / len(x)) <= bound
    assert not warnings(caplog), "nothing goes the slow way"


@pytest.mark.parametrize("name", ["convolutions", "normalised", "vision", "linear"])
def test_norms_under_bfloat16_autocast(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = placed(name)
    each = reference(model, entropy, x, y)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        losses = entropy(model, x, y)
    gradients = PerExample(model)(losses)
    norms = each.norm(dim=1)
    assert gradients.norms.dtype == torch.float32
    assert error(gradients.norms, norms) <= TOGETHER
    assert float(((gradients.norms.double() - norms) / norms).abs().max()) <= EACH
    weights = weigh(len(x))
    assert error(flat(gradients.weighted(weights.float()), gradients.parameters), weights @ each / len(x)) <= TOGETHER
    if name == "vision":
        note(f"vision transformer under autocast: one backward per example for {len(warnings(caplog))} parameters")
    else:
        assert not warnings(caplog)


def nodes(losses: Tensor) -> set[str]:
    """The names of all operations behind the losses."""
    found, stack = set(), [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [below for below, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batch_norm(
    layout: torch.memory_format, training: bool, cudnn: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Through cuDNN's kernels and through PyTorch's own, whose nodes have other names."""
    torch.manual_seed(0)
    model, x, y = batched()
    model, x, y = model.to(DEVICE, dtype).train(training), x.to(DEVICE, dtype), y.to(DEVICE)
    model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    each = own_copies(model, x, y) if training else reference(model, entropy, x, y)
    with torch.backends.cudnn.flags(enabled=cudnn, deterministic=True, allow_tf32=False):
        losses = entropy(model, x, y)
        names = {name for name in nodes(losses) if "BatchNorm" in name}
        gradients = PerExample(model)(losses)
        weights, bound = weigh(len(x)), 1e-4 if dtype == torch.float32 else 1e-10
        found = flat(gradients.weighted(weights.to(dtype)), gradients.parameters)
    assert names <= {"CudnnBatchNormBackward0", "NativeBatchNormBackward0"}
    if training and layout == torch.contiguous_format:
        note(f"BatchNorm, {'with' if cudnn else 'without'} cuDNN, {dtype}: {' '.join(names)}")
    assert error(gradients.norms, each.norm(dim=1)) <= bound
    assert error(found, weights @ each / len(x)) <= bound
    assert not warnings(caplog, beside=IGNORED if training else None)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm_under_autocast(
    dtype: torch.dtype, layout: torch.memory_format, caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = batched()
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    each = own_copies(model, x, y)
    with torch.autocast("cuda", dtype=dtype):
        losses = entropy(model, x, y)
    gradients = PerExample(model)(losses)
    assert error(gradients.norms, each.norm(dim=1)) <= TOGETHER
    weights = weigh(len(x))
    assert error(flat(gradients.weighted(weights.float()), gradients.parameters), weights @ each / len(x)) <= TOGETHER
    assert not warnings(caplog, beside=IGNORED)


@pytest.mark.parametrize("bound", [1e-4, 1e-10])
def test_rms_norm(bound: float, caplog: pytest.LogCaptureFixture) -> None:
    """One kernel, with a node of its own, on a GPU alone."""
    torch.manual_seed(0)
    dtype = torch.float32 if bound == 1e-4 else torch.float64
    model = nn.Sequential(nn.Linear(7, 12), nn.RMSNorm(12), nn.Unflatten(1, (3, 4)), nn.RMSNorm((3, 4)), nn.Flatten())
    for norm in (model[1], model[3]):
        nn.init.normal_(norm.weight)
    model, x = model.to(DEVICE, dtype), torch.randn(6, 7, device=DEVICE, dtype=dtype)
    y = torch.arange(6, device=DEVICE)
    each, losses = reference(model, entropy, x, y), entropy(model, x, y)
    gradients, weights = PerExample(model)(losses), weigh(6)
    assert error(gradients.norms, each.norm(dim=1)) <= bound
    found = flat(gradients.weighted(weights.to(dtype)), gradients.parameters)
    assert error(found, weights @ each / 6) <= bound
    assert not warnings(caplog)
    note(f"RMSNorm, {dtype}: {' '.join(name for name in nodes(losses) if 'Norm' in name) or 'no node of its own'}")


@pytest.mark.parametrize("coupling", ["ignore", "exact"])
def test_couplings(coupling: Any) -> None:
    model, x, y = batched()
    expected = PerExample(model, coupling=coupling)(entropy(model, x, y)).norms
    there = copy.deepcopy(model).to(DEVICE)
    found = PerExample(there, coupling=coupling)(entropy(there, x.to(DEVICE), y.to(DEVICE))).norms
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    """Two steps give the parameters that they give on the CPU."""
    ends = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        model = Batched().double().to(device).train()
        x, y = (t.to(device) for t in batched()[1:])
        x = x.double()
        method = METHODS[name](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            there = x.clone().requires_grad_()
            losses = entropy(model, there, y)
            method.backward(losses, there)
            optimizer.step()
        ends.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ENGM", "FENGM", "NENGM"])
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """Once the layouts are known, from the third batch on."""
    method_of = {cls.__name__: cls for cls in METHODS.values()}[name]
    model, x, y = batched()
    model, x, y = model.to(DEVICE), x.to(DEVICE).requires_grad_(), y.to(DEVICE)
    method = method_of(model)
    for batch in range(4):
        losses = entropy(model, x, y)
        with no_waiting() if batch > 1 else nullcontext():
            method.backward(losses, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", [Vanilla, TRADES, MART, AWP], ids=lambda one: one.__name__)
def test_objectives(objective: Any) -> None:
    attack = PGD(eps=0.1, alpha=0.05, steps=2, random_start=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 3, 10)).to(
        DEVICE
    )
    x, y = images(16).to(DEVICE), torch.arange(16, device=DEVICE) % 10
    chosen = AWP(base=Vanilla(attack=attack), gamma=0.01) if objective is AWP else objective(attack=attack)
    method, optimizer = ENGM(model, alpha=1.0), torch.optim.SGD(model.parameters(), lr=0.3)
    generator, seen = torch.Generator(DEVICE).manual_seed(0), []
    for _ in range(12):
        adversarial = chosen.adversarial(model, x, y, bounds=(0.0, 1.0), generator=generator)
        assert on(adversarial)
        seen.append(_step(chosen, method, optimizer, model, x, adversarial, y))
    assert seen[-1] < seen[0]
    assert all(p.isfinite().all() for p in model.parameters())


def _step(
    chosen: Any, method: ENGM, optimizer: Any, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor
) -> float:
    optimizer.zero_grad()
    losses: Tensor = chosen.losses(model, x, adversarial, y)
    method.backward(losses, adversarial)
    optimizer.step()
    return float(losses.detach().mean())


# Fabric


@pytest.fixture
def runs() -> Any:
    pytest.importorskip("lightning_fabric")
    import fabric_runs

    return fabric_runs


def fabric(precision: Any) -> Any:
    from firstorder.fabric import make

    return make(accelerator="gpu" if CUDA else "cpu", precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_through_fabric(runs: Any, precision: Any, tmp_path: Path) -> None:
    model, seen = runs.network(), set()
    model[0].register_forward_hook(lambda layer, given, output: seen.add((output.device.type, output.dtype)))
    chosen = runs.recipe(epochs=8, validate=4, objective=Vanilla(attack=PGD(eps=0.02, alpha=0.02, steps=1)))
    runs.fit(tmp_path, chosen, model, fabric=fabric(precision))
    losses = runs.numbers(tmp_path / "epochs.csv", "loss")
    assert losses[-1] < 0.9 * losses[0]
    assert {device for device, _ in seen} == {DEVICE.type}
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    assert (DEVICE.type, low) in seen
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_was_killed_goes_on(runs: Any, precision: Any, tmp_path: Path) -> None:
    """The resumed run ends where the uninterrupted one ends, up to the rounding of atomic sums."""
    whole = runs.network()
    runs.fit(tmp_path / "whole", runs.full(diagnose=0), whole, fabric=fabric(precision))
    with pytest.raises(runs.KilledError):
        runs.fit(
            tmp_path / "cut", runs.full(diagnose=0), runs.network(), fabric=fabric(precision), progress=runs.Kill(8)
        )
    again = runs.network(99)
    runs.fit(tmp_path / "cut", runs.full(diagnose=0), again, fabric=fabric(precision), resume=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].cpu(), value.cpu(), rtol=1e-3, atol=1e-4, msg=name)
    steps = [runs.numbers(tmp_path / name / "steps.csv", "loss") for name in ("whole", "cut")]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
