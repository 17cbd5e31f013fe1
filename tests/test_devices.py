"""Every attack on a device of its own, pretended on the CPU: no tensor, generator or index on the wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cases import CASES, HOSTS, ROW_IDS, ROWS, Case, Net, images, predicted
from firstorder.attacks import (
    PGD,
    Batched,
    BoundedAttack,
    Ensemble,
    Evaluation,
    Oracle,
    Query,
    Step,
    TorchModel,
    prepare,
)
from firstorder.attacks.oracles import Stateless
from pretended import DEVICE, Pretended

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_row = pytest.mark.parametrize(("case", "norm"), ROWS, ids=ROW_IDS)
every_host = pytest.mark.parametrize("host", HOSTS)

MODULES = {"core": "torch", "torchattacks": "torchattacks", "art": "art", "foolbox": "foolbox", "advlib": "torch"}
"""What a host needs."""

PATCHES = {"is_available": True, "current_device": 0}
"""What ART asks for."""


@pytest.fixture
def mode() -> Iterator[Pretended]:
    """The pretended device, entered; ART finds it as it finds a GPU."""
    mode = Pretended()
    with mode:
        yield mode


def attacked(case: Case, host: str, model: Net, x: Tensor, **options: Any) -> Tensor:
    pytest.importorskip(MODULES[host])
    found, first = (mock.patch(f"torch.cuda.{name}", return_value=v) for name, v in PATCHES.items())
    with found, first:
        return HOSTS[host](case, model, x, predicted(model, x), **options)


@every_row
@every_host
def test_everything_is_on_the_device(case: Case, norm: str, host: str) -> None:
    expected = attacked(case, host, Net().eval(), images(), norm=norm)
    with Pretended() as device:
        x = images().to(device)
        found = attacked(case, host, Net().eval().to(device), x, norm=norm)
        assert found.device == device
        if case.name in ("sia", "clipped-sia-dim"):  # blocks are filtered in another order on a GPU
            torch.testing.assert_close(found.cpu(), expected)
        else:
            assert torch.equal(found.cpu(), expected)


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_with_all_that_can_be_asked_for(case: Case, targeted: bool, mode: Pretended) -> None:
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    known = {field.name for field in dataclasses.fields(case.cls)}
    wanted: dict[str, Any] = {"restarts": 2, "random_start": True, "memory_budget": 1, "max_norm": 0.1}
    attack = case.build(**{name: value for name, value in wanted.items() if name in known})
    if isinstance(attack, BoundedAttack) and attack.parts(x[0].numel()).oracle.at_iterate:
        attack = dataclasses.replace(attack, early_stop=True, patience=2)
    y = (predicted(model, x) + 3) % 10
    mask = torch.ones(6, 5, device=DEVICE)
    result = attack.run(model, x, y, targeted=targeted, mask=mask, bounds=([0.0] * 3, [1.0] * 3))
    for value in vars(result).values():
        assert not isinstance(value, Tensor) or value.device == DEVICE


@every_attack
def test_prepared(case: Case, mode: Pretended) -> None:
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    prepared = prepare(model, x[:4])
    assert prepared.parts
    result = case.build().run(prepared, x, predicted(model, x))
    assert result.adversarial.device == DEVICE
    assert torch.equal(result.success, predicted(model, result.adversarial) != predicted(model, x))


def test_ensembles_and_batches(mode: Pretended) -> None:
    x = images().to(DEVICE)
    model = Ensemble([Net(seed=seed).to(DEVICE) for seed in range(2)], sizes=[None, (6, 5)]).eval()
    y = predicted(model, x)
    whole, parts = (PGD(steps=2).run(m, x, y).adversarial for m in (model, Batched(TorchModel(model), 4)))
    assert torch.allclose(whole, parts, atol=1e-6)
    assert whole.device == DEVICE


def in_the_loop(mode: Pretended, attack: Any, steps: int) -> list[str]:
    """What would have made the host wait between the first gradient and the last."""
    model, x = Net().eval().to(DEVICE), images().to(DEVICE)
    y, found = predicted(model, x), []

    def hook(t: int, gradient: Tensor, a: Tensor) -> None:
        if t == 1:
            mode.waits.clear()
        if t == steps:
            found.append(list(mode.waits))

    attack(model, x, y, hook=hook)
    return found[-1]


@every_row
def test_the_loop_never_waits_for_the_device(case: Case, norm: str, mode: Pretended) -> None:
    attack = case.build(norm)
    assert in_the_loop(mode, attack, case.parameters.get("steps", 1)) == []


def test_early_stopping_waits() -> None:
    """The check above sees what it looks for."""
    mode = Pretended()
    with mode:
        assert "torch.Tensor.__bool__" in in_the_loop(mode, PGD(eps=0.01, steps=3, early_stop=True), 3)


# Planted faults


@dataclass(frozen=True)
class Careless(Stateless):
    """An oracle that makes something on the wrong device."""

    fault: str

    def __call__(self, query: Query, a: Tensor, state: Any, step: Step) -> tuple[Evaluation, Any]:
        found = query(a)
        g, n = found.gradient, len(a)
        match self.fault:
            case "zeros":
                g = g + torch.zeros(n, 1, 1, 1)
            case "scalar":
                g = g * torch.tensor(2.0)
            case "index":
                g = g[torch.arange(n)]
            case "assignment":
                g[0] = torch.zeros(3, 6, 5)
            case "list":
                g = torch.stack([*g[:-1], torch.zeros(3, 6, 5)])
            case "view of a view":
                g = g.add_(torch.zeros(n, 90).view(n, 3, 6, 5)[:, :1].data)
            case "generator":
                g = g + torch.rand(g.shape, generator=torch.Generator().manual_seed(0), device=a.device)
            case "draws":
                g = g + torch.rand(g.shape, generator=step.draw.generator)
            case "numpy":
                g = g + float(g.numpy().sum())
            case "moved":
                g = g.cpu() + a
        return found._replace(gradient=g), state


FAULTS = ["zeros", "scalar", "index", "assignment", "list", "view of a view", "generator", "draws", "numpy", "moved"]


@dataclass(frozen=True, kw_only=True)
class Faulty(PGD):
    fault: str = ""

    def oracle(self) -> Oracle:
        return Careless(self.fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, mode: Pretended) -> None:
    model, x = Net().eval(), images()
    with pytest.raises((RuntimeError, TypeError), match=r"met tensors of|generator is on|convert a tensor"):
        Faulty(fault=fault, steps=2)(model.to(DEVICE), x.to(DEVICE), torch.arange(6, device=DEVICE))


def test_a_model_and_images_on_different_devices_are_refused(mode: Pretended) -> None:
    with pytest.raises(RuntimeError) as caught:
        PGD()(Net().eval().to(DEVICE), images(), torch.arange(6))
    assert "convert the images with x.to('cuda:0', torch.float32)" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"the generator is on cpu, the images on cuda:0"):
        PGD()(Net().eval().to(DEVICE), images().to(DEVICE), torch.arange(6), generator=torch.Generator())
