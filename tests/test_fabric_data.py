"""A run of training knows its data, takes labels of every form, and logs what its adversarial examples did."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from fabric_runs import Kill, KilledError, equal, state, table
from firstorder.attacks import PGD
from firstorder.fabric import Recipe, Robustness, Trainer, evaluate, fingerprint, make
from firstorder.fabric.checkpoint import load_state, load_weights
from firstorder.hosts.description import description
from firstorder.training import ENGM, MSGD, TRADES, Vanilla

ATTACK = PGD(eps=0.3, alpha=0.2, steps=2, random_start=True)
N, K = 32, 3


def pairs(seed: int = 0, n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] * K).long().clamp_max(K - 1))


def recipe(**changes: Any) -> Recipe:
    sgd = partial(torch.optim.SGD, lr=0.5)
    given: dict[str, Any] = {
        "objective": Vanilla(attack=ATTACK), "method": MSGD, "optimizer": sgd, "judge": ATTACK, "epochs": 2,
        "batch_size": 8,
    }  # fmt: skip
    return Recipe(**{**given, **changes})


def fit(folder: Path, train: Any, held: Any = None, *, chosen: Recipe | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Linear(6, K)
    trainer = Trainer(make(accelerator="cpu"), chosen or recipe(), folder, log_every=1, tensorboard=False)
    trainer.fit(model, train, pairs(9, 8) if held is None else held, **options)
    return model


def begun(folder: Path, train: Any, held: Any = None, **options: Any) -> None:
    """A run that is killed in its second epoch."""
    with pytest.raises(KilledError):
        fit(folder, train, held, progress=Kill(6), **options)


# The robust accuracy of a step


@dataclass(frozen=True, kw_only=True)
class Forwards(Vanilla):
    """The mean cross-entropy at x and x', by forwards in the order `how`; notes what is right at x'."""

    how: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    right: list[float]

    def losses(self, model: Any, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        scores = F.linear(adversarial.detach(), model.weight, model.bias)
        self.right.append(float((scores.argmax(1) == y).double().mean()))
        return (
            sum((F.cross_entropy(z, y, reduction="none") for z in self.how(model, x, adversarial)), x.new_zeros(())) / 2
        )


def clean_last(model: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    attacked = model(a)
    return model(x), attacked


def thrice(model: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    natural, attacked = model(x), model(a)
    model((x + a) / 2)
    return natural, attacked


def together(model: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    attacked, natural = model(torch.cat([a, x])).chunk(2)
    return natural, attacked


def noisy(model: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Never at x' itself."""
    return model(1 - x), model(a + 0.3)


ORDERS = {
    "adversarial last": lambda model, x, a: (model(x), model(a)),
    "clean last": clean_last,
    "thrice": thrice,
    "together": together,
    "noisy": noisy,
    "inside": lambda model, x, a: (model(x), F.linear(a, model.weight, model.bias)),
}


METHODS: list[tuple[str, Any]] = [(name, MSGD) for name in ORDERS]
METHODS += [(name, partial(ENGM, alpha=0.3)) for name in ORDERS if name != "inside"]  # which is not the module's own


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_logged_robust_accuracy_is_that_of_the_adversarial_examples(
    tmp_path: Path, name: str, method: Any, accumulate: int
) -> None:
    objective = Forwards(attack=ATTACK, how=ORDERS[name], right=[])
    fit(tmp_path, pairs(), chosen=recipe(objective=objective, method=method, accumulate=accumulate))
    expected = np.reshape(objective.right, (-1, accumulate)).mean(1)
    assert len({*expected.tolist()}) > 2
    assert [float(row["robust"]) for row in table(tmp_path / "steps.csv")] == pytest.approx(expected.tolist())
    epochs = [float(row["robust"]) for row in table(tmp_path / "epochs.csv")]
    assert epochs == pytest.approx(expected.reshape(2, -1).mean(1).tolist())


def test_a_forward_for_the_log_changes_nothing_of_the_training(tmp_path: Path) -> None:
    """BatchNorm and dropout: the weights are those of the same loss whose forwards tell what is logged."""

    class Shifted(Vanilla):
        def losses(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
            if self.hidden:
                return F.cross_entropy(model(x=adversarial), y, reduction="none")  # of a name the log cannot see
            return super().losses(model, x, adversarial, y)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, K))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layers(x)
            return logits

    found = []
    for hidden in (False, True):
        Shifted.hidden = hidden  # type: ignore[attr-defined]
        model, folder = Named(), tmp_path / str(hidden)
        trainer = Trainer(make(accelerator="cpu"), recipe(objective=Shifted(attack=ATTACK)), folder, tensorboard=False)
        trainer.fit(model, pairs(), pairs(9, 8))
        found.append(state(model))
    assert equal(*found)


# Labels


@pytest.mark.parametrize("objective", [Vanilla(attack=ATTACK), TRADES(attack=ATTACK)])
def test_labels_of_every_form_train_alike(tmp_path: Path, objective: Any) -> None:
    x, y = pairs().tensors
    held_x, held = pairs(9, 8).tensors
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "indices": lambda y: y,
        **{str(t): partial(torch.Tensor.to, dtype=t) for t in (torch.uint8, torch.int8, torch.int16, torch.int32)},
        "rows": lambda y: F.one_hot(y, K).float(),
    }
    found = {}
    for name, form in forms.items():
        folder = tmp_path / name
        given = (TensorDataset(x, form(y)), TensorDataset(held_x, form(held)))
        model = fit(folder, *given, chosen=recipe(objective=objective, diagnose=4))
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in table(folder / "epochs.csv")]
        found[name] = (state(model), table(folder / "steps.csv"), rows)
    for weights, *tables in found.values():
        assert equal(weights, found["indices"][0])
        assert tables == [*found["indices"][1:]]


def test_probabilities_count_by_their_largest_class() -> None:
    x, y = pairs().tensors
    rows = 0.8 * F.one_hot(y, K) + 0.2 / K
    model = nn.Linear(6, K)
    fabric = make(accelerator="cpu")
    expected = evaluate(fabric, model, TensorDataset(x, y), PGD(eps=0.1, steps=1))
    found = evaluate(fabric, model, TensorDataset(x, rows), PGD(eps=0.1, steps=1))
    assert isinstance(found, Robustness)
    assert found.natural == expected.natural
    several = TensorDataset(x, (rows > 0).long())
    with pytest.raises(ValueError, match="one-hot"):
        evaluate(fabric, model, several, ATTACK)


# The data of a run


def changed(data: TensorDataset, part: int, index: int, value: float) -> TensorDataset:
    """Data in which one number of an example is another."""
    tensors = [tensor.clone() for tensor in data.tensors]
    tensors[part][index].fill_(value)
    return TensorDataset(*tensors)


OTHER: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "images": ("training data", lambda: {"train": pairs(1)}),
    "one label": ("training data", lambda: {"train": changed(pairs(), 1, 17, (int(pairs()[17][1]) + 1) % K)}),
    "one image": ("training data", lambda: {"train": changed(pairs(), 0, 30, 0.5)}),
    "order": ("training data", lambda: {"train": TensorDataset(*(t.flip(0) for t in pairs().tensors))}),
    "type": ("training data", lambda: {"train": TensorDataset(pairs().tensors[0], pairs().tensors[1].int())}),
    "validation": ("validation data", lambda: {"held": changed(pairs(9, 8), 1, 3, (int(pairs(9, 8)[3][1]) + 1) % K)}),
    "test": ("test data", lambda: {"others": {"test": pairs(8)}}),
    "no test": ("test data", lambda: {"others": {}}),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_run_is_not_resumed_with_other_data(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {"train": pairs(), "held": pairs(9, 8), "others": {"test": pairs(7)}}
    begun(tmp_path, **given)
    before = (tmp_path / "state.pt").read_bytes()
    message, change = OTHER[name]
    with pytest.raises(
        ValueError, match=rf"state.pt is of another run: {message} was .* and is .*other contents"
    ) as info:
        fit(tmp_path, resume=True, **{**given, **change()})
    assert str(info.value).count(" data was ") == 1
    assert (tmp_path / "state.pt").read_bytes() == before
    fit(tmp_path, resume=True, **{**given, "train": pairs(), "held": pairs(9, 8)})


def test_a_run_is_not_resumed_with_another_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, pairs())
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: F.linear(1 - x, self.weight, self.bias))
        with pytest.raises(ValueError, match=r"of another run: code of .*lambda> was None"):
            fit(tmp_path, pairs(), resume=True)
    fit(tmp_path, pairs(), resume=True)


class Listed(Dataset):  # type: ignore[type-arg]
    """Examples one by one, transformed where asked, of another class than torch's."""

    def __init__(self, data: TensorDataset, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.x, self.y = data.tensors
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.x[index]
        return x if self.transform is None else self.transform(x), int(self.y[index])


class Torchvision(Listed):
    """With all labels at hand."""

    def __init__(self, data: TensorDataset, kind: Any = list) -> None:
        super().__init__(data)
        self.targets = kind(self.y.tolist())


def own_generator() -> Callable[[Tensor], Tensor]:
    source = np.random.default_rng()
    return lambda x: (x + float(source.random()) / 10).clamp_max(1)


TRANSFORMS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "torch": lambda: lambda x: x * torch.rand(()),
    "numpy": lambda: lambda x: x * float(np.random.rand()),
    "python": lambda: lambda x: x.flip(0) if random.random() < 0.5 else x,
    "own": own_generator,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_random_transforms_do_not_distinguish_equal_data(tmp_path: Path, name: str) -> None:
    begun(tmp_path, Listed(pairs(), TRANSFORMS[name]()))
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        assert fingerprint(Listed(pairs(), TRANSFORMS[name]())) == fingerprint(Listed(pairs(), TRANSFORMS[name]()))
    moved = fingerprint(Listed(changed(pairs(), 0, 0, 0.5), TRANSFORMS[name]()))
    assert (moved == fingerprint(Listed(pairs(), TRANSFORMS[name]()))) == (name == "own")  # whose seed nobody knows
    with pytest.raises(ValueError, match="training data was"):
        fit(tmp_path, Listed(changed(pairs(), 1, 0, (int(pairs()[0][1]) + 1) % K), TRANSFORMS[name]()), resume=True)
    fit(tmp_path, Listed(pairs(), TRANSFORMS[name]()), resume=True)


DATA: dict[str, Callable[[TensorDataset], Any]] = {
    "tensors": lambda data: data,
    "listed": Listed,
    "targets": Torchvision,
    "targets as array": partial(Torchvision, kind=np.array),
    "subset": lambda data: Subset(data, list(range(len(data)))),
    "subset of a subset": lambda data: Subset(Subset(data, range(len(data))), torch.arange(len(data) - 1)),
    "concatenated": lambda data: ConcatDataset([data, pairs(4, 5)]),
    "split": lambda data: random_split(data, [20, len(data) - 20], torch.Generator().manual_seed(0))[0],
    "listed split": lambda data: random_split(Listed(data), [20, len(data) - 20], torch.Generator().manual_seed(0))[0],
}


@pytest.mark.parametrize("name", DATA)
def test_equal_data_have_equal_fingerprints_and_others_others(name: str) -> None:
    make_ = DATA[name]
    found = fingerprint(make_(pairs()))
    assert found == fingerprint(make_(pairs()))
    assert found.startswith(f"{len(make_(pairs()))} examples, sha256 ")
    used = make_(pairs()).indices[3] if "split" in name else 3
    assert found != fingerprint(make_(changed(pairs(), 0, used, 0.25)))
    assert found != fingerprint(make_(changed(pairs(), 1, used, (int(pairs()[used][1]) + 1) % K)))
    assert found != fingerprint(make_(pairs(2)))
    assert found != fingerprint(make_(pairs(0, N + 1)))


def test_all_of_what_is_in_memory_counts_and_a_sample_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    many = pairs(0, 1000)
    calls: list[int] = []

    class Counted(Torchvision):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            calls.append(index)
            return super().__getitem__(index)

    found = fingerprint(Counted(many))
    assert len(calls) == 128  # two readings of 64
    assert {0, 999} <= {*calls}
    unread = next(i for i in range(1000) if i not in calls)
    assert found != fingerprint(Counted(changed(many, 1, unread, (int(many[unread][1]) + 1) % K)))
    assert found == fingerprint(Counted(changed(many, 0, unread, 0.5)))  # as documented
    assert fingerprint(many) != fingerprint(changed(many, 0, unread, 0.5))
    whole = fingerprint(many)
    monkeypatch.setattr("firstorder.fabric.contents.CHUNK", 100)
    assert fingerprint(many) == whole


def test_a_fingerprint_draws_no_random_numbers() -> None:
    random.seed(12), np.random.seed(12), torch.manual_seed(12)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    fingerprint(Listed(pairs(), TRANSFORMS["torch"]()))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_kinds_of_tensors_that_are_hashed() -> None:
    kinds = (torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.complex64)
    found = [fingerprint(TensorDataset(torch.zeros(4, 2, dtype=kind), torch.arange(4))) for kind in kinds]
    found += [
        fingerprint(TensorDataset(torch.zeros(4, *shape), torch.arange(4))) for shape in ((2,), (1, 2), (2, 1), ())
    ]
    assert len({*found}) == len(found)
    strided = torch.arange(12.0).reshape(3, 4).t()
    assert fingerprint(TensorDataset(strided)) == fingerprint(TensorDataset(strided.contiguous()))


# Files that are damaged


def cut(path: Path) -> Iterator[int]:
    """Lengths to cut a file to."""
    whole = path.stat().st_size
    yield from (0, 1, 2, 4, 30, 64, 200, whole // 4, whole // 2, whole - 200, whole - 22, whole - 1)


def test_a_state_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    begun(tmp_path, pairs())
    path = tmp_path / "state.pt"
    whole = path.read_bytes()
    junk = tmp_path / "junk.pt"
    torch.save([1, 2], junk)
    others = [junk.read_bytes(), b"\0" * len(whole), b"not a state\n", whole[:500] + b"\0" * 400 + whole[900:]]
    torch.save({"format": 2}, junk)
    for content in (*(whole[:length] for length in cut(path)), *others, junk.read_bytes()):
        path.write_bytes(content)
        for resume in (True, False):
            with pytest.raises(ValueError, match=r"state.pt is damaged or no state of a run; delete it") as info:
                fit(tmp_path, pairs(), resume=resume)
            assert "\n" not in str(info.value)
            assert info.value.__cause__ is None
            assert info.value.__suppress_context__ or info.value.__context__ is None
    torch.save({"format": 1}, path)
    with pytest.raises(ValueError, match="has format 1, this version reads 2"):
        fit(tmp_path, pairs(), resume=True)
    path.write_bytes(whole)
    fit(tmp_path, pairs(), resume=True)


def test_a_state_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    momentum = recipe(optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    begun(tmp_path, pairs(), chosen=momentum)
    path = tmp_path / "state.pt"
    whole, saved = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    found = [whole.index(value.numpy().tobytes()) for value in saved["model"].values()]
    buffers = [part["momentum_buffer"] for part in saved["optimizer"]["state"].values()]
    found += [whole.index(value.numpy().tobytes()) for value in buffers]
    assert len(found) == 4
    for at in found:
        for bit in (0, 6):
            flipped = whole.copy()
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"state.pt is damaged or no state of a run; delete it to start anew"):
                fit(tmp_path, pairs(), chosen=momentum, resume=True)
    for at in range(7, len(whole), len(whole) // 60):  # what is not noticed is padding
        flipped = whole.copy()
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with suppress(ValueError):
            loaded = load_state(tmp_path, saved["identity"])
            assert description(loaded) == description({key: saved[key] for key in saved if key != "sha256"})
    path.write_bytes(whole)
    fit(tmp_path, pairs(), chosen=momentum, resume=True)


def test_weights_that_are_cut_off_are_one_line(tmp_path: Path) -> None:
    fit(tmp_path, pairs())
    path = tmp_path / "best.safetensors"
    assert load_weights(path).keys() == {"weight", "bias"}
    whole = path.read_bytes()
    for length in (0, 1, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"best\.safetensors is damaged; put a copy"):
            load_weights(path)
