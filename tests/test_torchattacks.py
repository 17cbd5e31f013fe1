"""The torchattacks interface keeps the base class's promises, and equals torchattacks' own classes."""

from __future__ import annotations

import gc
import importlib
import inspect
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchattacks.attack import Attack as HostAttack

import firstorder.torchattacks
from cases import CASES, Case, Net, images, predicted
from firstorder.attacks import NIFGSM as CORE_NIFGSM
from firstorder.attacks import Draw, Quantised, TorchModel, registry

PEERS: dict[str, dict[str, Any]] = {
    "FGSM": {},
    "BIM": {"steps": 5},
    "PGD": {"steps": 5, "random_start": False},
    "MIFGSM": {"steps": 5, "decay": 0.9},
    "NIFGSM": {"steps": 5, "decay": 0.9},
    "SINIFGSM": {"steps": 5, "m": 3},
}
every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def host_class(name: str) -> Any:
    return getattr(firstorder.torchattacks, name)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("targeted", [False, True])
def test_equal_to_torchattacks_own(name: str, targeted: bool, model: Net) -> None:
    x = images(12)
    y = predicted(model, x)
    ours, theirs = (
        getattr(host, name)(model, eps=0.05, **PEERS[name]) for host in (firstorder.torchattacks, torchattacks)
    )
    if targeted:
        for attack in (ours, theirs):
            attack.set_mode_targeted_by_function(lambda inputs, labels: (labels + 1) % 10, quiet=True)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_the_call_survives_a_swap_of_the_import(name: str, model: Net) -> None:
    """Same defaults and same positions as torchattacks' own class."""
    x, y = images(), torch.arange(6)
    fixed = {"random_start": False} if name == "PGD" else {}
    ours, theirs = (getattr(host, name)(model, **fixed) for host in (firstorder.torchattacks, torchattacks))
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=0, atol=1e-6)
    peer = inspect.signature(getattr(torchattacks, name))
    own = inspect.signature(host_class(name))
    assert list(own.parameters)[: len(peer.parameters)] == list(peer.parameters)
    for parameter in peer.parameters.values():
        assert own.parameters[parameter.name].default == parameter.default


SQUARE = (3, 6, 6)
RANDOM: dict[str, dict[str, Any]] = {
    "DIFGSM": {"decay": 0.9, "diversity_prob": 1.0, "resize_rate": 0.84},  # 6 -> 5 at the one place there is
    "TIFGSM": {"decay": 0.9, "diversity_prob": 0.0, "len_kernel": 5},
    "VMIFGSM": {"decay": 0.9, "N": 3, "beta": 0.7},
    "VNIFGSM": {"decay": 0.9, "N": 3, "beta": 0.7},
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("kernel_name", ["gaussian", "linear", "uniform"])
def test_equal_to_torchattacks_own_given_its_draws(
    name: str, kernel_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"eps": 0.05, "steps": 4, **RANDOM[name]}
    if name == "TIFGSM":
        words["kernel_name"] = kernel_name
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 30), nn.Tanh(), nn.Linear(30, 10)).eval()
    x = images(8, shape=SQUARE)
    y = predicted(model, x)
    torch.manual_seed(3)
    theirs = getattr(torchattacks, name)(model, **words)(x, y)
    if name.startswith("V"):
        radius = 0.05 * words["beta"]

        def uniform(draw: Draw, points: Tensor, shape: tuple[int, ...]) -> Tensor:
            offsets = [torch.randn_like(x).uniform_(-radius, radius) for _ in range(len(points) // len(x))]
            return (torch.cat(offsets) / radius + 1) / 2

        monkeypatch.setattr(Draw, "uniform", uniform)
    torch.manual_seed(3)
    ours = host_class(name)(model, **words)(x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    plain = torchattacks.MIFGSM(model, eps=0.05, steps=4, decay=0.9)(x, y)
    assert not torch.allclose(theirs, plain, atol=1e-3)


@pytest.mark.parametrize("name", RANDOM)
def test_random_attacks_keep_torchattacks_signature(name: str) -> None:
    peer, own = inspect.signature(getattr(torchattacks, name)), inspect.signature(host_class(name))
    assert list(own.parameters)[: len(peer.parameters)] == list(peer.parameters)
    for parameter in peer.parameters.values():
        assert own.parameters[parameter.name].default == parameter.default


@every_attack
def test_is_a_torchattacks_attack(case: Case, model: Net) -> None:
    attack = host_class(case.cls.__name__)(model, **case.required())
    assert isinstance(attack, HostAttack)
    assert type(attack).__module__ == "firstorder.torchattacks"
    assert type(attack).__name__ in repr(attack)
    assert case.cls.__doc__ is not None
    assert case.cls.__doc__.split("\n")[0] in (inspect.getdoc(type(attack)) or "")
    again = pickle.loads(pickle.dumps(attack))
    x, y = images(), torch.arange(6)
    assert torch.equal(again(x, y), attack(x, y))


def test_positional_and_keyword_only_arguments(model: Net) -> None:
    attack = host_class("PQGD")(model, 8 / 255, 2 / 255, 10, 100)
    assert (attack.eps, attack.alpha, attack.steps, attack.b) == (8 / 255, 2 / 255, 10, 100)
    with pytest.raises(TypeError, match="bee"):
        host_class("PQGD")(model, bee=3)
    with pytest.raises(ValueError, match="eps=-1"):
        host_class("PQGD")(model, eps=-1)


def test_attributes_may_be_changed_between_calls(model: Net) -> None:
    x, y = images(), torch.arange(6)
    attack = host_class("NIFGSM")(model, eps=0.01)
    attack.eps, attack.direction = 0.05, Quantised(levels=50)
    core = CORE_NIFGSM(eps=0.05, alpha=2 / 255, direction=Quantised(levels=50))
    assert torch.equal(attack(x, y), core(model, x, y))


@every_attack
def test_targeted_modes(case: Case, model: Net) -> None:
    x = images(12)
    y = predicted(model, x)
    targets: list[Tensor] = []

    class Spy(host_class(case.cls.__name__)):  # type: ignore[misc]
        def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            targets.append(super().get_target_label(inputs, labels))
            return targets[-1]

    Spy.__signature__ = host_class(case.cls.__name__).__signature__
    attack = Spy(model, **case.small)
    modes = {
        "label": lambda: attack.set_mode_targeted_by_label(quiet=True),
        "random": lambda: attack.set_mode_targeted_random(quiet=True),
        "least-likely": lambda: attack.set_mode_targeted_least_likely(quiet=True),
        "function": lambda: attack.set_mode_targeted_by_function(lambda i, labels: (labels + 2) % 10, quiet=True),
    }
    for mode, choose in modes.items():
        choose()
        given = (y + 5) % 10 if mode == "label" else y
        adversarial = attack(x, given)
        target = targets[-1]
        with torch.no_grad():
            gain = (model(adversarial).log_softmax(1) - model(x).log_softmax(1)).gather(1, target[:, None])
        assert (gain > 0).all(), mode
        if mode == "label":
            assert torch.equal(target, given)
        elif mode == "function":
            assert torch.equal(target, (y + 2) % 10)
        elif mode == "least-likely":
            assert torch.equal(target, model(x).argmin(1))
        else:
            assert (target != y).all()
            assert len(target.unique()) > 2
    attack.set_mode_default()
    assert not torch.equal(attack(x, y), adversarial)
    assert len(targets) == 4


def test_labels_are_needed_unless_the_mode_finds_targets(model: Net) -> None:
    attack = host_class("PGD")(model)
    with pytest.raises(ValueError, match="labels=None"):
        attack(images())
    attack.set_mode_targeted_least_likely(quiet=True)
    assert attack(images()).shape == images().shape


def test_random_targets_leave_the_global_state_alone(model: Net) -> None:
    attack = host_class("PGD")(model, seed=3)
    attack.set_mode_targeted_random(quiet=True)
    before = torch.get_rng_state()
    attack(images(), torch.arange(6))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["PGD", "PQGD", "SINIFGSM"])
def test_normalisation(name: str, model: Net) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    x, y = images(), torch.arange(6)
    inner = nn.Sequential(model)
    plain = host_class(name)(lambda_module(lambda z: inner((z - m) / s)), eps=0.05, seed=1)
    attack = host_class(name)(inner, eps=0.05, seed=1)
    attack.set_normalization_used(mean, std)
    torch.testing.assert_close(attack((x - m) / s, y), (plain(x, y) - m) / s, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="labels"):
        attack((x - m) / s, y[:2])
    torch.testing.assert_close(
        host_class(name)(inner, eps=0.05, seed=1)(x, y), host_class(name)(inner, eps=0.05, seed=1)(x, y), rtol=0, atol=0
    )
    assert attack._normalization_applied is True, "an exception must not leave the flag behind"


def lambda_module(function: Any) -> nn.Module:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            return function(x)

    return Module().eval()


def test_training_modes_reach_the_model() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.features[1].training, self.head[1].training))
            return super().forward(x)

    model = Watched().train()
    attack = host_class("PGD")(model, steps=1)
    for options in ({}, {"model_training": True}, {"model_training": True, "dropout_training": True}):
        attack.set_model_training_mode(**options)
        attack(images(), torch.arange(6))
    assert seen[0] == (False, False, False)
    assert (True, False, False) in seen
    assert seen[-1] == (True, False, True)
    assert all(module.training for module in model.modules())


def test_set_device(model: Net) -> None:
    attack = host_class("PGD")(model)
    assert attack.device == torch.device("cpu")
    attack.set_device("cpu")
    assert attack(images(), torch.arange(6)).device.type == "cpu"


def test_save_and_load(model: Net, tmp_path: Path) -> None:
    x = images(12)
    y = predicted(model, x)
    attack = host_class("BIM")(model, eps=0.05)
    accuracy, l2, _ = attack.save(
        DataLoader(TensorDataset(x, y), batch_size=5),
        save_path=str(tmp_path / "adversarial.pt"),
        verbose=False,
        return_verbose=True,
        save_predictions=True,
    )
    loaded = next(iter(HostAttack.load(str(tmp_path / "adversarial.pt"), batch_size=12)))
    expected = attack(x, y)
    assert torch.equal(loaded[0], expected)
    with torch.no_grad():
        assert accuracy == pytest.approx(100 * (model(expected).argmax(1) == y).float().mean().item())
    assert l2 > 0


def test_multi_attack_keeps_the_best_of_several(model: Net) -> None:
    x = images(40, seed=3)
    y = predicted(model, x)
    one, two = host_class("FGSM")(model, eps=0.01), host_class("PQGD")(model, eps=0.02, random_start=False)
    both = torchattacks.MultiAttack([one, two])
    with torch.no_grad():
        broken = [model(a(x, y)).argmax(1) != y for a in (one, two, both)]
    assert torch.equal(broken[2], broken[0] | broken[1])
    assert broken[2].float().mean() > 0
    both_ours = torchattacks.MultiAttack([torchattacks.PGD(model), two])
    assert both_ours(x, y).shape == x.shape


def test_random_draws_advance_from_call_to_call_and_restart_with_the_seed(model: Net) -> None:
    x, y = images(), torch.arange(6)
    attack = host_class("PGD")(model, steps=1, seed=7)
    first, second = attack(x, y), attack(x, y)
    assert not torch.equal(first, second)
    assert torch.equal(host_class("PGD")(model, steps=1, seed=7)(x, y), first)
    with pytest.raises(ValueError, match=r"seed=0\.5 must be an integer"):
        host_class("PGD")(model, steps=1, seed=0.5)(x, y)
    with pytest.raises(ValueError, match="random_start='no' must be a bool"):
        host_class("PGD")(model, random_start="no")
    torch.manual_seed(3)
    third = host_class("PGD")(model, steps=1)(x, y)
    torch.manual_seed(3)
    assert torch.equal(host_class("PGD")(model, steps=1)(x, y), third)


def test_an_attack_does_not_keep_its_model_alive() -> None:
    model = Net()
    host_class("NGM")(model).eps = 0.3
    attack = host_class("NGM")(model)
    attack(images(), torch.arange(6))
    reference = weakref.ref(model)
    del model, attack
    gc.collect()
    assert reference() is None


def test_an_unknown_attack_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="ClippedNGM"):
        host_class("NoSuchAttack")
    assert set(dir(firstorder.torchattacks)) >= {case.cls.__name__ for case in CASES}


OURS = set(registry().by_class_name())


def test_every_name_of_torchattacks_is_here_and_ours_win() -> None:
    space: dict[str, Any] = {}
    exec("from firstorder.torchattacks import *", space)
    for name in (*torchattacks.__all__, "__version__", "__wrapper__"):
        own, theirs = host_class(name), getattr(torchattacks, name)
        assert (own is theirs) == (name not in OURS), name
        assert name.startswith("__") or space[name] is own, name
    assert {"PGD", "CW", "MultiAttack"} <= set(torchattacks.__all__)


def test_a_version_without_all_offers_its_public_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(firstorder.torchattacks.__all__)
    monkeypatch.delattr(torchattacks, "__all__")
    assert set(firstorder.torchattacks.__all__) == before


def test_submodules_are_torchattacks_own_with_our_classes_in_them() -> None:
    pgd, cw, attack = (
        importlib.import_module(f"firstorder.torchattacks.{name}") for name in ("attacks.pgd", "attacks.cw", "attack")
    )
    assert pgd.PGD is host_class("PGD") is firstorder.torchattacks.attacks.pgd.PGD
    assert cw.CW is torchattacks.CW
    assert attack.Attack is HostAttack
    assert firstorder.torchattacks.wrappers.multiattack.MultiAttack is torchattacks.MultiAttack
    assert not hasattr(pgd, "NoSuchAttack")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("firstorder.torchattacks.attacks.nothing")


def test_a_loop_over_all_names_fails_where_torchattacks_own_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Tanh(), nn.Linear(20, 10)).eval()
    x = images(2, shape=SQUARE)
    y = predicted(model, x)

    def failures(host: Any) -> set[str]:
        failed = set()
        for name in torchattacks.__all__:
            try:
                assert getattr(host, name)(model)(x, y).shape == x.shape
            except Exception:
                failed.add(name)
        return failed

    assert failures(firstorder.torchattacks) == failures(torchattacks) == {"MultiAttack", "LGV"}


def test_wrappers_take_ours(model: Net) -> None:
    x = images(8)
    y = predicted(model, x)
    own = firstorder.torchattacks
    both = own.MultiAttack([own.PGD(model, steps=2), own.FGSM(model, eps=0.1)])
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    words = {"epochs": 1, "nb_models_epoch": 2, "verbose": False, "attack_class": own.BIM, "steps": 2}
    for attack in (both, own.LGV(model, loader, **words)):
        adversarial = attack(x, y)
        assert adversarial.shape == x.shape
        assert not torch.equal(adversarial, x)


BAD_MODELS: dict[str, tuple[Any, str]] = {
    "function": (lambda v: v.flatten(1), "model is a function.* nn.Module .* whose forward"),
    "TorchModel": (TorchModel(nn.Flatten()), "model is a TorchModel.* pass the module"),
    "class": (Net, "model is a type.* pass the nn.Module"),
    "number": (3, "model is a int"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_what_is_no_module_is_refused_with_the_remedy(name: str, model: Net) -> None:
    bad, message = BAD_MODELS[name]
    with pytest.raises(ValueError, match=message):
        host_class("PGD")(bad)
    attack = host_class("PGD")(model)
    with pytest.raises(ValueError, match=message):
        attack.set_model(bad)
    assert attack.model is model


def test_the_remedy_for_functions_works(model: Net) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model.eval()(x)

    x, y = images(), torch.arange(6)
    expected = host_class("BIM")(model)(x, y)
    assert torch.equal(host_class("BIM")(Wrapped())(x, y), expected)
    assert not torch.equal(expected, x)


def test_an_object_that_stands_for_a_module_is_taken(model: Net) -> None:
    class Standing:
        def __call__(self, x: Tensor) -> Any:
            return model(x)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    x, y = images(), torch.arange(6)
    assert torch.equal(host_class("BIM")(Standing())(x, y), host_class("BIM")(model)(x, y))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("mode", ["default", "by_label", "random", "least_likely"])
def test_what_is_no_tensor_is_refused_before_the_model_is_called(normalised: bool, mode: str) -> None:
    calls: list[int] = []
    attack = host_class("PGD")(lambda_module(lambda v: calls.append(len(v))))
    if normalised:
        attack.set_normalization_used([0.5] * 3, [0.2] * 3)
    getattr(attack, "set_mode_default" if mode == "default" else f"set_mode_targeted_{mode}")()
    x, y = images(), torch.arange(6)
    for labels in (y.tolist(), y.numpy(), 3):
        with pytest.raises(ValueError, match=rf"labels are a {type(labels).__name__}; .*torch.as_tensor\(labels\)"):
            attack(x, labels)
    for pictures in (x.numpy(), x.tolist(), None):
        with pytest.raises(ValueError, match=f"images are a {type(pictures).__name__}; pass a torch tensor"):
            attack(pictures, y)
    assert not calls


def test_targets_that_are_no_tensor_are_refused(model: Net) -> None:
    attack = host_class("PGD")(model)
    attack.set_mode_targeted_by_function(lambda inputs, labels: [1] * len(labels), quiet=True)
    with pytest.raises(ValueError, match="labels are a list; pass a tensor"):
        attack(images(), torch.arange(6))
    attack.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="labels=None: a targeted attack needs the target labels"):
        attack(images())


@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_modes_that_find_targets_take_one_hot_rows(mode: str, model: Net) -> None:
    x, y = images(), torch.arange(6)
    found = []
    for labels in (y, nn.functional.one_hot(y, 10)):
        attack = host_class("BIM")(model, seed=1)
        getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
        found.append(attack(x, labels))
    assert torch.equal(*found)
    assert not torch.equal(found[0], x)


def test_images_outside_the_bounds_are_refused_with_the_normalisation_remedy(model: Net) -> None:
    x, y = images(), torch.arange(6)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    attack = host_class("PGD")(model)
    for outside in ((x - m) / s, 255 * x, x - 1e-3):
        with pytest.raises(
            ValueError, match=r"outside the bounds \[0, 1\]; .*attack.set_normalization_used\(mean, std"
        ):
            attack(outside, y)
    attack.set_normalization_used(mean, std)
    assert attack((x - m) / s, y).shape == x.shape
    with pytest.raises(ValueError, match=r"normalisation undone, span .* outside the bounds \[0, 1\]; .* mean and std"):
        attack((255 * x - m) / s, y)
    with pytest.raises(ValueError, match="labels"):
        host_class("PGD")(model)(x, y[:2])


@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_targets_and_save_leave_every_submodules_mode(mode: str) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.features[1].training))
            return super().forward(x)

    model = Watched().train()
    model.features[1].eval()
    attack = host_class("PGD")(model, steps=2)
    attack.set_model_training_mode(model_training=True)
    getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
    attack.save(DataLoader(TensorDataset(images(), torch.arange(6)), batch_size=6), verbose=False, return_verbose=True)
    assert set(seen) == {(False, False), (True, False)}
    assert model.training
    assert not model.features[1].training


def table() -> str:
    """Every name of torchattacks beside what it names here, both called as its scripts do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 30), nn.Tanh(), nn.Linear(30, 10)).eval()
    x = images(200, shape=SQUARE)
    y = predicted(model, x)
    lines = ["| name | here | result |", "|---|---|---|"]
    for name in torchattacks.__all__:
        if name not in OURS:
            lines.append(f"| {name} | torchattacks' own | the same class |")
            continue
        torch.manual_seed(0)
        ours, theirs = (getattr(host, name)(model, eps=0.03)(x, y) for host in (firstorder.torchattacks, torchattacks))
        robust = [(model(found).argmax(1) == y).float().mean().item() for found in (ours, theirs)]
        mean = sum(robust) / 2
        assert 0.03 < mean < 0.97, f"{name}: {robust} tell nothing"
        if torch.allclose(ours, theirs, rtol=0, atol=1e-6):
            result = "equal to 1e-6"
        else:
            assert abs(robust[0] - robust[1]) <= 1.96 * (2 * mean * (1 - mean) / len(x)) ** 0.5, f"{name}: {robust}"
            result = "the same robust accuracy within its 95 % interval"
        lines.append(f"| {name} | firstorder's | {result} |")
    return "\n".join(lines)


def test_the_table_of_names_is_that_of_the_documentation() -> None:
    page = Path(__file__).parent.parent / "docs" / "numbers" / "torchattacks.md"
    assert table() in page.read_text(encoding="utf-8")
