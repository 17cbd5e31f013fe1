"""alpha="auto": plain training for an epoch, then the quantile of its norms as the limit, in every host."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
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

from fabric_runs import Kill, KilledError, equal, fit, full, numbers, recipe
from firstorder.evaluation.names import methods
from firstorder.evaluation.training import parts
from firstorder.evaluation.training.configuration import configure
from firstorder.training import AENGM, ENGM, FENGM, MSGD, NENGM, GradientMethod, automatic, for_size
from firstorder.training.automatic import LEAST, QUANTILE, FirstEpoch
from firstorder.training.examplewise import gathered

LIMITED: dict[str, Callable[..., Any]] = {"engm": ENGM, "a-engm": partial(AENGM, tau=2), "n-engm": NENGM}
BATCHES, N = 4, 6


def batches(epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        yield torch.randn(N, 5, generator=source, dtype=torch.float64), torch.randint(3, (N,), generator=source)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3, bias=False).double()


def norms(model: nn.Linear, x: Tensor, y: Tensor, *, by_input: bool) -> Tensor:
    """The closed form: the gradient by the weight is (p - y) x^T, that by the input (p - y) W."""
    residual = (model(x).softmax(1) - F.one_hot(y, 3)).detach()
    own = (residual @ model.weight.detach()) if by_input else residual
    return own.norm(dim=1) * (1 if by_input else x.norm(dim=1))


def step(method: GradientMethod, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Any:
    x = x.clone().requires_grad_()
    optimizer.zero_grad()
    found = method.backward(F.cross_entropy(method.model(x), y, reduction="none"), x)
    optimizer.step()
    return found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
@pytest.mark.parametrize("name", LIMITED)
def test_the_limit_is_the_quantile_of_the_norms_of_the_first_epoch(name: str, share: float | None) -> None:
    model, plain = linear(), linear()
    own, others = sgd(model), sgd(plain)
    method = LIMITED[name](model, alpha="auto", warmup=BATCHES, **({} if share is None else {"quantile": share}))
    measured = []
    for x, y in batches():
        assert method.measuring
        assert method.alpha == math.inf
        measured.append(norms(model, x, y, by_input=name == "n-engm"))
        assert step(method, own, x, y).weights.tolist() == [1.0] * N
        others.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        others.step()
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-12, atol=1e-14)
    expected = np.quantile(torch.cat(measured).numpy(), QUANTILE if share is None else share)
    assert not method.measuring
    assert method.alpha == pytest.approx(expected, rel=1e-12)
    fixed = LIMITED[name](copy.deepcopy(model), alpha=method.alpha)
    if name == "a-engm":  # whose line has been fitted meanwhile
        fixed.load_state_dict({key: method.state_dict()[key] for key in fixed.state_dict()})
    light = 0
    for epoch in (1, 2):
        for x, y in batches(epoch):
            found = step(method, own, x, y)
            x = x.requires_grad_()
            kept = fixed.backward(F.cross_entropy(fixed.model(x), y, reduction="none"), x)
            fixed.model.load_state_dict(model.state_dict())
            assert torch.equal(found.weights, kept.weights)
            light += int((found.weights < 1).sum())
    assert method.alpha == pytest.approx(expected, rel=1e-12)
    assert light > 0 or share == 1.0


def test_a_engm_measures_what_engm_does() -> None:
    found = {}
    for name in ("engm", "a-engm"):
        model = linear()
        optimizer, method = sgd(model), LIMITED[name](model, alpha="auto", warmup=BATCHES)
        for x, y in batches():
            step(method, optimizer, x, y)
        found[name] = method.alpha
        weighed = [step(method, optimizer, x, y).norms is None for x, y in batches(1)]
        assert weighed == ([False] * BATCHES if name == "engm" else [False, True] * (BATCHES // 2))
    assert found["engm"] == pytest.approx(found["a-engm"], rel=1e-12)


def test_the_weights_alone_are_measured_too() -> None:
    model = linear()
    method = ENGM(model, alpha="auto", warmup=1)
    x, y = next(batches())
    assert method.weights(F.cross_entropy(model(x), y, reduction="none")).tolist() == [1.0] * N
    assert method.alpha == pytest.approx(np.quantile(norms(model, x, y, by_input=False), QUANTILE))


def test_norms_without_meaning_do_not_count() -> None:
    model = linear()
    method, (x, y) = ENGM(model, alpha="auto", warmup=2, quantile=1.0), next(batches())
    x = torch.cat([x, x[:1] * math.inf])
    losses = F.cross_entropy(model(x), torch.cat([y, y[:1]]), reduction="none")
    method.weights(losses * torch.tensor([0.0] + [1.0] * N))
    method.weights(losses * torch.tensor([0.0] + [1.0] * N))
    assert method.alpha == pytest.approx(float(norms(model, x[1:N], y[1:], by_input=False).max()))
    empty = ENGM(model, alpha="auto", warmup=1)
    with pytest.raises(FloatingPointError, match="no gradient in the first epoch"):
        empty.weights(F.cross_entropy(model(x[:N]), y, reduction="none") * 0.0)


@pytest.mark.parametrize("stop", [0, 2, BATCHES, BATCHES + 3])
@pytest.mark.parametrize("name", LIMITED)
def test_a_state_goes_on_bit_for_bit(name: str, stop: int) -> None:
    def make(model: nn.Module) -> Any:
        return LIMITED[name](model, alpha="auto", warmup=BATCHES)

    model = linear()
    optimizer, method = sgd(model), make(model)
    data = [pair for epoch in range(3) for pair in batches(epoch)]
    for i, (x, y) in enumerate(data):
        if i == stop:
            other = copy.deepcopy(model)
            optimizer_, method_ = sgd(other), make(other)
            optimizer_.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            method_.load_state_dict(method.state_dict())
        step(method, optimizer, x, y)
    for x, y in data[stop:]:
        step(method_, optimizer_, x, y)
    assert method.alpha == method_.alpha < math.inf
    assert torch.equal(model.weight, other.weight)
    assert method.state_dict() == method_.state_dict()
    assert method.state_dict()["norms"] == []
    with pytest.raises(ValueError, match="needs"):
        method_.load_state_dict({"alpha": 1.0})


def test_what_is_refused() -> None:
    model, (x, y) = linear(), next(batches())
    method = ENGM(model, alpha="auto")
    with pytest.raises(ValueError, match=r"pass warmup=len\(loader\), or a number for alpha"):
        method.backward(F.cross_entropy(model(x), y, reduction="none"))
    for wrong in ({"quantile": 0.0}, {"quantile": 1.1}, {"warmup": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            ENGM(model, alpha="auto", **wrong)  # type: ignore[arg-type]
    for loose in ({"quantile": 0.5}, {"warmup": 3}):
        with pytest.raises(ValueError, match=f'{next(iter(loose))}=.* belongs to alpha="auto", and alpha=2.0'):
            ENGM(model, alpha=2.0, **loose)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first 100 backwards, and the training has 100"):
        ENGM(model, alpha="auto").expect(4, 100)
    ENGM(model, alpha="auto").expect(4, 104)
    ENGM(model, alpha="auto", warmup=3).expect(4, 4)
    ENGM(model, alpha=2.0).expect(4, 4)
    MSGD(model).expect(4, 4)
    with pytest.raises(ValueError, match="alpha='auto'"):
        FENGM(model, alpha="auto")  # type: ignore[arg-type]
    for line in ("engm", partial(ENGM, alpha="auto")):
        with pytest.raises(ValueError, match="leave out the number of parameters"):
            for_size(line, 100, alpha="auto" if line == "engm" else None)


@pytest.mark.parametrize(("warmup", "epoch", "length"), [(2, 3, 2), (None, 3, 6), (None, 6, 6), (None, 7, 7)])
def test_whole_epochs_are_measured_or_what_the_caller_says(
    monkeypatch: pytest.MonkeyPatch, warmup: int | None, epoch: int, length: int
) -> None:
    monkeypatch.setattr(automatic, "LEAST", 6)
    model = linear()
    optimizer, method = sgd(model), ENGM(model, alpha="auto", warmup=warmup)
    method.expect(epoch)
    found = []
    for x, y in [*batches(), *batches(1)]:
        step(method, optimizer, x, y)
        found.append(method.measuring)
    assert found == [i + 1 < length for i in range(2 * BATCHES)]


def test_the_parts_of_a_batch_may_go_to_other_processes() -> None:
    assert [FirstEpoch(0.5, None).length(count) for count in (1, 2)] == [None, None]
    for steps in (1, 7, 33, 49, 50, 51, 400):
        found = []
        for processes, accumulate in ((1, 4), (2, 2), (4, 1)):
            first = FirstEpoch(0.5, None)
            first.epoch = steps * accumulate
            length = first.length(processes)
            assert length is not None
            found.append(length * processes)
        assert found[0] == found[1] == found[2] >= LEAST
        assert found[0] - LEAST < 4 * steps or found[0] == 4 * steps


# Names


def test_lines_and_configurations() -> None:
    for line, share in (("engm:alpha=auto", QUANTILE), ('n-engm:alpha="auto",quantile=0.5', 0.5)):
        found = methods.method(line)(linear())
        assert found.measuring
        assert found.quantile == share
    for line in ("engm:alpha=Auto", "engm:alpha=auto,quantile=2", "engm:alpha=2,quantile=0.5", "f-engm:alpha=auto"):
        with pytest.raises(ValueError, match=line.partition(":")[0]):
            methods.method(line)
    for values in ({"alpha": "auto"}, {"method": "engm:alpha=auto"}, {"method": "a-engm:tau=3", "alpha": "auto"}):
        assert parts.recipe(configure({"data": "mnist", **values})).method(linear()).measuring  # type: ignore[operator, attr-defined]
    assert configure({"data": "mnist", "alpha": "1/4"}).alpha == 0.25
    with pytest.raises(ValueError, match=r"^alpha: write a finite number above 0, as 0.3, or auto \(it is 'often'\)$"):
        configure({"data": "mnist", "alpha": "often"})
    with pytest.raises(ValueError, match="alpha=auto has no meaning for method=msgd"):
        parts.recipe(configure({"data": "mnist", "alpha": "auto", "method": "msgd"}))


# Fabric


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch is enough, however short it is."""
    monkeypatch.setattr(automatic, "LEAST", 1)


AUTO: dict[str, Any] = {"engm": partial(ENGM, alpha="auto"), "a-engm": partial(AENGM, alpha="auto", tau=3, beta=0.0)}


def found(folder: Path) -> list[float]:
    return numbers(folder / "steps.csv", "alpha")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_run_has_the_same_limit(tmp_path: Path, name: str, at: int) -> None:
    chosen = full(method=AUTO[name], diagnose=0)
    whole = fit(tmp_path / "whole", chosen)
    with pytest.raises(KilledError):
        fit(tmp_path / "killed", chosen, progress=Kill(at + 1))
    resumed = fit(tmp_path / "killed", chosen, resume=True)
    assert equal(whole.state_dict(), resumed.state_dict())
    assert found(tmp_path / "whole") == found(tmp_path / "killed")
    alphas = found(tmp_path / "whole")
    assert alphas[:4] == [math.inf] * 4
    assert 0 < alphas[4] == alphas[-1] < math.inf
    clipped = numbers(tmp_path / "whole" / "steps.csv", "clipped")
    assert clipped[:5] == [0.0] * 5
    assert sum(clipped[5:]) > 0


@pytest.mark.usefixtures("short")
def test_another_quantile_is_another_run(tmp_path: Path) -> None:
    chosen = recipe(method=AUTO["engm"], save=2)
    with pytest.raises(KilledError):
        fit(tmp_path, chosen, progress=Kill(3))
    for other in (partial(ENGM, alpha="auto", quantile=0.5), partial(ENGM, alpha=math.inf)):
        with pytest.raises(ValueError, match="method's parameters was"):
            fit(tmp_path, recipe(method=other, save=2), resume=True)


@pytest.mark.usefixtures("short")
def test_a_run_of_one_epoch_has_nothing_to_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing would be limited; train for more epochs"):
        fit(tmp_path, recipe(method=AUTO["engm"], epochs=1))


# Several processes


def half(rank: int, folder: str) -> None:
    """One of two processes: its half of every batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = DistributedDataParallel(linear())
    optimizer, method = sgd(model), ENGM(model, alpha="auto", warmup=BATCHES)
    for i, (x, y) in enumerate(batches()):
        if i == 2:  # what the first process saves is enough
            state = [method.state_dict()]
            dist.broadcast_object_list(state, src=0)
            method = ENGM(model, alpha="auto", warmup=BATCHES)
            method.load_state_dict(state[0])
        step(method, optimizer, x[rank * N // 2 : (rank + 1) * N // 2], y[rank * N // 2 : (rank + 1) * N // 2])
    columns = gathered(model, torch.tensor([[1.0, 2.0, 3.0][rank:], [4.0, 5.0, 6.0][rank:]]))  # 3 and 2 examples
    torch.save((method.alpha, columns), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    time.sleep(0.5)  # torch's own: a thread of gloo that still needs the interpreter's lock would wait for ever


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(half, (str(tmp_path),), nprocs=2)
    model = linear()
    optimizer, method = sgd(model), ENGM(model, alpha="auto", warmup=BATCHES)
    for x, y in batches():
        step(method, optimizer, x, y)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for alpha, columns in found:
        assert alpha == found[0][0] == pytest.approx(method.alpha, rel=1e-12)
        assert columns.tolist() == [[1, 2, 3, 2, 3], [4, 5, 6, 5, 6]]
