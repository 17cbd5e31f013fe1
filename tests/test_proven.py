"""What complete verifiers proved of single images of other people's nets, where those are."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Case
from firstorder.attacks import Verdict
from firstorder.evaluation.names import data, packaged
from firstorder.evaluation.runs.limits import Limit
from firstorder.evaluation.studies import published
from samples import sampled

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROBUST = Path(os.environ.get("FIRSTORDER_ROBUST_NETS", SHARED / "robust"))
"""The folder of robust networks by other people, with what is proven of them, where there is one."""

CIFAR10 = Path(os.environ.get("FIRSTORDER_CIFAR10", SHARED / "cifar10_test.npz"))
"""An .npz file of CIFAR-10's test images, where there is one."""

LIMITS = published.limits(ROBUST / "verdicts")
WIDE = "cifar10-oval-wide-kw"
ATTACKS = [case for case in CASES if "Linf" in case.cls.norms]
SHARPEST = Case("verdict", {"effort": 2, "restarts": 2})
NETS = [
    WIDE,
    "cifar10-oval-base-kw",
    "cifar10-oval-deep-kw",
    "cifar10-wang2021-resnet2b",
    "cifar10-wang2021-resnet4b",
    "mnist-balunovic2020-colt-0.1",
]
ROWS = [(case, name) for name in NETS for case in (*ATTACKS, SHARPEST)]

pytestmark = pytest.mark.skipif(
    not (ROBUST / "verdicts").is_dir() or not CIFAR10.is_file(), reason="no robust networks with proofs here"
)


@cache
def net(name: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("architectures", ROBUST / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: nn.Module = module.load(ROBUST / f"{name}.safetensors")
    return found.eval()


@cache
def images(kind: str) -> data.Images:
    return packaged.mnist() if kind == "mnist" else data.load(str(CIFAR10))


def chosen(name: str, limits: list[Limit]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the radius of each, (N, 1, 1, 1)."""
    found, places = images(name.partition("-")[0]), [one.example for one in limits]
    eps = torch.tensor([one.eps for one in limits]).reshape(-1, 1, 1, 1)
    return found.x[places], found.y[places], eps


def broken(case: Case, model: nn.Module, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """Which images an attack breaks, (N,), each within its own radius."""
    words: dict[str, Any] = dict(case.parameters)
    if "pool" in words:
        words["pool"] = x.flip(0)
    attack = replace(case.cls(**words), eps=eps, norm="Linf")
    result = attack.run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert float(((result.adversarial - x).abs() - eps).max()) <= 1e-6
    assert result.success is not None
    return result.success


@pytest.mark.parametrize(
    ("case", "name"),
    sampled(ROWS, 19, lambda row: row[1]),
    ids=[f"{case.name}-{len(case.parameters)}-{name}" for case, name in ROWS],
)
def test_no_attack_breaks_what_is_proven_robust(case: Case, name: str) -> None:
    limits = [one for one in LIMITS[name] if one.proven]
    assert limits
    x, y, eps = chosen(name, limits)
    model = net(name)
    with torch.no_grad():
        assert torch.equal(model(x).argmax(1), y)
    found = broken(case, model, x, y, eps)
    assert not found.any(), [one for one, fell in zip(limits, found.tolist(), strict=True) if fell]
    # not because it does nothing: of twenty times the radius nothing is proven
    if not case.population:
        assert broken(case, model, x, y, (20 * eps).clamp(max=0.5)).any()


def test_the_image_with_a_known_example_falls_to_the_verdict() -> None:
    limits = [one for one in LIMITS[WIDE] if one.broken]
    assert [one.example for one in limits] == [1909]
    x, y, eps = chosen(WIDE, limits)
    result = Verdict(eps=eps).run(net(WIDE), x, y, generator=torch.Generator().manual_seed(0))
    assert result.success.all()
    assert not Verdict(eps=eps / 2).run(net(WIDE), x, y, generator=torch.Generator().manual_seed(0)).success.any()
