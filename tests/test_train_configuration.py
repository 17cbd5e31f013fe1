"""What configures a run of training: keys, the data and the recipe that they name, networks by name."""

from __future__ import annotations

import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import datasets

from firstorder.attacks import ANU, DDN, FGSM, MIFGSM, PGD, Attack, ClippedNGM, Quantised, Verdict, registry
from firstorder.attacks.losses import Margin
from firstorder.evaluation.names import attacks as labels
from firstorder.evaluation.names import models, packaged
from firstorder.evaluation.names.documents import read
from firstorder.evaluation.names.networks import SmallCNN
from firstorder.evaluation.training import configuration as configurations
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import Configuration, configure, write
from firstorder.fabric import constant, cosine, one_cycle
from firstorder.training import AWP, ENGM, MART, METHODS, TRADES, Natural, Vanilla

tiny = partial(nn.Linear, 2, 3)


def keys(**given: Any) -> Configuration:
    return configure({"data": "mnist", "eps": 0.2, **given})


def refuses(message: str, call: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(*given)


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["null", "8/255", "yes", "1e3", "a: b", ""])
COUNTS = ("examples", "test_examples", "validation", "epochs", "batch_size", "accumulate", "judge_steps", "save_every")
KINDS: dict[str, Any] = {name: field.annotation for name, field in Configuration.model_fields.items()}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("data", "test", "model", "attack"), TEXT),
    **{name: st.integers(1, 10**6) for name in (*COUNTS, "validate_every", "window")},
    **{name: st.integers(0, 10**6) for name in ("seed", "diagnose", "landscape")},
    "alpha_parameters": st.floats(1, allow_infinity=False),
    **dict.fromkeys(("eps", "lr"), st.floats(0, exclude_min=True, allow_infinity=False)),
    "alpha": st.just("auto") | st.floats(0, exclude_min=True, allow_infinity=False),
    **{name: st.floats(0, allow_infinity=False) for name in ("beta", "awp", "weight_decay")},
    **{"momentum": st.floats(0, 1, exclude_max=True), "ramp": st.floats(0, 1)},
    "method": st.sampled_from(sorted(METHODS)),
    "prepare": st.booleans(),
    "radii": st.lists(st.floats(0, exclude_min=True, allow_infinity=False), max_size=3).map(tuple),
    "drops": st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=3).map(tuple),
    **{name: st.sampled_from(get_args(kind)) for name, kind in KINDS.items() if get_origin(kind) is Literal},
}


@given(st.fixed_dictionaries({"data": TEXT}, optional={k: v for k, v in FIELDS.items() if k != "data"}))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> None:
    assert FIELDS.keys() == KINDS.keys()
    path = tmp_path_factory.getbasetemp() / "round" / configurations.FILE
    chosen = configure(given)
    assert {name: getattr(chosen, name) for name in given} == given
    write(chosen, path)
    values, lines = read(path)
    assert configure(values) == chosen
    written = path.read_text().split("\n")
    keys = {place[0]: line for place, line in lines.items() if len(place) == 1}
    assert {name: written[line - 1].partition(":")[0] for name, line in keys.items()} == {name: name for name in keys}
    assert list(keys) == list(KINDS)


def test_eps_may_be_a_fraction() -> None:
    given: list[str | float] = ["8/255", "0.3", "1e-3", 1, " 1/4 "]
    assert [keys(eps=eps).eps for eps in given] == [8 / 255, 0.3, 1e-3, 1.0, 0.25]


def test_every_mistake_has_a_line_of_its_own() -> None:
    with pytest.raises(ValueError, match="data: Field required") as caught:
        configure({"eps": "a/b", "nope": 1, "epochs": 0}, source="f.yaml", lines={("eps",): 3, ("nope",): 7})
    known = ", ".join(KINDS)
    assert sorted(str(caught.value).split("\n")) == [
        "epochs: Input should be greater than or equal to 1 (it is 0)",
        "f.yaml, line 3: eps: write a finite number above 0, as 0.3 or 8/255 (it is 'a/b')",
        f"f.yaml, line 7: nope: Extra inputs are not permitted (it is 1); the keys are {known}",
        "f.yaml: data: Field required",
    ]


def numbered(path: Path, n: int) -> Tensor:
    """An .npz file of n images with their index for pixels, in ten classes; the images."""
    x = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 28, 28, 1))
    np.savez(path, x=x, y=np.arange(n) % 10)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def same(found: TensorDataset | None, x: Tensor, y: Tensor) -> bool:
    assert found is not None
    return torch.equal(found.tensors[0], x) and torch.equal(found.tensors[1], y)


def test_the_last_images_validate(tmp_path: Path) -> None:
    x, y = numbered(tmp_path / "x.npz", 23), torch.arange(23) % 10
    z = numbered(tmp_path / "z.npz", 9)
    own, other = str(tmp_path / "x.npz"), str(tmp_path / "z.npz")
    train, validation, test, _ = parts.splits(keys(data=own, validation=5))
    assert same(train, x[:18], y[:18])
    assert same(validation, x[18:], y[18:])
    assert test is None
    train, validation, test, _ = parts.splits(keys(data=own, validation=5, examples=7, test=other, test_examples=4))
    assert same(train, x[:7], y[:7])
    assert same(validation, x[18:], y[18:])
    assert same(test, z[:4], y[:4])
    train, _, test, _ = parts.splits(keys(data=own, validation=22, test=other))
    assert same(train, x[:1], y[:1])
    assert same(test, z, y[:9])
    none, many = keys(data=own, validation=23), keys(data=own, validation=5, examples=19)
    refuses("validation=23 leaves none of the 23 training images; lower it", parts.splits, none)
    refuses("examples=19 exceeds the 18 images that validation=5 leaves", parts.splits, many)


def idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(head + array.tobytes())


def layout(name: str, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Random images in torchvision's layout: x in [0, 1] and y of the training and the test set."""
    random, splits = np.random.default_rng(0), []
    for n, file, batch in ((12, "train", "data_batch_1"), (6, "t10k", "test_batch")):
        shape = (n, 3, 32, 32) if name == "cifar10" else (n, 1, 28, 28)
        x, y = (random.integers(0, top, size, dtype=np.uint8) for top, size in ((256, shape), (10, n)))
        if name == "cifar10":
            folder = root / "cifar-10-batches-py"
            folder.mkdir(exist_ok=True)
            (folder / batch).write_bytes(pickle.dumps({"data": x.reshape(n, -1), "labels": y.tolist()}))
            (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
        else:
            raw = root / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name] / "raw"
            idx(raw / f"{file}-images-idx3-ubyte", x[:, 0])
            idx(raw / f"{file}-labels-idx1-ubyte", y)
        splits.append((torch.from_numpy(x.astype(np.float32)) / 255, torch.from_numpy(y.astype(np.int64))))
    return splits


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_torchvision_brings_test_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", ""]])
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).is_file())
    (x, y), expected = layout(name, tmp_path)
    chosen = keys(data=f"{name}:{tmp_path}", validation=4)
    train, validation, test, _ = parts.splits(chosen)
    assert same(train, x[:8], y[:8])
    assert same(validation, x[8:], y[8:])
    assert same(test, *expected)
    test = parts.splits(chosen.model_copy(update={"test_examples": 2}))[2]
    assert same(test, *(part[:2] for part in expected))
    other = parts.splits(chosen.model_copy(update={"test": "mnist"}))[2]
    assert same(other, packaged.mnist().x, packaged.mnist().y)
    none = tmp_path / "none"
    none.mkdir()
    message = f"{none} does not hold {name} in torchvision's layout; name its root folder"
    refuses(message, parts.splits, keys(data=f"{name}:{none}"))


def weights(seed: int) -> Tensor:
    return nn.utils.parameters_to_vector(parts.network(keys(seed=seed), 10).parameters())


def test_the_seed_determines_the_first_weights() -> None:
    torch.manual_seed(5)
    before, first = torch.get_rng_state(), weights(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


def test_networks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(models.architecture("small-cnn", 10)(), SmallCNN)
    assert models.architecture("small-cnn", 2)()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    network = models.architecture("resnet18", 10)()
    assert (type(network).__name__, network.training) == ("ResNet18", True)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    fresh = models.architecture("torchvision:squeezenet1_1", 7)()
    assert fresh.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    assert isinstance(models.architecture("test_train_configuration:tiny", 3)(), nn.Linear)
    asked: list[tuple[str, dict[str, Any]]] = []
    fake = SimpleNamespace(list_models=lambda **_: ["resnet26"])
    fake.create_model = lambda name, **words: asked.append((name, words)) or tiny()
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert isinstance(models.architecture("timm:resnet26", 12)(), nn.Linear)
    assert asked == [("resnet26", {"num_classes": 12})]
    refuses("timm has no model 'resnet27' for image classification", models.architecture, "timm:resnet27", 10)


UNKNOWN = {
    "cnn": "unknown network 'cnn'; name small-cnn, small-resnet, resnet18, timm:NAME, torchvision:NAME, ",
    "mnist-cnn": "unknown network 'mnist-cnn'; name small-cnn, ",
    "timm:": "unknown network 'timm:'; name small-cnn, ",
    "torchvision:nothing": "torchvision has no model 'nothing' for image classification",
    "nowhere:make": "the model 'nowhere:make' cannot be imported",
    "math:pi": "the model 'math:pi' is a float; name a function",
    "small-cnn": "small-cnn has 10 classes, the data have 11; name another network",
    "small-resnet": "small-resnet has 10 classes, the data have 11; name another network",
    "resnet18": "resnet18 has 10 classes, the data have 11; name another network",
}


@pytest.mark.parametrize("spec", UNKNOWN)
def test_networks_that_do_not_fit_are_refused(spec: str) -> None:
    refuses(UNKNOWN[spec], models.architecture, spec, 11)


INNER = {
    "pgd:steps=7": (PGD(eps=0.2, alpha=0.05, steps=7), "Linf"),
    'pgd:alpha=0.03,norm="L2"': (PGD(eps=0.2, alpha=0.03, norm="L2"), "L2"),
    "fgsm": (FGSM(eps=0.2), "Linf"),
    "mi-fgsm+quantised:decay=0.5": (MIFGSM(eps=0.2, alpha=0.05, decay=0.5, direction=Quantised()), "Linf"),
    "anu:steps=5": (ANU(steps=5, max_norm=0.2, preset="mnist"), "L2"),
    "ddn": (DDN(max_norm=0.2), "L2"),
    "verdict:stages=1": (Verdict(eps=0.2, stages=1), "Linf"),
    "verdict:effort=0,restarts=2": (Verdict(eps=0.2, effort=0, restarts=2), "Linf"),
    "clipped-ngm:gamma=eps/10": (ClippedNGM(eps=0.2, alpha=0.05, gamma=0.02), "Linf"),
}


@pytest.mark.parametrize("label", INNER)
def test_inner_attacks_and_their_evaluation(label: str) -> None:
    attack, norm = INNER[label]
    found = parts.recipe(keys(attack=label, judge_steps=9))
    judge = PGD(eps=0.2, alpha=0.02, steps=9, norm=norm, loss=Margin(), random_start=True, early_stop=True)
    assert (found.objective, found.judge) == (Vanilla(attack=attack), judge)


SHORT = {"verdict": "verdict:stages=1", "anu": "anu:steps=3", "ddn": "ddn:steps=3"}
"""Registered names with parameters that make them short; "steps=2" for those that have steps."""


@pytest.mark.parametrize("name", [name for name, cls in registry().attacks.items() if not cls.needs])
def test_every_registered_attack_trains(name: str) -> None:
    """Within half of the budget, by the weights of the network, and to gradients."""
    steps = "steps" in {field.name for field in dataclasses.fields(registry().get(name))}
    chosen = keys(attack=SHORT.get(name, f"{name}:steps=2" if steps else name))
    objective, model = parts.recipe(chosen).objective.scaled(0.5), trained()
    x, y = packaged.mnist().x[:4], packaged.mnist().y[:4]
    adversarial = objective.adversarial(model, x, y, generator=torch.Generator().manual_seed(0))
    attack: Any = objective.attack  # type: ignore[attr-defined]
    norm = getattr(attack, "norm", "L2")
    size = (adversarial - x).abs().amax() if norm == "Linf" else (adversarial - x).flatten(1).norm(dim=1).amax()
    assert 0 < float(size) <= 0.1 + 1e-5
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    ENGM(model).backward(objective.losses(model, x, adversarial, y), adversarial)
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def trained() -> nn.Module:
    """A network that is right, so that attacks have something to do."""
    return packaged.mnist_cnn_natural().requires_grad_()


REFUSED = {
    "pdg": "unknown attack 'pdg'; did you mean ",
    "pgd:eps=0.1": "'pgd:eps=0.1': pgd has no parameter 'eps'; it has alpha, ",
    "ddn:max_norm=1": "'ddn:max_norm=1': ddn has no parameter 'max_norm'; it has ",
    "pgd:steps=0": "'pgd:steps=0': steps=0 must be an integer of at least 1",
    "unlimited": "the attack 'unlimited' has neither eps nor max_norm and cannot be kept in a ball",
}


@pytest.mark.parametrize("label", REFUSED)
def test_attacks_without_a_budget_are_refused(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = labels.get
    monkeypatch.setattr(labels, "get", lambda name: Attack if name == "unlimited" else known(name))
    refuses(REFUSED[label], parts.recipe, keys(attack=label))


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_their_alpha(method: str) -> None:
    found: Any = parts.recipe(keys(method=method)).method(tiny())
    assert type(found) is METHODS[method]
    if method in ("engm", "a-engm", "n-engm", "f-engm"):
        assert vars(found)["alpha"] == vars(METHODS[method](tiny()))["alpha"]
        assert vars(parts.recipe(keys(method=method, alpha=0.7)).method(tiny()))["alpha"] == 0.7
    else:
        message = f"alpha=0.7 has no meaning for method={method}; leave it out"
        refuses(message, parts.recipe, keys(method=method, alpha=0.7))


LINES: dict[str, dict[str, Any]] = {
    "a-engm:tau=10,beta=0.5": {"tau": 10, "beta": 0.5, "alpha": 5.0},
    "a-engm:alpha=3": {"tau": 50, "beta": 0.7, "alpha": 3},
    "mgnc:clip=1/2": {"clip": 0.5},
    "f-engm:alpha=2": {"alpha": 2.0},
}


@pytest.mark.parametrize("label", LINES)
def test_methods_on_one_line(label: str) -> None:
    found: Any = parts.recipe(keys(method=label)).method(tiny())
    assert {name: vars(found)[name] for name in LINES[label]} == LINES[label]


WRONG = {
    "a-engm:taus=3": "'a-engm:taus=3': a-engm has no parameter 'taus'; it has alpha, beta, quantile, tau",
    "a-engm:tau=0": "'a-engm:tau=0': tau=0 must be an integer of at least 1",
    "engm:coupling=1": "'engm:coupling=1': engm has no parameter 'coupling'; it has alpha",
    "msgd:alpha=1": "'msgd:alpha=1': msgd has no parameter 'alpha'; it has ",
    "mgnc:clip=-1": "'mgnc:clip=-1': clip=-1 must be a finite number greater than 0",
    "f-engm:alpha=0": "'f-engm:alpha=0': alpha=0 must be a finite number greater than 0",
    "a-engm:tau=2,tau=3": "'a-engm:tau=2,tau=3': tau is given twice",
}


@pytest.mark.parametrize("label", WRONG)
def test_lines_of_methods_that_do_not_fit(label: str) -> None:
    with pytest.raises(ValueError, match=re.escape(WRONG[label])):
        keys(method=label)


def test_alpha_is_said_once_and_scaled_by_size() -> None:
    both = keys(method="engm:alpha=3", alpha=2)
    refuses("alpha=2.0 and method=engm:alpha=3 both say what alpha is", parts.recipe, both)
    size = sum(p.numel() for p in tiny().parameters())
    for chosen, expected in ((keys(method="engm:alpha=3", alpha_parameters=4 * size), 1.5),
                            (keys(method="n-engm", alpha_parameters=size / 4), 1.0),
                            (keys(method="a-engm", alpha=2, alpha_parameters=size), 2.0)):  # fmt: skip
        found: Any = parts.recipe(chosen).method(tiny())
        assert vars(found)["alpha"] == pytest.approx(expected)
    refuses("method=", parts.recipe, keys(method="msgd", alpha_parameters=100))


def test_the_papers_protocol_is_packaged() -> None:
    chosen = configure(read(Path("engm-protocol"))[0])
    found = parts.recipe(chosen)
    rates = [found.schedule(epoch / 120) for epoch in (0, 74, 75, 89, 90, 119)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert (found.epochs, found.batch_size, found.augment) == (120, 128, parts.crop_flip)
    sgd: Any = found.optimizer(tiny().parameters())
    assert {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}.items() <= sgd.defaults.items()
    assert found.objective == Vanilla(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10, random_start=True))
    engm: Any = found.method(models.architecture("resnet18", 10)())
    assert vars(engm)["alpha"] == pytest.approx(5, rel=0.01)
    assert (chosen.validation, chosen.judge_steps, chosen.eps) == (1000, 20, 8 / 255)


def test_every_key_reaches_the_recipe() -> None:
    attack = parts.inner(keys())
    for name, objective in (("trades", TRADES(attack=attack, beta=3)), ("mart", MART(attack=attack, beta=3))):
        assert parts.recipe(keys(objective=name, beta=3)).objective == objective
        assert parts.recipe(keys(objective=name, beta=3, awp=0.01)).objective == AWP(base=objective, gamma=0.01)
    assert parts.recipe(keys(objective="natural")).objective == Natural()
    sgd: Any = parts.recipe(keys(lr=0.3, momentum=0.4, weight_decay=0.01)).optimizer(tiny().parameters())
    assert isinstance(sgd, torch.optim.SGD)
    assert {"lr": 0.3, "momentum": 0.4, "weight_decay": 0.01}.items() <= sgd.defaults.items()
    adam: Any = parts.recipe(keys(optimizer="adam", lr=0.3, weight_decay=0.01)).optimizer(tiny().parameters())
    assert isinstance(adam, torch.optim.Adam)
    assert {"lr": 0.3, "weight_decay": 0.01}.items() <= adam.defaults.items()
    progress = (0.0, 0.1, 0.3, 0.5, 0.79, 0.9, 0.999)
    named: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}
    for name, schedule in named.items():
        assert [parts.recipe(keys(schedule=name)).schedule(p) for p in progress] == [schedule(p) for p in progress]
    dropping = parts.recipe(keys(drops=[0.3, 0.8])).schedule
    assert [dropping(p) for p in progress] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    counts = {"epochs": 3, "batch_size": 5, "accumulate": 7, "ramp": 0.4, "seed": 9, "diagnose": 11}
    full = parts.recipe(keys(**counts, validate_every=13, save_every=17, augment="crop-flip"))
    assert {name: getattr(full, name) for name in counts} == counts
    assert (full.validate, full.save, full.augment) == (13, 17, parts.crop_flip)
    assert parts.recipe(keys()).augment is None


def test_crops_and_flips() -> None:
    x = torch.rand(200, 2, 9, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    found = parts.crop_flip(x, torch.Generator().manual_seed(2))
    source = torch.Generator().manual_seed(2)
    top, left = torch.randint(9, (2, 200), generator=source)
    flips = torch.rand(200, generator=source) < 0.5
    for i, image in enumerate(x):
        wide = torch.zeros(2, 17, 15)
        wide[:, 4:13, 4:11] = image
        cut = wide[:, top[i] : top[i] + 9, left[i] : left[i] + 7]
        assert torch.equal(found[i], cut.flip(-1) if flips[i] else cut)
    assert 70 < int(flips.sum()) < 130
    assert {*top.tolist()} == {*left.tolist()} == set(range(9))
    assert not torch.equal(found, parts.crop_flip(x, torch.Generator().manual_seed(3)))


def test_classes_are_those_of_all_labels(tmp_path: Path) -> None:
    x = np.zeros((40, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "few.npz", x=x, y=np.array([0, 1] * 15 + [2] * 10))
    np.savez(tmp_path / "more.npz", x=x[:3], y=np.array([0, 4, 1]))
    few, more = str(tmp_path / "few.npz"), str(tmp_path / "more.npz")
    assert parts.splits(keys(data=few, validation=10, examples=30)).classes == 3
    assert parts.splits(keys(data=few, validation=10, test=more)).classes == 5
    with pytest.raises(ValueError, match="test_examples=4 exceeds the 3 test images"):
        parts.splits(keys(data=few, validation=10, test=more, test_examples=4))
