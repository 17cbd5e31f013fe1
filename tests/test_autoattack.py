"""AutoAttack's verdicts, alone and among registered attacks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import art.attacks.evasion
import numpy as np
import pyautoattack
import pytest
import torch
import torchattacks
from art.estimators.classification import PyTorchClassifier
from pyautoattack.state import EvaluationState
from torch import Tensor, nn

from firstorder.attacks import ANU, PQGD, RobustnessWarning, Select, TorchModel
from firstorder.autoattack import AutoAttack
from firstorder.autoattack.running import Attacked
from firstorder.evaluation.names import packaged

EPS = 0.33
"""A little beyond the radius of the model's training: some examples break, others do not, at small budgets."""


def small(adversary: Any) -> Any:
    """The same attacks at budgets that a test can afford."""
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = 10
    adversary.fab.n_iter = 4
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 2
    adversary.square.n_queries = 60
    return adversary


@pytest.fixture(scope="module")
def mnist() -> tuple[nn.Module, Tensor, Tensor]:
    images = packaged.mnist()
    return packaged.mnist_cnn(), images.x[:60], images.y[:60]


def ours(model: nn.Module, **words: Any) -> AutoAttack:
    return small(AutoAttack(model, **{"eps": EPS, "seed": 0, "device": "cpu", **words}))


def theirs(model: nn.Module, x: Tensor, y: Tensor, bs: int = 16) -> tuple[Tensor, Tensor]:
    peer = small(pyautoattack.AutoAttack(model, eps=EPS, seed=0, device="cpu"))
    adversarial, labels = peer.run_standard_evaluation(x, y, batch_size=bs)
    return adversarial, labels == y


def test_standard_is_autoattacks_own_verdict(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model)
    adversarial, labels = adversary.run_standard_evaluation(x, y, bs=16, return_labels=True)
    expected, robust = theirs(model, x, y)
    assert torch.equal(adversarial, expected)
    record = adversary.record
    assert record is not None
    assert torch.equal(record.robust, robust)
    assert 0.2 < robust.float().mean() < 0.98
    assert torch.equal(labels == y, robust)
    assert record.run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert all(record.gradients[name] > 0 for name in ("apgd-ce", "apgd-t", "fab-t"))
    assert record.gradients["square"] == 0
    assert record.forwards["square"] > 500
    assert record.accuracy["square"] == pytest.approx(float(robust.float().mean()))
    assert set(record.unverified.values()) == {0}
    assert not model._forward_hooks


def test_firstorder_breaks_no_less_than_standard(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, version="firstorder")
    assert adversary.attacks_to_run == ["pqgd", "pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    adversarial = adversary.run_standard_evaluation(x, y, bs=16)
    assert adversary.record is not None
    robust = adversary.record.robust
    _, standard = theirs(model, x, y)
    plain = ours(model)
    plain.run_standard_evaluation(x, y, bs=16)
    assert plain.record is not None
    expected = plain.record.gradients
    assert (standard | ~robust).all(), "an example that AutoAttack breaks is broken"
    assert robust.sum() <= standard.sum()
    for name in ("apgd-ce", "apgd-t"):
        assert adversary.record.gradients[name] == expected[name]
    assert (adversarial - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        assert torch.equal(model(adversarial).argmax(1) == y, robust)
    broken_by = adversary.record.broken_by
    assert {"pqgd", None} <= set(broken_by)
    for name, example, clean in zip(broken_by, adversarial, x, strict=True):
        assert torch.equal(example, clean) == (name in (None, "clean"))


def test_firstorder_takes_the_recommended_options(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, norm="L2", eps=2.0, version="firstorder", parameters={"anu": {"preset": "mnist"}})
    assert adversary.attacks_to_run == ["anu", "pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    adversary.attacks_to_run = ["anu"]
    adversary.run_standard_evaluation(x, y, bs=16)
    assert adversary.record is not None
    clean = torch.tensor([by != "clean" for by in adversary.record.broken_by])
    nearest = ANU(steps=40, preset="mnist", annealed=False).run(model, x[clean], y[clean]).broken(2.0)
    assert torch.equal(~adversary.record.robust[clean], nearest)
    published = ANU(steps=40, preset="mnist").run(model, x[clean], y[clean]).broken(2.0)
    assert not torch.equal(nearest, published)


def test_mixed_lists_and_parameters(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, attacks_to_run=["apgd-ce", "pqgd"], parameters={"pqgd": {"steps": 3, "b": 50}})
    adversary.run_standard_evaluation(x, y, bs=16)
    assert adversary.record is not None
    left = round(adversary.record.accuracy["apgd-ce"] * len(x))
    assert adversary.record.gradients["pqgd"] == 3 * left
    alone = ours(model, attacks_to_run=["pqgd"], parameters={"pqgd": {"steps": 3}})
    alone.run_standard_evaluation(x[:10], y[:10], bs=10)
    assert alone.record is not None
    attack = PQGD(eps=EPS, steps=3)
    expected = attack.run(TorchModel(model), x[:10], y[:10], generator=torch.Generator().manual_seed(0))
    assert expected.success is not None
    assert torch.equal(alone.record.robust, ~expected.success)


def test_l2_and_minimum_norm_attacks(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, norm="L2", eps=2.0, attacks_to_run=["anu", "ddn", "pgd"])
    adversarial = adversary.run_standard_evaluation(x, y, bs=16)
    assert adversary.record is not None
    assert (adversarial - x).flatten(1).norm(dim=1).max() <= 2.0 + 1e-6
    assert 0.2 < adversary.record.accuracy["anu"] < 0.9
    assert adversary.record.robust.any()
    with pytest.raises(ValueError, match="pqgd knows Linf, not norm='L2'"):
        ours(model, norm="L2", attacks_to_run=["pqgd"])


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("survived", [0, 1, 2, 3])
@pytest.mark.parametrize("within", [False, True], ids=["between attacks", "within an attack"])
def test_interrupted_and_resumed(
    survived: int, within: bool, mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    model, x, y = mnist
    x, y = x[:20], y[:20]
    names = ["mi-fgsm", "apgd-ce", "pqgd", "apgd-t"]
    whole = ours(model, attacks_to_run=names)
    expected = whole.run_standard_evaluation(x, y, bs=8)
    state = tmp_path / "state.json"
    attack, count = AutoAttack._attack, 0

    def killed(self: AutoAttack, *args: Any) -> None:
        nonlocal count
        if count == survived:
            if within:
                calls = iter(range(3))
                self.model = lambda z: model(z) if next(calls, None) is not None else (_ for _ in ()).throw(Killed())
                attack(self, *args)
            raise Killed
        count += 1
        attack(self, *args)

    monkeypatch.setattr(AutoAttack, "_attack", killed)
    with pytest.raises(Killed):
        ours(model, attacks_to_run=names).run_standard_evaluation(x, y, bs=8, state_path=state)
    monkeypatch.setattr(AutoAttack, "_attack", attack)
    resumed = ours(model, attacks_to_run=names)
    found = resumed.run_standard_evaluation(x, y, bs=8, state_path=state)
    assert torch.equal(found, expected)
    assert resumed.record is not None
    assert whole.record is not None
    assert resumed.record.broken_by == whole.record.broken_by
    assert resumed.record.gradients == whole.record.gradients
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.json.examples.pt"]
    classic = EvaluationState.from_disk(state)
    assert classic.robust_flags is not None
    assert torch.equal(classic.robust_flags, resumed.record.robust)
    assert classic.run_attacks == names


def test_what_fab_t_leaves_behind_survives_an_interruption(
    mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = mnist
    state = tmp_path / "state.json"
    whole = ours(model, attacks_to_run=["fab-t", "fab"])
    whole.run_standard_evaluation(x[:8], y[:8])
    attack = AutoAttack._attack

    def killed(self: AutoAttack, name: str, *args: Any) -> None:
        if name == "fab":
            raise Killed
        attack(self, name, *args)

    monkeypatch.setattr(AutoAttack, "_attack", killed)
    with pytest.raises(Killed):
        ours(model, attacks_to_run=["fab-t", "fab"]).run_standard_evaluation(x[:8], y[:8], state_path=state)
    monkeypatch.setattr(AutoAttack, "_attack", attack)
    resumed = ours(model, attacks_to_run=["fab-t", "fab"])
    resumed.run_standard_evaluation(x[:8], y[:8], state_path=state)
    assert whole.record is not None
    assert resumed.record is not None
    assert resumed.record.gradients == whole.record.gradients


def test_a_state_of_another_evaluation_is_refused(mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = mnist
    state = tmp_path / "state.json"
    ours(model, attacks_to_run=["fgsm"]).run_standard_evaluation(x, y, state_path=state)
    for words, images in (({"eps": 0.2}, x), ({"seed": 1}, x), ({}, x.flip(0)), ({"attacks_to_run": ["pgd"]}, x)):
        adversary = ours(model, **{"attacks_to_run": ["fgsm"], **words})
        with pytest.raises(ValueError, match="another evaluation"):
            adversary.run_standard_evaluation(images, y, state_path=state)
    other = packaged.mnist_cnn()
    next(other.parameters()).data.add_(1e-3)
    with pytest.raises(ValueError, match=r"another model \(weights "):
        ours(other, attacks_to_run=["fgsm"]).run_standard_evaluation(x, y, state_path=state)
    (tmp_path / "alone.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"alone\.json has no"):
        ours(model, attacks_to_run=["fgsm"]).run_standard_evaluation(x, y, state_path=tmp_path / "alone.json")


def test_what_cannot_be_verified_is_counted(mnist: tuple[nn.Module, Tensor, Tensor], monkeypatch: Any) -> None:
    model, x, y = mnist

    def far(self: AutoAttack, name: str, x: Tensor, y: Tensor, bs: int) -> Attacked:
        every = torch.ones(len(x), dtype=torch.bool)
        return Attacked((x + 0.5).clamp(0, 1), (y + 1) % 10, every, ~every)

    monkeypatch.setattr(AutoAttack, "_original", far)
    monkeypatch.setattr(AutoAttack, "_registered", far)
    for name, counted in (("apgd-ce", True), ("pqgd", False)):
        adversary = ours(model, attacks_to_run=[name])
        adversary.run_standard_evaluation(x, y)
        assert adversary.record is not None
        assert adversary.record.unverified[name] == round(adversary.record.accuracy["clean"] * len(x))
        assert (not adversary.record.robust.any()) == counted


def test_every_attack_by_itself(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, attacks_to_run=["pqgd", "apgd-ce"])
    found = adversary.run_standard_evaluation_individual(x, y, bs=16)
    assert list(found) == adversary.attacks_to_run == ["pqgd", "apgd-ce"]
    for name, adversarial in found.items():
        alone = ours(model, attacks_to_run=[name])
        assert torch.equal(alone.run_standard_evaluation(x, y, bs=16), adversarial)


def test_the_log_file(mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = mnist
    adversary = ours(model, attacks_to_run=["apgd-ce"], log_path=tmp_path / "log.txt")
    adversary.run_standard_evaluation(x[:8], y[:8])
    assert "apgd-ce" in (tmp_path / "log.txt").read_text().lower()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"attacks_to_run": ["pqdg"]}, r"unknown attack 'pqdg'.*pqgd.*apgd-ce"),
    "version": ({"version": "faster"}, "version='faster'"),
    "list and version": ({"attacks_to_run": ["pqgd"], "version": "standard"}, "no effect with version='standard'"),
    "eps of a member": (
        {"attacks_to_run": ["pgd"], "parameters": {"pgd": {"eps": 0.9}}},
        "eps or norm, which are the evaluation's",
    ),
    "norm": ({"norm": "L0"}, "norm='L0'"),
    "eps": ({"eps": -1.0}, r"eps=-1\.0"),
    "parameters": ({"attacks_to_run": ["pgd"], "parameters": {"pqgd": {}}}, "parameters.*pqgd.*not run"),
    "bad parameter": ({"attacks_to_run": ["pqgd"], "parameters": {"pqgd": {"b": 0}}}, "b=0"),
    "firstorder in L1": ({"version": "firstorder", "norm": "L1"}, "norm='L1'"),
    "TensorFlow": ({"is_tf_model": True}, "TensorFlow"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad: str, mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    words, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        AutoAttack(mnist[0], **{"eps": EPS, "device": "cpu", **words})


def test_autoattack_in_a_list_has_the_standard_budgets(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    standard, listed = ours(model), ours(model, attacks_to_run=["autoattack", "mi-fgsm"])
    assert listed.attacks_to_run == [*standard.attacks_to_run, "mi-fgsm"]
    assert (listed.apgd.n_restarts, listed.fab.n_restarts) == (1, 1)
    for adversary in (standard, listed):
        adversary.run_standard_evaluation(x[:20], y[:20], bs=20)
    assert standard.record is not None
    assert listed.record is not None
    assert {name: listed.record.gradients[name] for name in standard.record.run} == standard.record.gradients


def test_a_randomised_model_is_not_broken_by_chance(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist

    def noisy(z: Tensor) -> Tensor:
        return model(z) + 3 * torch.randn(len(z), 10)

    adversary = small(AutoAttack(noisy, eps=0.1, seed=0, device="cpu", version="rand"))
    adversary.apgd.eot_iter = 1
    adversarial = adversary.run_standard_evaluation(x, y, bs=60)
    assert adversary.record is not None
    for name, example, clean in zip(adversary.record.broken_by, adversarial, x, strict=True):
        assert torch.equal(example, clean) == (name in (None, "clean"))


def test_attacks_may_be_named_after_construction(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    adversary = ours(model, version="custom")
    with pytest.raises(ValueError, match="runs nothing"):
        adversary.run_standard_evaluation(x, y)
    adversary.attacks_to_run = ["fgsm"]
    adversary.run_standard_evaluation(x, y)
    assert adversary.record is not None
    assert adversary.record.run == ["fgsm"]


def test_the_classic_state_catches_up(mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    """An interruption may fall between the two files of a state: the next call writes the second."""
    model, x, y = mnist
    state = tmp_path / "state.json"
    for _ in range(2):
        adversary = ours(model, attacks_to_run=["fgsm", "pgd"])
        adversary.run_standard_evaluation(x, y, state_path=state)
        assert adversary.record is not None
        flags = EvaluationState.from_disk(state).robust_flags
        assert flags is not None
        assert torch.equal(flags, adversary.record.robust)
        state.unlink()


def test_budgets_and_batches_belong_to_the_state(mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = mnist
    state = tmp_path / "state.json"
    ours(model, attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y, state_path=state)
    longer = ours(model, attacks_to_run=["apgd-ce"])
    longer.apgd.n_iter = 30
    callable_ = ours(lambda z: -model(z), attacks_to_run=["apgd-ce"])
    for adversary, bs in ((longer, 250), (callable_, 250), (ours(model, attacks_to_run=["apgd-ce"]), 7)):
        with pytest.raises(ValueError, match=r"delete it and state\.json\.examples\.pt"):
            adversary.run_standard_evaluation(x, y, bs=bs, state_path=state)


def test_bad_examples(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    for images, labels, message in (
        (255 * x, y, "outside the bounds"),
        (x, y[:3], "60 images but 3"),
        (x, y + 5, "0..9"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(model, attacks_to_run=["fgsm"]).run_standard_evaluation(images, labels)
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"bs={size}"):
            ours(model, attacks_to_run=["fgsm"]).run_standard_evaluation(x, y, bs=size)


def test_clean_accuracy_of_what_has_none(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    share = float((model(x).argmax(1) == y).float().mean())
    rows = torch.nn.functional.one_hot(y, 10)
    assert ours(model).clean_accuracy(x, rows, bs=7) == pytest.approx(share)
    with torch.inference_mode():
        assert ours(model).clean_accuracy(x, y, bs=7) == pytest.approx(share)
    for images, labels, size, message in (
        (x, y[:3], 9, "60 images but 3"), (x, y + 5, 9, r"0\.\.9"), (x[:0], y[:0], 9, "no images"), (x, y, 0, "bs=0"),
        (255 * x, y, 9, "divide bytes by 255"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ours(model).clean_accuracy(images, labels, bs=size)


def test_the_hosts_autoattacks_agree(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    """APGD-CE alone, one restart, equal steps: the verdicts of all four agree up to single examples.

    Ours is the installed package's to the last bit. torchattacks and ART carry ports: they draw their starts
    from other generators, and ART divides its batches and counts its steps differently.
    """
    model, x, y = mnist
    eps = 0.25
    adversary = AutoAttack(model, eps=eps, seed=0, device="cpu", attacks_to_run=["apgd-ce"])
    adversary.apgd.n_iter, adversary.apgd.n_restarts = 30, 1
    adversary.run_standard_evaluation(x, y, bs=60)
    assert adversary.record is not None
    peer = pyautoattack.AutoAttack(model, eps=eps, seed=0, device="cpu", version="custom", attacks=["apgd-ce"])
    peer.apgd.n_iter, peer.apgd.n_restarts = 30, 1
    _, labels = peer.run_standard_evaluation(x, y, batch_size=60)
    estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1), device_type="cpu")
    torch.manual_seed(0)
    np.random.seed(0)
    port = torchattacks.APGD(model, eps=eps, steps=30, n_restarts=1, seed=0, loss="ce")(x, y)
    single = art.attacks.evasion.AutoProjectedGradientDescent(
        estimator, eps=eps, eps_step=2 * eps, max_iter=30, nb_random_init=1, loss_type="cross_entropy", verbose=False
    )
    ensemble = art.attacks.evasion.AutoAttack(estimator, eps=eps, attacks=[single], batch_size=60)
    by_art = torch.from_numpy(ensemble.generate(x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()]))
    with torch.no_grad():
        verdicts = {
            "pyautoattack": labels == y,
            "torchattacks": model(port).argmax(1) == y,
            "art": model(by_art).argmax(1) == y,
        }
    robust = adversary.record.robust
    assert torch.equal(verdicts["pyautoattack"], robust)
    assert 0.9 < robust.float().mean() < 1
    assert (verdicts["torchattacks"] != robust).sum() <= 1
    assert (verdicts["art"] != robust).sum() <= 1


@pytest.mark.parametrize("names", [["fgsm"], ["apgd-ce"]])
def test_outputs_that_are_no_logits_are_refused_with_a_remedy_that_works(
    names: list[str], mnist: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, y = mnist

    class Paired(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return model(x), x

    def evaluate(module: nn.Module) -> Any:
        words = {"attacks_to_run": names, "device": "cpu", "seed": 0, "verbose": False}
        return AutoAttack(module, eps=0.1, **words).run_standard_evaluation(x[:2], y[:2])

    with pytest.raises(ValueError, match=r"Select\(model, 0\)"):
        evaluate(Paired().eval())
    assert torch.equal(evaluate(Select(Paired().eval(), 0)), evaluate(model))


class Few(nn.Module):
    """A small network of K classes whose calls are counted."""

    def __init__(self, classes: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(6 * 64, classes)
        self.calls = 0
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.last(self.layers(x))
        return scores


def few_images(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


def few_steps(adversary: Any) -> Any:
    small(adversary)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 9
    adversary.apgd.eot_iter = 1
    adversary.square.n_queries = 10
    return adversary


@pytest.mark.parametrize("version", ["standard", "plus", "rand", "firstorder"])
@pytest.mark.parametrize("classes", range(2, 10))
def test_few_classes(classes: int, version: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Few(classes)
    x, y = few_images(model)
    adversary = few_steps(AutoAttack(model, eps=0.01, seed=0, version=version, verbose=False))
    adversarial = adversary.run_standard_evaluation(x, y)
    assert adversary.record is not None
    assert (adversarial - x).abs().max() <= 0.01 + 1e-6
    assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == 9
    assert not {"dlr_loss", "dlr_loss_targeted"} & (vars(adversary.apgd) | vars(adversary.apgd_targeted)).keys()
    assert not [m for m in caplog.messages if "not possible" in m or "target classes" in m]


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_in_other_norms(classes: int, norm: str) -> None:
    model = Few(classes)
    x, y = few_images(model)
    adversary = few_steps(AutoAttack(model, norm, 0.5, seed=0, version="plus", verbose=False))
    adversary.run_standard_evaluation(x, y)
    assert adversary.record is not None
    assert adversary.record.accuracy["clean"] == 1


@pytest.mark.parametrize(("name", "classes"), [("apgd-dlr", 2), ("apgd-t", 2), ("apgd-t", 3)])
def test_the_loss_of_few_classes_breaks_what_cross_entropy_breaks(name: str, classes: int) -> None:
    """Both are monotone in the margin of two classes; of a linear model, the same examples fall."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).eval()
    x, y = few_images(model)
    broken = {}
    for one in ("apgd-ce", name):
        adversary = AutoAttack(model, eps=0.03, seed=0, attacks_to_run=[one], verbose=False)
        adversary.run_standard_evaluation(x, y)
        assert adversary.record is not None
        broken[one] = ~adversary.record.robust
    assert 0 < broken[name].sum() < len(x)
    assert (broken[name] | ~broken["apgd-ce"]).all()
    if classes == 2:
        assert torch.equal(*broken.values())


def test_targets_are_capped_at_the_other_classes() -> None:
    """With three classes there are two: a third round would find nothing and cost as much."""
    model = Few(3)
    x, y = few_images(model)
    adversary = AutoAttack(model, eps=1e-6, seed=0, attacks_to_run=["apgd-t"], verbose=False)
    adversary.apgd_targeted.n_iter = 5
    adversary.run_standard_evaluation(x, y)
    assert adversary.record is not None
    assert adversary.record.gradients["apgd-t"] == 2 * 6 * len(x)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("layout", ["permuted", "channels last", "strided", "model in channels last"])
def test_images_in_another_layout_of_memory(layout: str, norm: str) -> None:
    model = Few(5)
    x, y = few_images(model)
    names = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "pgd"]
    names = names[:-1] if norm == "L1" else names
    eps = {"Linf": 0.02, "L2": 0.3, "L1": 3.0}[norm]

    def evaluate(images: Tensor) -> Any:
        adversary = few_steps(AutoAttack(model, norm, eps, seed=0, attacks_to_run=names, verbose=False))
        return adversary.run_standard_evaluation(images, y)

    expected = evaluate(x)
    if layout == "model in channels last":
        model.to(memory_format=torch.channels_last)
    images = {
        "permuted": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "strided": torch.stack([x, x], -1).flatten(3)[..., ::2],
    }.get(layout, x.to(memory_format=torch.channels_last))
    assert torch.equal(images, x)
    assert not images.is_contiguous()
    found = evaluate(images)
    if layout == "model in channels last":  # another order of summation in the model
        assert found.shape == expected.shape
    else:
        assert torch.equal(found, expected)


def test_the_default_device_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Few(4)
    assert AutoAttack(model).device == torch.device("cpu")
    assert AutoAttack(Few(4).to("meta")).device == torch.device("meta")
    assert AutoAttack(nn.BatchNorm2d(3, affine=False).to("meta")).device == torch.device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert AutoAttack(lambda z: model(z)).device == torch.device("cpu")
    with pytest.raises(ValueError, match='device="cuda:1" is not available here; pass device="cpu"'):
        AutoAttack(model, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert AutoAttack(lambda z: model(z)).device == torch.device("cuda")
    assert AutoAttack(model).device == torch.device("cpu")


def state_of(model: nn.Module) -> list[Any]:
    modes = [part.training for part in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [modes, gradients, {name: value.clone() for name, value in model.state_dict().items()}]


def same(one: list[Any], other: list[Any]) -> bool:
    tensors = zip([*one[1], *one[2].values()], [*other[1], *other[2].values()], strict=True)
    return one[0] == other[0] and all(a is b or torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("part", ["all", "layers.1"])
@pytest.mark.parametrize("names", [["pqgd"], ["apgd-ce", "fab", "fab-t", "square"]])
def test_a_model_in_training_mode(names: list[str], part: str) -> None:
    model = Few(4)
    x, y = few_images(model)
    words: dict[str, Any] = {"eps": 0.02, "seed": 0, "attacks_to_run": names, "verbose": False}
    expected = few_steps(AutoAttack(model, **words)).run_standard_evaluation(x, y)
    (model if part == "all" else model.get_submodule(part)).train()
    model.last.weight.grad = torch.ones_like(model.last.weight)
    before = state_of(model)
    adversary = few_steps(AutoAttack(model, **words))
    with pytest.warns(RobustnessWarning, match=r"\*not\* in eval mode \((all of it|layers\.1)"):
        found = adversary.run_standard_evaluation(x, y)
    assert torch.equal(found, expected), "evaluation mode decides"
    assert same(state_of(model), before)
    with pytest.warns(RobustnessWarning, match="eval mode"):
        assert adversary.clean_accuracy(x, y) == 1
    with pytest.warns(RobustnessWarning), pytest.raises(ValueError, match=r"0\.\.3"):
        adversary.run_standard_evaluation(x, y + 4)
    assert same(state_of(model), before)


@pytest.mark.parametrize("name", ["pqgd", "apgd-t", "fab"])
def test_an_exception_leaves_the_model_as_it_was(name: str) -> None:
    model = Few(3)
    x, y = few_images(model)
    model.train()
    before = state_of(model)
    adversary = AutoAttack(model, eps=0.02, seed=0, attacks_to_run=[name], verbose=False)
    used = adversary.model, adversary.apgd_targeted.model, adversary.fab.predict

    def failing(module: nn.Module, inputs: Any) -> None:
        assert not module.training
        if model.calls > 20:
            raise Killed

    handle = model.register_forward_pre_hook(failing)
    with pytest.warns(RobustnessWarning), pytest.raises(Killed):
        adversary.run_standard_evaluation(x, y)
    handle.remove()
    assert same(state_of(model), before)
    assert (adversary.model, adversary.apgd_targeted.model, adversary.fab.predict) == used
    assert adversary.fab.n_target_classes == 9


def test_a_wrapper_that_has_no_mode_is_no_reason_for_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(Few(3))
    x, y = few_images(model)
    AutoAttack(model, eps=0.01, seed=0, attacks_to_run=["fgsm"], verbose=False).run_standard_evaluation(x, y)
    assert model.training
    assert not [w for w in recwarn if issubclass(w.category, RobustnessWarning)]


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "pqgd"])
def test_double_images_and_weights(name: str) -> None:
    single = Few(4)
    model = copy.deepcopy(single).double()
    x, y = few_images(single)
    words: dict[str, Any] = {"eps": 0.05, "seed": 0, "attacks_to_run": [name], "verbose": False}
    narrow, wide = few_steps(AutoAttack(single, **words)), few_steps(AutoAttack(model, **words))
    narrow.run_standard_evaluation(x, y)
    images = x.double() / 3 * 3 + 1e-12
    found = wide.run_standard_evaluation(images.clamp(0, 1), y)
    assert found.dtype == torch.float64
    assert narrow.record is not None
    assert wide.record is not None
    assert (wide.record.robust != narrow.record.robust).sum() <= 1
    assert not wide.record.robust.all()
    assert set(wide.record.unverified.values()) == {0}
    untouched = wide.record.robust
    assert torch.equal(found[untouched], images.clamp(0, 1)[untouched])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_refused_before_autoattacks_own(dtype: torch.dtype) -> None:
    model = Few(4, dtype=dtype)
    x, y = few_images(model, dtype)
    calls = model.calls
    with pytest.raises(ValueError, match=rf"images are {dtype}.*apgd-ce.*pass x\.float\(\).*x = x\.to\({dtype}\)"):
        AutoAttack(model, eps=0.02, attacks_to_run=["pgd", "apgd-ce"], verbose=False).run_standard_evaluation(x, y)
    assert model.calls == calls

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(dtype)
            scores: Tensor = self.model(x)
            return scores

    names = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "pgd"]
    adversary = few_steps(AutoAttack(Cast().eval(), eps=0.02, seed=0, attacks_to_run=names, verbose=False))
    found = adversary.run_standard_evaluation(x.float(), y)
    assert (found - x.float()).abs().max() <= 0.02 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_for_registered_attacks(dtype: torch.dtype) -> None:
    model = Few(4, dtype=dtype)
    x, y = few_images(model, dtype)
    adversary = AutoAttack(model, eps=0.05, seed=0, attacks_to_run=["pqgd", "pgd"], verbose=False)
    found = adversary.run_standard_evaluation(x, y)
    assert found.dtype == dtype
    assert adversary.record is not None
    assert set(adversary.record.unverified.values()) == {0}
    assert not adversary.record.robust.all()


def test_outputs_with_logits_work_in_autoattacks_own() -> None:
    model = Few(4)
    x, y = few_images(model)

    class Keyed(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": model(x)}

    words: dict[str, Any] = {"eps": 0.02, "seed": 0, "attacks_to_run": ["apgd-t", "square"], "verbose": False}
    plain, keyed = few_steps(AutoAttack(model, **words)), few_steps(AutoAttack(Keyed().eval(), **words))
    assert torch.equal(keyed.run_standard_evaluation(x, y), plain.run_standard_evaluation(x, y))
    assert keyed.record is not None
    assert plain.record is not None
    assert keyed.record.gradients == plain.record.gradients
