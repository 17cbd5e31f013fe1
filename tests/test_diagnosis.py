"""Diagnosis: planted pathologies are named, honest models raise no alarm, each check by itself, panel and command."""

from __future__ import annotations

import copy
import html
import importlib.util
import os
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from typer.testing import CliRunner

import pathologies
from firstorder.attacks import FGSM, RobustnessWarning
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import data, packaged
from firstorder.evaluation.reporting import diagnosis as panel
from firstorder.evaluation.runs.diagnosis import CHECKS, Finding, diagnose
from firstorder.evaluation.runs.subject import Subject
from pathologies import natural, passed, robust
from samples import sampled

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROBUST = Path(os.environ.get("FIRSTORDER_ROBUST_NETS", SHARED / "robust"))
"""The folder of robust networks by other people, where there is one."""

FASHION = Path(os.environ.get("FIRSTORDER_FASHION_MNIST", SHARED))
"""A root in torchvision's layout that has Fashion-MNIST, where there is one."""

EPS, COUNT = 0.3, 25
MNIST = packaged.mnist()
X, Y = MNIST.x[:COUNT], MNIST.y[:COUNT]

RANGE, MODE, RANDOM, BATCH = (
    "range of the images",
    "training mode",
    "randomised forwards",
    "examples that influence each other",
)
PROBABILITIES, NAN, GRADIENTS = "probabilities as outputs", "NaN and infinity", "zero or non-finite gradients"
DIFFERENCES, SATURATED, STEPS = "differences against the gradient", "saturated logits", "loss against steps"
WHOLE, SQUARE, BITS = "a radius that allows everything", "Square against gradients", "8-bit images"


def named(model: Callable[[Tensor], Any], x: Tensor = X, y: Tensor = Y, **words: Any) -> set[str]:
    """The checks that warn."""
    found = diagnose(model, x, y, **{"eps": EPS, **words})
    assert [finding.check for finding in found] == [check.name for check in CHECKS]
    assert all(bool(finding.remedy) == (finding.verdict == "warning") for finding in found)
    return {finding.check for finding in found if finding.verdict == "warning"}


def finding(check: str, model: Callable[[Tensor], Any], x: Tensor = X, y: Tensor = Y, **words: Any) -> Finding:
    (found,) = (one for one in diagnose(model, x, y, **{"eps": EPS, **words}) if one.check == check)
    return found


PLANTED: list[tuple[str, Callable[[], nn.Module], Tensor, set[str]]] = [
    ("softmax", lambda: robust(after=lambda z: z.softmax(1)), X, {PROBABILITIES}),
    ("percent", lambda: robust(after=lambda z: 100 * z.softmax(1)), X, {PROBABILITIES}),
    ("sigmoid", lambda: robust(after=torch.sigmoid), X, {PROBABILITIES}),
    ("random", lambda: pathologies.noisy(0.1), X, {RANDOM}),
    ("hardly random", lambda: pathologies.noisy(1e-3), X, {RANDOM}),
    ("rounding", lambda: natural(before=lambda x: (x * 4).round() / 4), X, {GRADIENTS, WHOLE, SQUARE}),
    ("rounding, straight through", lambda: robust(before=passed(4)), X, {DIFFERENCES}),
    ("rounding, wrong gradient", lambda: robust(before=passed(4, -1.0)), X, {DIFFERENCES, STEPS, WHOLE}),
    ("dropout", pathologies.dropping, X, {MODE}),
    ("dropout for ever", pathologies.stubborn, X, {MODE, RANDOM}),
    ("saturated", lambda: robust(after=lambda z: 1e4 * z), X, {SATURATED, GRADIENTS, STEPS}),
    ("saturated, natural", lambda: natural(after=lambda z: 1e4 * z), X, {SATURATED, GRADIENTS, STEPS}),
    ("detached", lambda: robust(before=lambda x: x.detach()), X, {GRADIENTS}),
    ("detached, with a graph", lambda: robust(before=lambda x: x.detach() + 0 * x), X, {GRADIENTS, DIFFERENCES}),
    ("bytes", packaged.mnist_cnn, 255 * X, {RANGE}),
    ("normalised", packaged.mnist_cnn, (X - 0.1307) / 0.3081, {RANGE}),
    ("divided twice", packaged.mnist_cnn, X / 255, {RANGE}),
    ("wants bytes", pathologies.wants_bytes, X, {RANGE}),
    ("NaN off the grid", lambda: robust(before=pathologies.stored_only), X, {NAN}),
    ("mixing", pathologies.mixing, X, {BATCH}),
]
ALONE = {"softmax", "dropout", "rounding, straight through", "bytes", "normalised", "detached"}
"""Of which nothing else is wrong."""


@pytest.mark.parametrize(("name", "make", "x", "wanted"), PLANTED, ids=[row[0] for row in PLANTED])
def test_a_planted_pathology_is_named(name: str, make: Callable[[], nn.Module], x: Tensor, wanted: set[str]) -> None:
    torch.manual_seed(0)
    found = named(make(), x)
    assert wanted <= found
    assert found == wanted or name not in ALONE


def noise(gradient: Tensor) -> Tensor:
    return gradient + 10 * gradient.abs().amax() * torch.randn_like(gradient)


LATER: list[tuple[str, Callable[[], nn.Module], set[str]]] = [
    ("steep contrast", lambda: natural(before=pathologies.steep), {WHOLE}),
    ("ripples", lambda: natural(before=pathologies.rippled), {STEPS, SQUARE}),
    ("clamped logits", lambda: natural(after=lambda z: (5 * z).clamp(-1, 1)), {GRADIENTS, STEPS, WHOLE}),
    ("noise in the gradient", lambda: natural(before=pathologies.hooked(noise)), {DIFFERENCES, SQUARE}),
    ("flipped gradient", lambda: natural(before=pathologies.hooked(lambda g: -g)), {DIFFERENCES, STEPS, WHOLE, SQUARE}),
    (
        "log of a cold softmax",
        lambda: robust(after=lambda z: (1e3 * z).softmax(1).add(1e-12).log()),
        {GRADIENTS, WHOLE},
    ),
    ("BatchNorm that adapts", pathologies.adapting, {MODE}),
    ("one of two", pathologies.OneOfTwo, {RANDOM}),
    ("temperature", lambda: natural(after=lambda z: 1e3 * z), {SATURATED, GRADIENTS, STEPS}),
    ("8-bit input", lambda: natural(before=lambda x: (x * 255).round() / 255), {GRADIENTS, WHOLE, SQUARE}),
    ("rounded logits", lambda: natural(after=lambda z: (z * 8).round() / 8), {GRADIENTS, STEPS, WHOLE, SQUARE}),
    ("votes", lambda: natural(after=lambda z: 5 * one_hot(z.argmax(1), 10).float()), {GRADIENTS, SQUARE}),
    ("random sizes", lambda: natural(before=pathologies.resized), {RANDOM}),
]
"""Kinds that no threshold was chosen on; but for "one of two" the number of forwards was."""


@pytest.mark.parametrize(("name", "make", "wanted"), LATER, ids=[row[0] for row in LATER])
def test_another_kind_is_named(name: str, make: Callable[[], nn.Module], wanted: set[str]) -> None:
    torch.manual_seed(0)
    assert wanted <= named(make())


def test_a_jpeg_like_step_in_one_channel_is_named() -> None:
    pytest.importorskip("pyautoattack")
    x, y = packaged.cifar10().x[:6], packaged.cifar10().y[:6]
    model = pathologies.Around(packaged.cifar10_resnet18(), before=pathologies.one_channel)
    found = finding(GRADIENTS, model, x, y, eps=8 / 255)
    assert (found.verdict, "none in 1 of 3 channels" in found.figure) == ("warning", True)


# Honest models


@pytest.mark.parametrize(("model", "eps"), [("mnist-cnn", 0.3), ("mnist-cnn", 8 / 255), ("mnist-cnn-natural", 0.3)])
def test_the_packaged_mnist_models_raise_no_alarm(model: str, eps: float) -> None:
    assert named(packaged.get(model).model(), eps=eps) == set()
    assert named(packaged.get(model).model(), eps=10 * eps / 3, norm="L2") == set()


def test_the_packaged_cifar_model_raises_no_alarm() -> None:
    pytest.importorskip("pyautoattack")
    images = packaged.cifar10()
    assert named(packaged.cifar10_resnet18(), images.x[:6], images.y[:6], eps=8 / 255) == set()


@pytest.mark.skipif(not (FASHION / "FashionMNIST").is_dir(), reason="no Fashion-MNIST here")
def test_the_packaged_fashion_model_raises_no_alarm() -> None:
    images = data.load(f"fashion-mnist:{FASHION}", count=COUNT)
    assert named(packaged.fashion_cnn(), images.x, images.y, eps=0.2) == set()


NETS = [
    "mnist-zhang2019-trades",
    "mnist-dathathri2020-cnn-a-adv",
    "cifar10-dathathri2020-cnn-a-adv",
    "cifar10-wong2018-small-l2-36",
    "mnist-balunovic2020-colt-0.1",
    "cifar10-wang2021-resnet2b",
    "cifar10-wang2021-resnet4b",
    "cifar10-dathathri2020-cnn-a-mix",
    "cifar10-dathathri2020-cnn-a-mix4",
    "cifar10-wong2018-small-8",
    "mnist-wong2018-small-0.3",
    "cifar10-oval-deep-kw",
]


@pytest.mark.skipif(not ROBUST.is_dir(), reason="no robust networks here")
@pytest.mark.parametrize("name", sampled([(name,) for name in NETS], 3, lambda row: None))
def test_robust_networks_of_others_raise_no_alarm(name: str) -> None:
    spec = importlib.util.spec_from_file_location("architectures", ROBUST / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.load(ROBUST / f"{name}.safetensors")
    images = packaged.cifar10() if name.startswith("cifar10") else MNIST
    norm = {"linf": "Linf", "l2": "L2"}[net.zoo["norm"]]
    assert named(net, images.x[:COUNT], images.y[:COUNT], eps=net.zoo["eps"], norm=norm) == set()


# Each check


class Linear(nn.Module):
    """Logits W x + b of images (N, 1, 4, 4)."""

    def __init__(self, seed: int = 0, *, scale: float = 1.0) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(scale * torch.randn(3, 16, generator=source), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def images(count: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(1)) / 255
    return x, Linear()(x).argmax(1)


def test_derivatives_in_closed_form() -> None:
    x, y = images()
    model = Linear()
    subject = Subject(model, x, y, eps=0.1, norm="Linf", seed=0, batch_size=7)
    along, across = subject.local
    assert subject.double is not None
    n = len(along.found)
    runner_up = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)[:n]
    slopes = (model.weight[runner_up] - model.weight[y[:n]]).abs().sum(1).double()
    assert torch.allclose(along.found, slopes, rtol=1e-4)
    assert torch.allclose(along.expected, slopes, rtol=1e-4)
    assert torch.allclose(across.found, across.expected, rtol=1e-4, atol=1e-4)
    assert (across.found.abs() <= slopes + 1e-4).all()


def test_what_rounds_its_input_is_not_computed_in_float64() -> None:
    class Narrow(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float().to(self.weight.dtype)).double()

    x, y = images()
    assert Subject(Narrow(), x, y, eps=0.1, norm="Linf", seed=0, batch_size=7).double is None
    found = finding(DIFFERENCES, Narrow(), x, y, eps=0.1)
    assert found.verdict == "ok"
    assert "float32" in found.figure


def test_a_function_is_diagnosed_too() -> None:
    x, y = images()
    model = Linear()
    found = {one.check: one for one in diagnose(lambda a: model(a), x, y, eps=0.3)}
    assert found[MODE].verdict == "left out"
    assert "float32" in found[DIFFERENCES].figure
    assert {one.verdict for name, one in found.items() if name != MODE} == {"ok"}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_between_the_levels_nothing_can_be_stored(norm: str) -> None:
    """A model that errs off the levels alone: nothing that is stored breaks it."""
    model = Linear()
    x, y = images()
    assert torch.equal((x * 255).round() / 255, x)

    class Fragile(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            away = (a - (a * 255).round().detach() / 255).flatten(1).norm(dim=1, keepdim=True)
            return model(a) + 1e5 * away * torch.tensor([1.0, -1.0, 0.5])

    found = finding(BITS, Fragile(), x, y, eps=0.4 / 255 if norm == "Linf" else 0.9 / 255, norm=norm)
    broken = int((y != 0).sum())
    assert (found.verdict, found.figure) == ("warning", f"{broken} of {broken} undone, {broken} for good")


def test_images_that_are_not_of_8_bits_are_not_rounded() -> None:
    x = (0.9 * X + 0.01).clamp(0, 1)
    found = finding(BITS, packaged.mnist_cnn_natural(), x)
    assert (found.verdict, found.figure) == ("left out", "the images themselves are not of 8 bits")


def test_without_autoattack_square_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "firstorder.autoattack", None)  # type: ignore[arg-type]
    found = finding(SQUARE, packaged.mnist_cnn())
    assert found.verdict == "left out"
    assert "pip install" in found.figure


def test_what_the_images_lack_leaves_checks_out() -> None:
    found = diagnose(packaged.mnist_cnn(), X, (Y + 1) % 10, eps=EPS)
    said = {one.check: one for one in found}
    assert said[RANGE].verdict == "warning"
    assert said[GRADIENTS].verdict == said[WHOLE].verdict == "left out"
    assert said[GRADIENTS].figure == "the model is right on none of the images"


def test_a_model_that_refuses_other_ranges_is_no_failure() -> None:
    def strict(x: Tensor) -> Tensor:
        assert bool((x >= 0).all() & (x <= 1).all())
        return x

    assert named(robust(before=strict)) == set()


def test_clean_logits_that_are_no_numbers() -> None:
    found = finding(NAN, robust(after=lambda z: torch.where(z.argmax(1, keepdim=True) == 7, torch.nan, z)))
    assert found.verdict == "warning"
    assert found.figure.startswith(f"{int((packaged.mnist_cnn()(X).argmax(1) == 7).sum())} of {COUNT} images, 0 of ")


def test_a_channel_without_gradient() -> None:
    class Colours(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grey = x[:, :1] + x[:, 1:].detach().mean(1, keepdim=True) * 0
            return Linear()(grey)

    x, y = images()
    found = finding(GRADIENTS, Colours(), x.expand(-1, 3, -1, -1).clone(), y, eps=0.1)
    assert (found.verdict, "none in 2 of 3 channels" in found.figure) == ("warning", True)


def test_the_models_own_exceptions_pass() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        diagnose(fails, X, Y)

    def alone(x: Tensor) -> Tensor:
        if len(x) < COUNT:
            raise KeyError("mine")
        logits: Tensor = packaged.mnist_cnn()(x)
        return logits

    found = {one.check: one for one in diagnose(alone, X, Y)}
    assert found[PROBABILITIES].verdict == "ok"
    assert (found[BATCH].verdict, found[BATCH].figure) == ("left out", "the model raised KeyError: 'mine'")


@pytest.mark.parametrize(
    ("words", "message"),
    [({"eps": 0}, "eps=0 must be"), ({"norm": "L1"}, "norm='L1'"), ({"batch_size": 0}, "batch_size=0")],
)
def test_bad_arguments(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(packaged.mnist_cnn(), X, Y, **words)
    with pytest.raises(ValueError, match="there is no image"):
        diagnose(packaged.mnist_cnn(), X[:0], Y[:0])
    with pytest.raises(ValueError, match=r"classes 0\.\.9"):
        diagnose(packaged.mnist_cnn(), X, Y + 5)


def test_the_model_is_left_as_it_was_and_nothing_is_drawn() -> None:
    model = pathologies.dropping()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    state = torch.get_rng_state()
    found = diagnose(model, X, Y, eps=EPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert diagnose(model, X, Y, eps=EPS) == found
    smaller = diagnose(model, X, Y, eps=EPS, batch_size=4)
    assert [one.verdict for one in smaller] == [one.verdict for one in found]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_twice() -> None:
    """What the attacks would warn of are findings."""
    model = natural(before=lambda x: (x * 4).round() / 4)
    with pytest.warns(RobustnessWarning, match="gradient is zero"):
        FGSM(eps=EPS)(model, X, Y)
    assert GRADIENTS in named(model)


# The panel and the command

BAD = Finding(check="a|b", figure="<script>x</script>", meaning="1 < 2 & 3", remedy='"do"', verdict="warning")
GOOD = Finding(check="c", figure="0", meaning="m", remedy="", verdict="ok")
OUT = Finding(check="d", figure="why", meaning="m", remedy="", verdict="left out")


class Cells(HTMLParser):
    """The texts of the cells, and the tags, of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.texts += [""] if tag in ("th", "td") else []

    def handle_data(self, text: str) -> None:
        if self.texts:
            self.texts[-1] += text


def test_the_panel_as_html() -> None:
    cells = Cells()
    cells.feed(panel.table_html([BAD, GOOD, OUT], label='<i>"x"'))
    assert not {"script", "i"} & set(cells.tags)
    assert [text.strip() for text in cells.texts[5:10]] == ["a|b", "warning", BAD.figure, BAD.meaning, BAD.remedy]
    assert '<tr class="left-out"><th scope="row">d</th>' in panel.table_html([OUT], label="")


def test_the_panel_as_markdown() -> None:
    text = panel.markdown([BAD, GOOD, OUT])
    heading, said, *table = [line for line in text.splitlines() if line]
    assert heading == "## Can this number be trusted?"
    assert said == "1 of 2 checks warn: a\\|b; left out: d."
    assert table[2] == '| a\\|b | warning | &lt;script>x&lt;/script> | 1 &lt; 2 & 3 | "do" |'
    assert len(table) == 5
    assert panel.summary([GOOD]) == "No warning of 1 checks."


def command(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["diagnose", *words])


def test_the_command_is_content() -> None:
    done = command("mnist-cnn", "--eps", "0.3", "--count", "8")
    assert done.exit_code == 0, done.output
    assert "8 images of MNIST, Linf radius 0.3" in done.output
    assert f"No warning of {len(CHECKS)} checks." in done.output or "left out" in done.output
    assert all(check.name in done.output for check in CHECKS)


def test_the_page(tmp_path: Path) -> None:
    words = ["pathologies:training", "--data", "mnist", "--eps", "0.3", "--count", "6", "--out", str(tmp_path / "new")]
    done = command(*words)
    assert done.exit_code == 1, done.output
    page = (tmp_path / "new" / "diagnosis.html").read_text()
    text = (tmp_path / "new" / "diagnosis.md").read_text()
    (check,) = (check for check in CHECKS if check.name == MODE)
    for content in (page, text):
        assert all(html.escape(one.name) in content or one.name in content for one in CHECKS)
        assert "6 of MNIST" in content
        assert f"checks warn: {MODE}" in content
    assert f"{MODE}: {check.meaning}. What to do: {check.remedy}." in html.unescape(page)
    assert "<script src" not in page
    assert "http" not in page


def test_the_command_warns() -> None:
    done = command("pathologies:training", "--data", "mnist", "--eps", "0.3", "--norm", "Linf", "--count", "6")
    assert done.exit_code == 1, done.output
    (check,) = (check for check in CHECKS if check.name == MODE)
    assert " ".join(f"{check.meaning}. What to do: {check.remedy}.".split()) in " ".join(done.output.split())
    assert f"checks warn: {MODE}" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mnist-cnm"], "unknown model"),
        (["fashion-cnn"], "name some with --data"),
        (["pathologies:training"], "name some with --data"),
        (["mnist-cnn", "--eps", "0"], "eps='0'"),
        (["mnist-cnn", "--norm", "L1"], "norm='L1'"),
        (["mnist-cnn", "--data", "nowhere"], "unknown data"),
    ],
)
def test_the_command_refuses(words: list[str], message: str) -> None:
    done = command(*words)
    assert done.exit_code == 2
    assert message in done.output
