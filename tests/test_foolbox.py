"""Attacks as foolbox's, against foolbox's own and the core."""

from __future__ import annotations

import inspect
import pickle
from functools import partial
from typing import Any

import eagerpy as ep
import foolbox
import numpy as np
import pytest
import torch
from foolbox.attacks.base import AttackWithDistance, FixedEpsilonAttack, MinimizationAttack
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn

import firstorder.foolbox
from cases import CASES, Case, Net, images, predicted
from firstorder.attacks import ANU, DDN, PGD, BoundedAttack
from test_minimum_norm import Recorder
from test_validation import Untouched

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
targets = pytest.mark.parametrize("targeted", [False, True])
X, Y = images(), torch.arange(6)


def host_class(name: str) -> Any:
    return getattr(firstorder.foolbox, name)


def interface(model: nn.Module, bounds: tuple[float, float] = (0, 1), **options: Any) -> Any:
    return foolbox.PyTorchModel(model, bounds=bounds, device="cpu", **options)


def aim(y: Tensor, targeted: bool) -> Any:
    return TargetedMisclassification((y + 3) % 10) if targeted else Misclassification(y)


PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PGD Linf": ("PGD", "LinfPGD", {"random_start": False, "steps": 7, "rel_stepsize": 0.3}),
    "PGD L2": ("PGD", "L2PGD", {"random_start": False, "steps": 7, "rel_stepsize": 0.2}),
    "PGD, absolute": ("PGD", "LinfPGD", {"random_start": False, "steps": 7, "abs_stepsize": 0.013}),
    "BIM Linf": ("BIM", "LinfBasicIterativeAttack", {}),
    "BIM L2": ("BIM", "L2BasicIterativeAttack", {}),
    "FGSM": ("FGSM", "FGSM", {}),
    "FGM": ("FGSM", "FGM", {}),
}


@targets
@pytest.mark.parametrize("name", PEERS)
def test_equal_to_foolboxs_own(name: str, targeted: bool, model: Net) -> None:
    ours, theirs, words = PEERS[name]
    peer = getattr(foolbox.attacks, theirs)(**words)
    norm = "L2" if peer.distance is foolbox.distances.l2 else "Linf"
    radii = [0.01, 0.04, 0.25] if norm == "Linf" else [0.1, 0.5, 1.0]
    attack = host_class(ours)(norm=norm, **words)
    x = images(12)
    y = predicted(model, x)
    if targeted and ours == "FGSM":
        return  # foolbox's has no targets
    found, expected = (one(interface(model), x, aim(y, targeted), epsilons=radii) for one in (attack, peer))
    for part in (0, 1):
        torch.testing.assert_close(torch.stack(found[part]), torch.stack(expected[part]), rtol=0, atol=1e-6)
    assert torch.equal(found[2], expected[2])
    assert found[2].shape == (3, 12)
    assert found[2][0].sum() < found[2][2].sum()
    alone = attack(interface(model), x, aim(y, targeted), epsilons=radii[1])
    for several, one in zip(found, alone, strict=True):
        assert torch.equal(several[1], one)


@targets
def test_ddn_walks_like_foolboxs_and_ends_like_it(targeted: bool, model: Net) -> None:
    """Foolbox does not look at the last iterate; where that is no better the results are the same."""
    one, two = Recorder(model.double()).eval(), Recorder(model.double()).eval()
    x = images(8).double()
    y = predicted(model, x)
    words: dict[str, Any] = {"steps": 60, "gamma": 0.1, "init_epsilon": 0.7}
    found = host_class("DDN")(**words).run(interface(one), x, aim(y, targeted))
    expected = foolbox.attacks.DDNAttack(**words).run(interface(two), x, aim(y, targeted))
    result = DDN(steps=60, gamma=0.1, init_norm=0.7).run(model, x, (y + 3 * targeted) % 10, targeted=targeted)
    assert len(one.points) == 60
    same = result.iterations < 60
    assert same.sum() >= 5
    torch.testing.assert_close(found[same], expected[same], rtol=0, atol=1e-6)
    assert torch.equal(found, result.adversarial)


@targets
def test_anu_finds_what_the_core_finds(targeted: bool, model: Net) -> None:
    x = images(8)
    y = predicted(model, x)
    result = ANU(steps=40, preset="mnist").run(model, x, (y + 3 * targeted) % 10, targeted=targeted)
    radii = [None, float(result.norm.median()), 0.0]
    attack = host_class("ANU")(steps=40, preset="mnist")
    raw, clipped, success = attack(interface(model), x, aim(y, targeted), epsilons=radii)
    for found in (*raw, clipped[0]):
        assert torch.equal(found, result.adversarial)
    assert success[0].all()
    assert torch.equal(success[1], result.norm <= radii[1])
    assert 0 < success[1].sum() < 8
    assert not success[2].any()
    assert torch.equal(clipped[2], x)


def test_the_call_survives_a_swap_of_the_import(model: Net) -> None:
    """Same words and defaults as foolbox's own class."""
    names = {"PGD": "PGD", "FGSM": "FGSM", "MIFGSM": "MIFGSM", "BIM": "LinfBasicIterativeAttack", "DDN": "DDNAttack"}
    for ours, theirs in names.items():
        own = inspect.signature(host_class(ours)).parameters
        peer = inspect.signature(getattr(foolbox.attacks, theirs)).parameters
        for parameter in peer.values():
            assert own[parameter.name].default == parameter.default
            assert own[parameter.name].kind == parameter.kind
    assert "rel_stepsize" not in inspect.signature(host_class("FGSM")).parameters


@every_attack
def test_is_a_foolbox_attack(case: Case, model: Net) -> None:
    kind = host_class(case.cls.__name__)
    attack = kind(**({"steps": 3} if "steps" in case.parameters else {}), **case.required())
    assert isinstance(attack, FixedEpsilonAttack if case.bounded else MinimizationAttack)
    assert isinstance(attack, AttackWithDistance)
    assert attack.distance.p == (float("inf") if case.bounded else 2)
    assert (kind.__module__, kind.__name__) == ("firstorder.foolbox", case.cls.__name__)
    assert repr(attack).startswith(f"{kind.__name__}(")
    assert (inspect.getdoc(case.cls) or "").split("\n")[0] in (inspect.getdoc(kind) or "")
    again = pickle.loads(pickle.dumps(attack))
    words = {"epsilons": 0.05 if case.bounded else None}
    assert torch.equal(again(interface(model), X, Y, **words)[0], attack(interface(model), X, Y, **words)[0])
    with pytest.raises(TypeError, match="steeps"):
        kind(steeps=1)


def test_what_is_not_registered_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"no attack named 'DGP' is registered; firstorder\.foolbox has .*PGD"):
        firstorder.foolbox.DGP  # noqa: B018


class Normalised(nn.Module):
    """A network for images of other bounds, as foolbox's preprocessing makes them."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean.reshape(3, 1, 1)) / self.std.reshape(3, 1, 1))
        return logits


@pytest.mark.parametrize("name", ["PGD", "ANU"])
def test_bounds_and_preprocessing(name: str, model: Net) -> None:
    x, mean, std = 255 * X, torch.tensor([10.0, 0.0, 30.0]), torch.tensor([255.0, 200.0, 240.0])
    core: Any = PGD(eps=12.0, steps=5, random_start=False) if name == "PGD" else ANU(steps=20)
    expected = core(Normalised(model, mean, std), x, Y, bounds=(0, 255))
    words: dict[str, Any] = {"random_start": False, "rel_stepsize": None} if name == "PGD" else {}
    attack = host_class(name)(steps=core.steps, **words)
    radius = 12.0 if name == "PGD" else None
    host = interface(model, (0, 255), preprocessing={"mean": mean, "std": std, "axis": -3})
    found, clipped, success = attack(host, x, Y, epsilons=radius)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert clipped.min() >= 0
    assert clipped.max() > 1
    assert torch.equal(success, predicted(Normalised(model, mean, std), clipped) != Y)
    wrapped = host.transform_bounds((0, 1), wrapper=True)
    small = attack(wrapped, X, Y, epsilons=radius and radius / 255)[0]
    torch.testing.assert_close(255 * small, expected, rtol=0, atol=1e-3)


def test_eagerpys_tensors_and_repetitions(model: Net) -> None:
    attack = host_class("PGD")(steps=3, seed=0)
    raw = attack(interface(model), X, Y, epsilons=0.02)[0]
    found = host_class("PGD")(steps=3, seed=0)(
        interface(model), ep.astensor(X), Misclassification(ep.astensor(Y)), epsilons=0.02
    )
    assert all(isinstance(part, ep.PyTorchTensor) for part in found)
    assert torch.equal(found[0].raw, raw)
    assert not torch.equal(attack(interface(model), X, Y, epsilons=0.02)[0], raw), "draws go on"
    success = [host_class("PGD")(steps=1, seed=seed)(interface(model), X, Y, epsilons=0.02)[2] for seed in (5, 5)]
    several = host_class("PGD")(steps=1, seed=5).repeat(4)(interface(model), X, Y, epsilons=0.02)[2]
    assert torch.equal(success[0], success[1])
    assert (several >= success[0]).all()


def test_hyper_parameters_are_attributes(model: Net) -> None:
    attack = host_class("PGD")(random_start=False)
    attack.steps, attack.norm, attack.rel_stepsize, attack.momentum = 3, "L2", None, 5
    expected = PGD(eps=0.4, norm="L2", steps=3, random_start=False)(model, X, Y)
    assert torch.equal(attack(interface(model), X, Y, epsilons=np.float32(0.4).item())[0], expected)
    assert attack.distance.p == 2
    attack.steps = 0
    with pytest.raises(ValueError, match="steps=0"):
        attack(interface(Untouched()), X, Y, epsilons=0.4)


def test_run_alone_is_what_attackbench_calls(model: Net) -> None:
    """The class in a partial, made without its radius, which `run` gets."""
    attack = partial(host_class("BIM"), steps=4)
    assert issubclass(attack.func, FixedEpsilonAttack)
    model.train()
    found = attack().run(model=interface(model), inputs=X, criterion=Misclassification(Y), epsilon=0.05)
    assert model.training
    whole, clipped, success = attack()(interface(model), X, Y, epsilons=0.05)
    assert model.training
    assert torch.equal(found, whole)
    assert torch.equal(success, predicted(model, clipped) != Y), "success is that of evaluation mode"


def test_nan_is_no_success() -> None:
    class Overflowing(Net):
        """Its logits are NaN from its third forward on."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + (torch.nan if self.calls > 2 else 0.0)

    model = Overflowing().eval()
    _, clipped, success = host_class("BIM")(steps=4)(interface(model), X, Y, epsilons=0.3)
    assert model.calls == 5
    assert not success.any()
    assert clipped.isfinite().all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_clipping_keeps_to_the_ball_and_the_bounds(norm: str) -> None:
    """Exactly within the bounds; what is within the ball stays as it is to the last bit."""
    source = torch.Generator().manual_seed(0)
    x, a = torch.rand(2, 2000, 40, generator=source) ** 2
    a[torch.rand(a.shape, generator=source) < 0.3] = 1.0
    x[torch.rand(x.shape, generator=source) < 0.1] = 0.0
    distance = host_class("PGD")(norm=norm).distance
    theirs = getattr(foolbox.distances, norm.lower())
    size = distance(x, a)
    eps = float(size.median())
    clipped, expected = distance.clip_perturbation(x, a, eps), theirs.clip_perturbation(x, a, eps)
    torch.testing.assert_close(clipped, expected, rtol=0, atol=1e-6)
    assert torch.equal(clipped[size <= eps], a[size <= eps])
    assert not torch.equal(expected[size <= eps], a[size <= eps])
    assert distance(x, clipped).max() <= eps + 1e-6
    wide = distance.clip_perturbation(x, a, 0.99 * float(size.max()))
    assert wide.max() <= 1
    assert wide.min() >= 0


class Sure(foolbox.criteria.Criterion):  # type: ignore[misc]
    def __repr__(self) -> str:
        return "Sure()"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        raise AssertionError


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no radius": ("PGD", {"epsilons": [0.1, None]}, "PGD stays within a ball; pass its radius, or take .* DDN"),
    "negative radius": ("PGD", {"epsilons": [0.1, -0.1]}, "eps=-0.1 must be"),
    "radius text": ("PGD", {"epsilons": ["8/255"]}, "eps='8/255' must be"),
    "no radii": ("PGD", {"epsilons": []}, r"epsilons=\[\] names no radius"),
    "None": ("PGD", {"epsilons": None}, "PGD stays within a ball; pass its radius"),
    "NaN": ("PGD", {"inputs": X / X}, "NaN or infinity; clean the data"),
    "out of bounds": ("DDN", {"inputs": 2 * X, "epsilons": None}, r"outside the bounds \[0, 1\].*PyTorchModel"),
    "barely": ("DDN", {"inputs": X + 1e-6, "epsilons": None}, "clamp them where that is rounding"),
    "bytes": ("DDN", {"inputs": (255 * X).byte(), "epsilons": None}, "uint8; convert them"),
    "array": ("PGD", {"inputs": X.numpy()}, "the images are a ndarray; pass a torch tensor"),
    "array in eagerpy": ("PGD", {"inputs": ep.astensor(X.numpy())}, "ndarray; pass a torch tensor"),
    "empty": ("PGD", {"inputs": X[:0]}, "at least one"),
    "few labels": ("PGD", {"criterion": Y[:3]}, "6 images but 3 labels"),
    "float labels": ("PGD", {"criterion": Misclassification(Y.float())}, r"float32.*y\.long\(\)"),
    "list of labels": ("PGD", {"criterion": [1, 2, 3, 4, 5, 6]}, "labels are a list; pass a tensor"),
    "array of labels": ("PGD", {"criterion": Misclassification(Y.numpy())}, "labels are a ndarray; pass a tensor"),
    "criterion": ("PGD", {"criterion": Sure()}, r"criterion Sure\(\) is not supported; pass .*Misclassification"),
    "two criteria": ("DDN", {"criterion": Misclassification(Y) & Sure()}, r"Misclassification\(.* & Sure\(\) is not"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("run", [False, True])
def test_bad_calls_are_refused_before_work(bad: str, run: bool) -> None:
    name, words, message = BAD[bad]
    words = {"model": interface(Untouched()), "inputs": X, "criterion": Y, "epsilons": 0.1, **words}
    call = host_class(name)(random_start=False) if name == "PGD" else host_class(name)()
    if run:
        radii = words.pop("epsilons")
        if not isinstance(radii, float | None):
            return
        words |= {"epsilon": radii} if name == "PGD" else {}
        call = call.run
    with pytest.raises(ValueError, match=message):
        call(**words)


def test_other_models_are_refused_with_the_remedy(model: Net) -> None:
    remedy = r"needs? a PyTorch model: pass foolbox\.PyTorchModel\(module, bounds=\(0, 1\)\)"
    for other in (model, foolbox.NumPyModel(lambda x: x, bounds=(0, 1))):
        with pytest.raises(ValueError, match=f"the model is a {type(other).__name__}; attacks need"):
            host_class("PGD")()(other, X, Y, epsilons=0.1)
        with pytest.raises(ValueError, match=remedy):
            host_class("DDN")().run(other, X, Y)
    hidden = interface(model)
    hidden._model = torch.relu  # a function that shows no module
    with pytest.raises(ValueError, match="the module behind the PyTorchModel cannot be seen"):
        host_class("PGD")()(hidden, X, Y, epsilons=0.1)


def test_bad_parameters_are_refused_when_made(model: Net) -> None:
    for name, words, message in (
        ("PGD", {"rel_stepsize": 0}, "rel_stepsize=0 must be"),
        ("PGD", {"abs_stepsize": -1}, "alpha=-1 must be"),
        ("PGD", {"norm": "L1"}, "norm='L1'"),
        ("MIFGSM", {"momentum": -1}, "decay=-1"),
        ("DDN", {"init_epsilon": 0}, "init_norm=0"),
    ):
        with pytest.raises(ValueError, match=message):
            host_class(name)(**words)
    with pytest.raises(ValueError, match=r"seed=1\.5 must be an integer"):
        host_class("PGD")(seed=1.5)(interface(model), X, Y, epsilons=0.1)
    with pytest.raises(TypeError, match="mask"):
        host_class("PGD")()(interface(Untouched()), X, Y, epsilons=0.1, mask=X)


def test_the_table_has_both_kinds() -> None:
    assert {issubclass(case.cls, BoundedAttack) for case in CASES} == {True, False}
