"""Prepared models on a GPU: the copy gives the gradients, the module itself decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_device import CUDA, DEVICE, between, needs_cuda, no_waiting, on
from torch import Tensor, nn

from cases import CASES, Case, predicted
from firstorder.attacks import DDN, PGD, PQGD, VMIFGSM, Attack, Batched, Margin, Prepared, prepare
from firstorder.attacks.graphs import AFTER, KEPT, Graphed
from firstorder.attacks.prepared import _Preparation
from firstorder.evaluation.names import packaged

pytestmark = pytest.mark.cuda

PRECISIONS = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """The packaged MNIST network and images that it classifies correctly."""
    found, model = packaged.mnist(), packaged.mnist_cnn().to(DEVICE)
    x, y = found.x[:200].to(DEVICE), found.y[:200].to(DEVICE)
    right = predicted(model, x) == y
    return model, x[right], y[right]


def residual() -> nn.Module:
    """A network with BatchNorm, statistics and all."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(64, 3, 16, 16))
    model[-1].weight.data.mul_(8)
    return model.eval().to(DEVICE)


def own(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_taken(precision: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x = residual(), torch.rand(32, 3, 16, 16, device=DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare(model, x[:8], precision=precision)
    assert prepared.parts == ("folded BatchNorm", "channels_last", *([] if precision == "float32" else [precision]))
    assert not caplog.records
    y = own(model, x).argmax(1)
    ours, theirs = (m.gradient(x, y, None) for m in (prepared, prepared.exact))
    assert on(ours.gradient)
    assert ours.gradient.dtype == ours.logits.dtype == torch.float32
    alike = torch.cosine_similarity(ours.gradient.flatten(1), theirs.gradient.flatten(1)).min()
    assert alike > {"float32": 0.9999, "float16": 0.995, "bfloat16": 0.98}[precision]
    assert (precision != "float32") == (not torch.allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4))
    assert torch.equal(prepared.logits(x), own(model, x)), "the module's own logits, in its own precision"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_attack(case: Case, precision: Any) -> None:
    model, x = residual(), torch.rand(24, 3, 16, 16, device=DEVICE)
    y = own(model, x).argmax(1)
    prepared = prepare(model, x[:8], precision=precision)
    found = case.build(**case.required((3, 16, 16))).run(prepared, x, y)
    assert on(found.adversarial)
    assert found.adversarial.dtype == torch.float32
    assert torch.equal(found.success, own(model, found.adversarial).argmax(1) != y)
    assert found.success.any()


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.3, steps=40, early_stop=True),
        PGD(eps=0.3, steps=20, early_stop=True, patience=8, random_start=True, restarts=2),
        PQGD(eps=0.3, steps=20, early_stop=True),
        VMIFGSM(eps=0.3, steps=5, N=4),
        DDN(steps=200),
    ],
    ids=["pgd", "patient restarts", "pqgd", "vmi", "ddn"],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_verdicts_are_the_modules(
    attack: Attack[Any], precision: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Robust accuracy from the copy is that of the module, to two examples of about 200.

    DDN breaks all 200 in 100 steps. Halfway its count is no verdict: it rises from 79 at 40 steps to 179 at 60, and
    there a rounding of bfloat16 has some broken a step earlier and some a step later. After 200 steps what is left to
    compare is the size of the perturbations, whose median bfloat16 changes by 3 % on the CPU.
    """
    model, x, y = trained
    plain = attack.run(model, x, y)
    found = attack.run(prepare(model, x[:8], precision=precision), x, y)
    assert torch.equal(found.success, own(model, found.adversarial).argmax(1) != y)
    if attack.norms != ("L2",):
        assert abs(int(found.success.sum()) - int(plain.success.sum())) <= 2
        assert found.success.any()
        assert not found.success.all()
    else:
        assert plain.success.all()
        assert found.success.all()
        torch.testing.assert_close(found.norm, (found.adversarial - x).flatten(1).norm(dim=1), rtol=1e-5, atol=0)
        ratio = found.norm.median() / plain.norm.median()
        assert 0.95 <= float(ratio) <= 1.05


def test_the_verdict_of_a_copy_that_lies_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes everything for broken: the attack goes on with the module's own gradients."""
    model, x = residual(), torch.rand(16, 3, 16, 16, device=DEVICE)
    y, prepared = own(model, x).argmax(1), prepare(residual(), x[:4], precision="bfloat16")
    found = prepared.gradient(x, y, None)
    lie = found.logits.roll(1, 1)
    gradient = type(prepared).gradient

    def lying(self: Prepared, x: Tensor, *arguments: Any, **options: Any) -> Any:
        return gradient(self, x, *arguments, **options)._replace(logits=lie[: len(x)])

    monkeypatch.setattr(type(prepared), "gradient", lying)
    result = PGD(eps=1e-4, steps=3, early_stop=True).run(prepared, x, y)
    assert torch.equal(result.success, own(prepared.module, result.adversarial).argmax(1) != y)
    assert not result.success.any()


def test_precision_by_measurement() -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    assert prepare(model, x, precision="auto").parts[:2] == ("folded BatchNorm", "channels_last")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loop_of_a_prepared_model_never_waits(precision: Any) -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    y, prepared = own(model, x).argmax(1), prepare(model, x, precision=precision)
    for attack in (PGD(steps=4), DDN(steps=4)):
        hook, end = between(4)
        try:
            attack(prepared, x, y, hook=hook)
        finally:
            end()


@pytest.mark.skipif(not CUDA, reason="slow on the CPU")
def test_compiled() -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    y, prepared = own(model, x).argmax(1), prepare(model, x, precision="bfloat16", compile=True)
    assert prepared.parts == ("folded BatchNorm", "channels_last", "bfloat16", "torch.compile")
    found = PGD(eps=0.03, steps=4).run(prepared, x, y)
    assert torch.equal(found.success, own(model, found.adversarial).argmax(1) != y)


# CUDA graphs


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are faster than all else, whoever else is on the device."""
    monkeypatch.setattr(_Preparation, "_seconds", lambda self, interface: 2.0 - isinstance(interface, Graphed))


def graphs_of(prepared: Prepared) -> Graphed:
    assert isinstance(prepared._copy, Graphed), prepared.parts
    return prepared._copy


@needs_cuda
@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_gradients_are_the_copys(precision: Any) -> None:
    """For points and labels that the graph has not seen, of several losses, whatever the caller does with them."""
    model, x = residual(), torch.rand(32, 3, 16, 16, device=DEVICE)
    y = own(model, x).argmax(1)
    plain, prepared = (prepare(model, x, precision=precision, graph=graph) for graph in (False, True))
    assert prepared.parts == (*plain.parts, "CUDA graph")
    for loss in (None, Margin()):
        for call in range(AFTER + 3):
            points, labels = torch.rand_like(x), y.roll(call)
            found, expected = (m.gradient(points, labels, loss) for m in (prepared, plain))
            torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
            found.gradient.fill_(torch.nan)
    assert len(graphs_of(prepared)._graphs) == 2


@needs_cuda
@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"early_stop": True}, {"early_stop": True, "restarts": 2}], ids=str)
def test_attacks_with_graphs(
    options: dict[str, Any], precision: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """As many broken as without, to two of about 200, with batches that shrink and others; the module's verdicts."""
    model, x, y = trained
    plain, prepared = (prepare(model, x[:64], precision=precision, graph=graph) for graph in (False, True))
    assert "CUDA graph" in prepared.parts
    attack = PGD(eps=0.3, steps=20, random_start="restarts" in options, **options)
    counts = []
    for one in (plain, prepared, Batched(prepared, 64)):
        found = attack.run(one, x, y, generator=torch.Generator(DEVICE).manual_seed(0))
        assert torch.equal(found.success, own(model, found.adversarial).argmax(1) != y)
        counts.append(int(found.success.sum()))
    assert max(counts) - min(counts) <= 2
    assert 0 < len(graphs_of(prepared)._graphs) <= KEPT
    assert not graphs_of(prepared)._wrong


@needs_cuda
@pytest.mark.usefixtures("_fast")
def test_replays_never_wait() -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    y, prepared = own(model, x).argmax(1), prepare(model, x, graph=True)
    for _ in range(AFTER):
        prepared.gradient(x, y, None)
    with no_waiting():
        found = prepared.gradient(x, y, None)
    assert found.gradient.isfinite().all()
    hook, end = between(4)
    try:
        PGD(steps=4)(prepared, x, y, hook=hook)
    finally:
        end()


class Waiting(nn.Module):
    """A model that reads a number from the device, as no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits * 2 if float(x.detach().sum()) > -1 else logits


@needs_cuda
@pytest.mark.usefixtures("_fast")
def test_a_model_that_cannot_be_captured_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Waiting().to(DEVICE).eval(), torch.rand(8, 3, 16, 16, device=DEVICE)
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device=DEVICE)
    torch.cuda.manual_seed(0)
    prepared = prepare(model, x, graph=True)
    assert "CUDA graph" not in prepared.parts
    assert "CUDA graph is left out" in caplog.text
    assert torch.equal(torch.rand(3, device=DEVICE), expected), "what failed has drawn, or left torch unable to"
    y = own(model, x).argmax(1)
    found = PGD(eps=0.1, steps=10).run(prepared, x, y)
    assert torch.equal(found.success, own(model, found.adversarial).argmax(1) != y)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=needs_cuda)])
def test_refreshed(graph: bool) -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    prepared = prepare(model, x, precision="bfloat16", graph=graph)
    assert ("CUDA graph" in prepared.parts) == graph
    with torch.no_grad():
        model[0].weight.mul_(-1)
    y = own(model, x).argmax(1)
    prepared.refresh()
    ours, theirs = (m.gradient(x, y, Margin()).gradient for m in (prepared, prepared.exact))
    assert torch.cosine_similarity(ours.flatten(1), theirs.flatten(1)).min() > 0.97


@pytest.mark.parametrize("precision", PRECISIONS)
def test_art_and_torchattacks(precision: Any) -> None:
    model, x = residual(), torch.rand(8, 3, 16, 16, device=DEVICE)
    y = own(model, x).argmax(1)
    pytest.importorskip("torchattacks")
    import firstorder.torchattacks

    prepared = prepare(model, x, precision=precision)
    found = firstorder.torchattacks.PGD(prepared, eps=0.03, alpha=0.01, steps=4)(x, y)
    assert on(found)
    assert (own(model, found).argmax(1) != y).any()
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    import firstorder.art

    kind = "gpu" if CUDA else "cpu"
    whole = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 16, 16), 10, clip_values=(0.0, 1.0), device_type=kind)
    assert whole.device.type == DEVICE.type
    view = firstorder.art.prepare(whole, x.cpu().numpy(), precision=precision)
    attack = firstorder.art.PGD(view, eps=0.03, eps_step=0.01, max_iter=4, verbose=False)
    made = torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(DEVICE)
    assert (own(model, made).argmax(1) != y).any()
