"""The gradient methods: closed forms, reductions to plain training, and two processes against one."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from firstorder.training import AENGM, ENGM, FENGM, MGNC, MSGD, NENGM, SNGM, GradientMethod, PerExample
from firstorder.training.methods import Limited

METHODS: dict[str, Callable[[nn.Module], GradientMethod]] = {
    "engm": lambda model: ENGM(model, alpha=0.5),
    "f-engm": FENGM,
    "n-engm": lambda model: NENGM(model, alpha=0.02),
    "a-engm": lambda model: AENGM(model, alpha=0.5, tau=1),
    "mgnc": lambda model: MGNC(model, clip=0.1),
    "sngm": SNGM,
    "msgd": MSGD,
}
N = 8


def data(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 6, 6, generator=generator) * torch.linspace(0.5, 2, n).reshape(n, 1, 1, 1)
    return x, torch.randint(3, (n,), generator=generator)


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def run(method: GradientMethod, x: Tensor, y: Tensor, **options: Any) -> Any:
    x = x.clone().requires_grad_()
    return method.backward(entropy(method.model, x, y), x, **options)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def mean_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found = torch.autograd.grad(entropy(model, x, y).mean(), [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.double().flatten() for g in found])


def each(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients (N, P) by one float64 backward per example."""
    model = copy.deepcopy(model).double()
    losses, parameters = entropy(model, x.double(), y), [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def by_inputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||grad_x L_i|| (N,) in float64."""
    there = x.double().requires_grad_()
    (g,) = torch.autograd.grad(entropy(copy.deepcopy(model).double(), there, y).sum(), there)
    return g.flatten(1).norm(dim=1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


# What each method does


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_infinite_alpha_is_plain_training(train: bool, norm: bool) -> None:
    model, (x, y) = network(norm=norm).train(train), data()
    expected = mean_gradient(copy.deepcopy(model), x, y)
    for method in (
        ENGM(model, alpha=math.inf),
        NENGM(model, alpha=math.inf),
        AENGM(model, alpha=math.inf),
        MSGD(model),
    ):
        model.zero_grad()
        outcome = run(method, x, y)
        assert outcome.weights.tolist() == [1.0] * N
        assert torch.equal(gradient(model), expected)
    for large in (ENGM(model, alpha=1e9), NENGM(model, alpha=1e9), AENGM(model, alpha=1e9)):
        model.zero_grad()
        outcome = run(large, x, y)
        assert outcome.weights.tolist() == [1.0] * N
        assert error(gradient(model), expected) <= 1e-6


def test_linear_models_have_a_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    x = torch.randn(N, 5)
    y = torch.randint(3, (N,))
    residual = (model(x).softmax(1) - F.one_hot(y, 3)).detach()
    norms = x.norm(dim=1) * residual.norm(dim=1)
    alpha = float(norms.median()) * 1.01
    outcome = run(ENGM(model, alpha=alpha), x, y)
    torch.testing.assert_close(outcome.norms, norms)
    torch.testing.assert_close(outcome.weights, (alpha / norms).clamp(max=1))
    assert 0 < int((outcome.weights < 1).sum()) < N
    torch.testing.assert_close(model.weight.grad, (residual * outcome.weights[:, None]).T @ x / N)
    assert outcome.input_norms is None
    model.zero_grad()
    outcome = run(FENGM(model), x, y)
    torch.testing.assert_close(outcome.weights * norms, torch.ones(N))
    torch.testing.assert_close(model.weight.grad, (residual / norms[:, None]).T @ x / N)
    input_norms = (residual @ model.weight).norm(dim=1).detach()
    alpha = float(input_norms.median()) * 1.01
    outcome = run(NENGM(model, alpha=alpha), x, y)
    torch.testing.assert_close(outcome.input_norms, input_norms)
    torch.testing.assert_close(outcome.weights, (alpha / input_norms).clamp(max=1))
    assert outcome.norms is None


def test_the_examplewise_methods_weigh_the_per_example_gradients() -> None:
    model, (x, y) = network(), data()
    rows, inputs = each(model, x, y), by_inputs(model, x, y)
    norms = rows.norm(dim=1)
    slope, intercept = np.polyfit(inputs.numpy(), norms.numpy(), 1)
    estimate = (0.7 + 0.3 * slope) * inputs + 0.3 * intercept
    expected = {
        "engm": (0.5 / norms).clamp(max=1),
        "f-engm": 1 / norms,
        "n-engm": (0.02 / inputs).clamp(max=1),
        "a-engm": torch.where(estimate > 0.5, 0.5 / estimate, 1.0),
        "msgd": torch.ones(N),
    }
    for name, weights in expected.items():
        model.zero_grad()
        assert error(run(METHODS[name](model), x, y).weights, weights) <= 1e-5
        assert error(gradient(model), weights.double() @ rows / N) <= 1e-5
        assert name == "msgd" or float(weights.min()) < 1


def test_an_example_without_a_gradient_has_weight_one() -> None:
    model, (x, y) = network(), data()
    for method in (ENGM(model), FENGM(model), NENGM(model), AENGM(model, tau=1)):
        x.grad = None
        losses = entropy(model, x.requires_grad_(), y) * torch.tensor([0.0] + [1.0] * (N - 1))
        outcome = method.backward(losses, x)
        assert outcome.weights.isfinite().all()
        assert float(outcome.weights[0].detach()) == 1
    assert gradient(model).isfinite().all()


def test_aengm_fits_a_line_every_tau_batches_and_resumes() -> None:
    model = network()
    method = AENGM(model, alpha=0.3, tau=3)
    gamma1, gamma0 = 1.0, 0.0
    for t in range(5):  # Algorithm 1: a fit where t mod tau = 0, from t = 0 on, before the weights
        x, y = data(t)
        inputs = by_inputs(model, x, y)
        outcome = run(method, x, y)
        assert (outcome.norms is None) == (t % 3 != 0)
        if t % 3 == 0:
            slope, intercept = np.polyfit(inputs.numpy(), each(model, x, y).norm(dim=1).numpy(), 1)
            gamma1, gamma0 = 0.7 * gamma1 + 0.3 * slope, 0.7 * gamma0 + 0.3 * intercept
        expected = {"gamma1": gamma1, "gamma0": gamma0, "batches": t + 1}
        assert method.state_dict() == pytest.approx(expected, rel=1e-4)
        estimate = gamma1 * inputs + gamma0
        assert error(outcome.weights, torch.where(estimate > 0.3, 0.3 / estimate, 1.0)) <= 1e-4

    other = AENGM(model, alpha=0.3, tau=3)
    other.load_state_dict(method.state_dict())
    for t in range(5, 12):
        first, second = (run(one, *data(t)) for one in (method, other))
        assert torch.equal(first.weights, second.weights)
        assert (first.norms is None) == (t % 3 != 0)
        assert method.state_dict() == other.state_dict()
    with pytest.raises(ValueError, match="AENGM needs"):
        other.load_state_dict({"gamma1": 1.0})


@pytest.mark.parametrize("alpha", [0.1, 1.0, 7.0])
def test_limited_vectors_have_a_variance_of_at_most_four_alpha_squared(alpha: float) -> None:
    """[ENGM], Theorem 1, on vectors whose own variance is not finite."""
    noise = torch.distributions.StudentT(torch.tensor(1.0)).sample((2000, 5)) + torch.tensor([3.0, 0, 0, 0, 0])
    limited = noise * ENGM(network(), alpha=alpha).weigh(noise.norm(dim=1), None)[:, None]
    variance = float((limited - limited.mean(0)).square().sum(1).mean())
    assert 0.01 * alpha**2 < variance <= 4 * alpha**2
    assert variance < float((noise - noise.mean(0)).square().sum(1).mean())


def test_f_engm_normalises_to_alpha() -> None:
    model, (x, y) = network(), data()
    rows = each(model, x, y)
    expected = (2.5 * rows / rows.norm(dim=1, keepdim=True)).mean(0)
    outcome = run(FENGM(model, alpha=2.5), x, y)
    assert error(gradient(model), expected) <= 1e-5
    torch.testing.assert_close(outcome.weights.double(), 2.5 / rows.norm(dim=1), rtol=1e-4, atol=1e-6)
    for wrong in (0, math.inf, -1):
        with pytest.raises(ValueError, match="alpha="):
            FENGM(model, alpha=wrong)


def test_the_limited_methods_share_all_but_their_norm_and_their_default() -> None:
    model, defaults = network(), {ENGM: 5.0, NENGM: 0.5, AENGM: 5.0}
    for method, alpha in defaults.items():
        parameters = inspect.signature(method).parameters
        assert issubclass(method, Limited)
        assert parameters["alpha"].default == alpha == method(model).alpha
        assert {"model", "alpha", "coupling", "memory_budget"} <= set(parameters)
        assert method(model, alpha=0.25, coupling="exact").coupling == "exact"
        limits = {1.0: method(model, alpha=1.0), math.inf: method(model, alpha=math.inf)}
        assert [one.unlimited for one in limits.values()] == [False, True]
        assert [one.needs_inputs for one in limits.values()] == [method is not ENGM, False]
        assert not limits[math.inf].needs_norms


def test_aengm_keeps_its_line_where_the_batch_defines_none() -> None:
    model = network()
    method = AENGM(model, tau=1)
    run(method, *data(n=1))
    assert method.state_dict() == {"gamma1": 1.0, "gamma0": 0.0, "batches": 1}


@pytest.mark.parametrize("clip", [0.05, 100.0, math.inf])
def test_mgnc_clips_the_norm_of_the_mean_gradient(clip: float) -> None:
    model, (x, y) = network(), data()
    other = copy.deepcopy(model)
    entropy(other, x, y).mean().backward()
    total = float(nn.utils.clip_grad_norm_(other.parameters(), clip))
    outcome = run(MGNC(model, clip=clip), x, y)
    assert error(gradient(model), gradient(other)) <= 1e-5
    assert outcome.weights.tolist() == pytest.approx([min(clip / total, 1)] * N, rel=1e-4)


def test_sngm_has_a_gradient_of_norm_one() -> None:
    model, (x, y) = network(), data()
    expected = mean_gradient(model, x, y)
    run(SNGM(model), x, y)
    assert float(gradient(model).norm()) == pytest.approx(1, rel=1e-6)
    assert error(gradient(model), expected / expected.norm()) <= 1e-6


# What all methods share


@pytest.mark.parametrize("name", METHODS)
def test_gradients_accumulate(name: str) -> None:
    model, apart = network(), []
    for seed in range(2):
        model.zero_grad()
        run(METHODS[name](model), *data(seed))
        apart.append(gradient(model))
    model.zero_grad()
    for seed in range(2):
        run(METHODS[name](model), *data(seed))
    assert error(gradient(model), apart[0] + apart[1]) <= 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_hooks_fire_once_and_frozen_parameters_get_no_gradient(name: str) -> None:
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    fired: list[Tensor] = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(fired.append)
    run(METHODS[name](model), x, y)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(fired) == 4
    assert {id(p) for p in fired} == {id(p) for p in trainable}
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in trainable)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_weights_alone_keep_the_graph(name: str, norm: bool) -> None:
    """The step is the gradient of the losses that they weigh, through BatchNorm too."""
    model, (x, y) = network(norm=norm), data()
    run(METHODS[name](model), x, y)
    expected = gradient(model)
    model.zero_grad()
    x.requires_grad_()
    losses = entropy(model, x, y)
    weights = METHODS[name](model).weights(losses, x)
    assert not weights.requires_grad
    assert all(p.grad is None for p in model.parameters())
    (weights * losses).mean().backward()
    assert error(gradient(model), expected) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_scales_the_gradients_alone(name: str) -> None:
    model, (x, y) = network(), data()
    plain = run(METHODS[name](model), x, y)
    expected = gradient(model)
    model.zero_grad()
    scaled = run(METHODS[name](model), x, y, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    torch.testing.assert_close(scaled.weights, plain.weights)
    for found, own in ((scaled.norms, plain.norms), (scaled.input_norms, plain.input_norms)):
        assert (found is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(found, own)
    assert error(gradient(model), expected * 1024) <= 1e-5


@pytest.mark.parametrize("norm", [False, True])
def test_autocast_is_served(norm: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, (x, y) = network(norm=norm).train(), data()
    plain = run(FENGM(model), x, y)
    expected = gradient(model)
    model.zero_grad()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = entropy(model, x, y)
    outcome = FENGM(model).backward(losses, x)
    assert float((outcome.norms.detach() / plain.norms.detach() - 1).abs().max()) <= 0.05
    assert error(gradient(model), expected) <= 0.05
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert not any("one backward per example" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_left_as_it_was(name: str, train: bool) -> None:
    model, (x, y) = network(norm=True).train(train), data()
    model[3].eval()
    model[0].requires_grad_(False)
    x.requires_grad_()
    losses = entropy(model, x, y)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    hooks = [(len(part._forward_hooks), len(part._backward_hooks)) for part in model.modules()]
    method = METHODS[name](model)
    method.weights(losses, x)
    method.backward(losses, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [part.training for part in model.modules()] == modes
    assert [(len(part._forward_hooks), len(part._backward_hooks)) for part in model.modules()] == hooks
    assert name == "msgd" or x.grad is None


def test_batches_after_an_optimiser_step_are_measured_anew() -> None:
    model, method = network(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    method = ENGM(model, alpha=0.5)
    for seed in range(3):
        x, y = data(seed)
        norms = each(model, x, y).norm(dim=1)
        optimizer.zero_grad()
        assert error(run(method, x, y).norms, norms) <= 1e-5
        optimizer.step()


def test_exact_coupling_reaches_the_methods() -> None:
    model, (x, y) = network(norm=True).train(), data()
    expected = PerExample(copy.deepcopy(model), coupling="exact")
    norms = expected(entropy(expected.module, x, y)).norms
    outcome = run(ENGM(model, coupling="exact"), x, y)
    torch.testing.assert_close(outcome.norms, norms)
    assert error(run(ENGM(model), x, y).norms, norms.double()) > 1e-3


def test_what_cannot_be_done_is_refused() -> None:
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match="pass the torch module"):
        ENGM(lambda x: x)
    for wrong in (0, -1, math.nan, "5"):
        with pytest.raises(ValueError, match="alpha"):
            ENGM(model, alpha=wrong)
    with pytest.raises(ValueError, match="clip"):
        MGNC(model, clip=0)
    with pytest.raises(ValueError, match="tau"):
        AENGM(model, tau=0)
    with pytest.raises(ValueError, match="beta"):
        AENGM(model, beta=1.5)
    for cls in (NENGM, AENGM):
        with pytest.raises(ValueError, match=r"call backward\(losses, inputs\)"):
            cls(model).backward(entropy(model, x, y))
        with pytest.raises(ValueError, match="requires_grad_"):
            cls(model).backward(entropy(model, x, y), x)
    for make in METHODS.values():
        with pytest.raises(ValueError, match="reduction='none'"):
            make(model).backward(entropy(model, x, y).mean(), x)


# Two processes

SHARED = ("engm", "a-engm", "sngm", "mgnc", "n-engm")


def half(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch through every shared method."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    x, y = (t[rank * N // 2 : (rank + 1) * N // 2] for t in data())
    found = {}
    for name in SHARED:
        model = DistributedDataParallel(network())
        method = METHODS[name](model)
        outcome = run(method, x, y)
        found[name] = (gradient(model), outcome.weights, method.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(half, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in SHARED:
        model = network()
        method = METHODS[name](model)
        outcome = run(method, *data())
        for found in halves:
            assert error(found[name][0], gradient(model)) <= 1e-5
            assert found[name][2] == pytest.approx(method.state_dict(), rel=1e-4)
        torch.testing.assert_close(torch.cat([found[name][1] for found in halves]), outcome.weights, rtol=1e-4, atol=0)
