"""Gradients from CUDA graphs, all but the capture: a recorded one runs the model again and writes where it wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Net, images, predicted
from firstorder.attacks import (
    DDN,
    DLR,
    PGD,
    CrossEntropy,
    Evaluation,
    Loss,
    Margin,
    Model,
    TorchModel,
    graphs,
    prepare,
)
from firstorder.attacks import prepared as preparation
from firstorder.attacks.graphs import AFTER, KEPT, Graphed

Replay = Callable[[], None]


class Recorder:
    """A capture for the CPU.

    Args:
        wrong: what a replay makes of what the model finds.
    """

    def __init__(self, wrong: Callable[[Evaluation], Evaluation] = lambda found: found) -> None:
        self.wrong, self.captured, self.replayed = wrong, 0, 0
        self.run: Callable[[], Evaluation]

    def __call__(self, run: Callable[[], Evaluation], device: torch.device, pool: Any) -> tuple[Replay, Evaluation]:
        self.captured += 1
        found = run()

        def replay() -> None:
            self.replayed += 1
            for kept, part in zip(found, self.wrong(run()), strict=True):
                assert kept is not None
                assert part is not None
                kept.copy_(part)

        return replay, found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(graphs, "capture", made)
    return made


def near(found: Evaluation, expected: Evaluation) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def graphed(module: nn.Module | None = None) -> tuple[Graphed, TorchModel]:
    model = TorchModel(module or Net().eval())
    return Graphed(model, near), model


def test_the_call_of_its_number_captures_and_those_after_it_replay(recorder: Recorder) -> None:
    model, plain = graphed()
    y = torch.arange(6)
    for call in range(1, AFTER + 4):
        x = images(seed=call)
        found, expected = model.gradient(x, y, None), plain.gradient(x, y, None)
        assert near(found, expected)
        assert recorder.captured == (call >= AFTER)
        assert recorder.replayed == max(call - AFTER + 1, 0), "the first replay is the comparison"


def test_labels_are_read_anew(recorder: Recorder) -> None:
    model, plain = graphed()
    x = images()
    for labels in (torch.arange(6), torch.eye(10)[:6]):
        for _ in range(AFTER + 1):
            model.gradient(x, labels, None)
        other = labels.flip(0)
        assert near(model.gradient(x, other, None), plain.gradient(x, other, None))
    assert recorder.captured == 2


def test_what_is_returned_is_the_callers(recorder: Recorder) -> None:
    model, plain = graphed()
    x, y = images(), torch.arange(6)
    for _ in range(AFTER):
        model.gradient(x, y, None)
    first = model.gradient(x, y, None)
    kept = [part.clone() for part in first if part is not None]
    first.gradient.zero_()
    second = model.gradient(images(seed=9), y, None)
    assert near(second, plain.gradient(images(seed=9), y, None))
    assert first.logits is not None
    assert torch.equal(first.logits, kept[1])


@pytest.mark.parametrize("loss", [None, Margin(), DLR(), CrossEntropy()], ids=repr)
def test_calls_are_distinguished(loss: Loss | None, recorder: Recorder) -> None:
    """By shape, labels, loss, type and autocast: none of these meets another's graph."""
    model, plain = graphed()
    x, y = images(), torch.arange(6)
    for _ in range(AFTER):
        model.gradient(x, y, loss)
    replayed = recorder.replayed
    other = Margin() if not isinstance(loss, Margin) else None
    for call in ((x[:5], y[:5], loss), (x, y, other), (x, torch.eye(10)[:6], None)):
        assert near(model.gradient(*call), plain.gradient(*call))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert near(model.gradient(x, y, loss), plain.gradient(x, y, loss))
    assert recorder.replayed == replayed
    model.gradient(x, y, loss if loss is None else type(loss)())
    assert recorder.replayed == replayed + 1, "equal losses are one"


@dataclass
class Changing:
    factor: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class Listed:
    factors: list[float]

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factors[0] * F.cross_entropy(logits, labels, reduction="none")


def function(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("loss", [Changing(), Listed([1.0]), function], ids=["changing", "list", "function"])
def test_losses_that_may_change_are_never_captured(loss: Any, recorder: Recorder) -> None:
    model, _ = graphed()
    for _ in range(3 * AFTER):
        model.gradient(images(), torch.arange(6), loss)
    assert not recorder.captured


def test_the_first_calls_of_an_attack_are_inspected(recorder: Recorder) -> None:
    """A label out of range is found by the model itself, however many graphs there are."""
    module = Net().eval()
    model, _ = graphed(module)
    attack, x = PGD(steps=AFTER + 2, random_start=False), images()
    y = predicted(module, x)
    for _ in range(2):
        attack(model, x, y)
    assert recorder.captured == 1
    assert recorder.replayed == 1 + 2 + (AFTER + 2 - 1) - 1
    with pytest.raises(ValueError, match="label"):
        attack(model, x, torch.full((6,), 10))


def test_few_graphs_are_kept_and_come_again_later(recorder: Recorder) -> None:
    model, plain = graphed()
    y = torch.arange(6)

    def ask(n: int, times: int) -> None:
        for _ in range(times):
            assert near(model.gradient(images()[:n], y[:n], None), plain.gradient(images()[:n], y[:n], None))

    for n in range(1, KEPT + 2):
        ask(n, AFTER)
    assert recorder.captured == KEPT + 1
    ask(2, 1)
    assert recorder.captured == KEPT + 1, "this one is still kept"
    ask(1, 2 * AFTER - 1)
    assert recorder.captured == KEPT + 1
    ask(1, 1)
    assert recorder.captured == KEPT + 2
    replayed = recorder.replayed
    ask(2, 1)
    assert recorder.replayed == replayed + 1, "what was asked for last is not what goes"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda found: found._replace(gradient=-found.gradient),
        lambda found: found._replace(logits=found.logits.roll(1, 0)),
        lambda found: Evaluation(*(torch.zeros_like(part) for part in found)),
    ],
    ids=["gradient", "logits", "nothing"],
)
def test_a_graph_that_disagrees_is_left_out(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(wrong)
    monkeypatch.setattr(graphs, "capture", recorder)
    model, plain = graphed()
    for seed in range(3 * AFTER):
        x, y = images(seed=seed), torch.arange(6)
        assert near(model.gradient(x, y, None), plain.gradient(x, y, None))
    assert (recorder.captured, recorder.replayed) == (1, 1)
    assert "the CUDA graph for points (6, 3, 6, 5) is left out" in caplog.text


def test_a_graph_that_does_not_read_its_points_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a forward keeps something from the points that it saw first."""
    monkeypatch.setattr(graphs, "capture", lambda run, device, pool: (lambda: None, run()))
    model, plain = graphed()
    for seed in range(2 * AFTER):
        x, y = images(seed=seed), torch.zeros(6, dtype=torch.long)
        assert near(model.gradient(x, y, None), plain.gradient(x, y, None))


# prepare(..., graph=True)


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are faster than all else."""
    monkeypatch.setattr(
        preparation._Preparation, "_seconds", lambda self, interface: 2.0 - isinstance(interface, Graphed)
    )


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prepared(precision: Any, recorder: Recorder) -> None:
    module, x = Net().eval(), images(24)
    y = predicted(module, x)
    plain = prepare(module, x[:4], precision=precision)
    model = prepare(module, x[:4], precision=precision, graph=True)
    assert model.parts == (*plain.parts, "CUDA graph")
    for attack in (PGD(steps=12, random_start=False), PGD(steps=12, random_start=False, early_stop=True), DDN(steps=9)):
        before = recorder.replayed
        found, expected = (attack.run(m, x, y) for m in (model, plain))
        assert recorder.replayed > before
        assert torch.equal(found.adversarial, expected.adversarial)
        assert torch.equal(found.success, predicted(module, found.adversarial) != y)


@pytest.mark.usefixtures("_fast")
def test_a_refreshed_copy_keeps_its_graphs(recorder: Recorder) -> None:
    module, x = Net().eval(), images()
    model = prepare(module, x, graph=True)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(-1.1)
    model.refresh()
    y = predicted(module, x)
    before = recorder.replayed
    found = model.gradient(x, y, Margin())
    assert recorder.replayed == before + 1
    torch.testing.assert_close(found.gradient, model.exact.gradient(x, y, Margin()).gradient)


@pytest.mark.parametrize("faster", [True, False])
def test_taken_where_it_is_faster(
    faster: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(self: Any, interface: Model) -> float:
        return 1.0 if isinstance(interface, Graphed) == faster else 2.0

    monkeypatch.setattr(preparation._Preparation, "_seconds", seconds)
    caplog.set_level(logging.INFO, preparation.__name__)
    assert ("CUDA graph" in prepare(Net().eval(), images(), graph=True).parts) == faster
    assert ("CUDA graph is left out: it was not faster" in caplog.text) != faster


@pytest.mark.usefixtures("_fast")
def test_left_out_where_it_disagrees(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(graphs, "capture", Recorder(lambda found: found._replace(gradient=-found.gradient)))
    assert "CUDA graph" not in prepare(Net().eval(), images(), graph=True).parts
    assert "CUDA graph is left out: its gradient is not the model's" in caplog.text


def test_left_out_where_there_is_no_device(caplog: pytest.LogCaptureFixture) -> None:
    assert "CUDA graph" not in prepare(Net().eval(), images(), graph=True).parts
    assert "CUDA graph is left out: RuntimeError: images on cpu have no CUDA graph" in caplog.text
