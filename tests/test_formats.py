"""Models in other stacks' formats: evaluated, attacked and trained without a network connection."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from firstorder.attacks import PGD
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import code, formats, models, packaged, weights
from firstorder.evaluation.names.networks import SmallCNN
from firstorder.training import ENGM

ATTACK = PGD(eps=0.2, alpha=0.05, steps=5)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    found = invoke(*words)
    assert found.exit_code == 0, (found.output, found.stderr, found.exception)
    return str(found.output)


def evaluated(model: str, data: str, *, out: str = "out", eps: str = "0.2") -> tuple[float, float]:
    """Clean and robust accuracy, in percent, that `firstorder evaluate` finds on 20 images."""
    words = ["evaluate", "--model", model, "--data", data, "--attack", "pgd:steps=5", "--eps", eps, "--count", 20]
    found = re.search(r" 20 +([\d.]+) +([\d.]+) +[\d.]+–", done(*words, "--out", out))
    assert found
    return float(found[1]), float(found[2])


def trained(model: str, data: str, *more: str) -> dict[str, Tensor]:
    """The last weights after an epoch of ENGM by `firstorder train`."""
    keys = {"data": data, "model": model, "validation": 40, "examples": 40, "epochs": 1, "batch-size": 10, "eps": 0.05,
            "attack": "pgd:steps=1,random_start=true", "judge-steps": 1, "diagnose": 0, "landscape": 0, "lr": 0.05,
            "method": "engm", "alpha": 1, "logger": "csv", "accelerator": "cpu", "threads": 1}  # fmt: skip
    done("train", "--out", "run", *[word for key, value in keys.items() for word in (f"--{key}", value)], *more)
    return load_file("run/last.safetensors")


def broken(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).argmax(1)
    return model(ATTACK(models.ready(model), x, y)).argmax(1) != y


# --- ONNX


def node(kind: str, given: list[str], name: str, **attributes: Any) -> Any:
    helper = pytest.importorskip("onnx").helper
    return helper.make_node(kind, given, [name], name=name, **attributes)


def graph(file: Path, nodes: list[Any], constants: dict[str, Tensor], *, batch: Any = "n", outputs: int = 1) -> Path:
    """An ONNX file of a network from images (n, 1, 28, 28) to the last node's output."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, [batch, 1, 28, 28])],
        [helper.make_tensor_value_info(one.output[0], kind, [None, None]) for one in nodes[-outputs:]],
        [onnx.numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=8), file)
    return file


def small_cnn(file: Path, *more: Any, matmul: bool = False, **options: Any) -> tuple[Path, nn.Module]:
    """The packaged MNIST network as ONNX, by hand."""
    pytest.importorskip("onnx2torch")
    model = packaged.mnist_cnn()
    layers: Any = model.layers
    constants = {f"{i}.{kind}": getattr(layers[i], kind) for i in (0, 2, 5, 7) for kind in ("weight", "bias")}
    nodes = [
        node("Conv", ["x", "0.weight", "0.bias"], "a", strides=[2, 2], pads=[2, 2, 2, 2]),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "2.weight", "2.bias"], "c", strides=[2, 2], pads=[2, 2, 2, 2]),
        node("Relu", ["c"], "d"),
        node("Flatten", ["d"], "e"),
        node("Gemm", ["e", "5.weight", "5.bias"], "f", transB=1),
        node("Relu", ["f"], "g"),
    ]
    if matmul:
        constants["7.weight"] = constants["7.weight"].T.contiguous()
        nodes += [node("MatMul", ["g", "7.weight"], "h"), node("Add", ["h", "7.bias"], "i")]
    else:
        nodes += [node("Gemm", ["g", "7.weight", "7.bias"], "i", transB=1)]
    return graph(file, [*nodes, *more], constants, **options), model


@pytest.mark.parametrize("matmul", [False, True])
def test_an_onnx_file_is_evaluated_attacked_and_trained(matmul: bool, place: Path) -> None:
    _, model = small_cnn(place / "net.onnx", matmul=matmul)
    found = models.load("net.onnx")
    x = packaged.mnist().x[:20]
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(broken(found, x), broken(model, x))
    assert evaluated("net.onnx", "mnist") == evaluated("mnist-cnn", "mnist", out="other")
    before = models.architecture("net.onnx", 10)()
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in model.parameters())
    after = trained("net.onnx", "mnist")
    moved = [name for name, p in before.named_parameters() if not torch.equal(p, after[name])]
    assert len(moved) == len(list(before.parameters())) == 8
    again = models.load("net.onnx@run/last.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())


def test_what_is_no_classifier_in_onnx_is_refused(place: Path) -> None:
    (place / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.onnx is not an ONNX model, or a damaged one"):
        models.load("a.onnx")
    small_cnn(place / "b.onnx", node("ArgMax", ["i"], "j", axis=1))
    with pytest.raises(ValueError, match=r"b\.onnx returns \(2, 1\) for two|no gradient flows .*ArgMax"):
        models.load("b.onnx")
    small_cnn(place / "c.onnx", node("Round", ["i"], "j"))
    with pytest.raises(
        ValueError, match=r"no gradient flows from the output of c\.onnx to its images \(it has Round\)"
    ):
        models.load("c.onnx")
    small_cnn(place / "d.onnx", node("Det", ["i"], "j"))
    with pytest.raises(ValueError, match=r"d\.onnx cannot be converted to PyTorch by onnx2torch: .*Det"):
        models.load("d.onnx")
    small_cnn(place / "e.onnx", node("Relu", ["i"], "j"), outputs=2)
    with pytest.raises(ValueError, match=r"e\.onnx has 1 inputs and 2 outputs; export it"):
        models.load("e.onnx")
    shape = torch.tensor([1, 10])
    path, _ = small_cnn(place / "f.onnx")
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(path)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(shape.numpy(), "shape"))
    proto.graph.node.append(node("Reshape", ["i", "shape"], "j"))
    proto.graph.output[0].name = "j"
    onnx.save(proto, path)
    with pytest.raises(
        ValueError, match=r"f\.onnx fails for two images of shape \(1, 28, 28\); export it with a dynamic"
    ):
        models.load("f.onnx")
    with pytest.raises(FileNotFoundError, match=r"g\.onnx is not there"):
        models.load("g.onnx")


# --- torch.export


def exported(file: Path, model: nn.Module, x: Tensor, *, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), file)
    return file


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_program_is_evaluated_attacked_and_trained(place: Path) -> None:
    model, x = packaged.mnist_cnn(), packaged.mnist().x[:20]
    exported(place / "net.pt2", model, x[:2])
    found = models.load("net.pt2")
    torch.testing.assert_close(found(x), model(x))
    assert torch.equal(broken(found, x), broken(model, x))
    assert evaluated("net.pt2", "mnist") == evaluated("mnist-cnn", "mnist", out="other")
    before = models.architecture("net.pt2", 10)()
    after = trained("net.pt2", "mnist")
    assert all(not torch.equal(p, after[name]) for name, p in before.named_parameters())
    exported(place / "one.pt2", model, x[:1], dynamic=False)
    with pytest.raises(ValueError, match=r"one\.pt2 fails for two images of shape \(1, 28, 28\); export it with a dyn"):
        models.load("one.pt2")
    (place / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.pt2 is not a program of torch\.export"):
        models.load("bad.pt2")


def test_a_program_needs_trust(place: Path) -> None:
    assert code.runs_code("net.pt2")
    assert code.runs_code("net.pt2@weights.pt")
    assert not any(map(code.runs_code, ("net.onnx", "hf:google/vit", "hf:folder@a.pt", "net.onnx@a.safetensors")))
    (place / "spec.yaml").write_text("models: net.pt2\ndata: mnist\nattacks: fgsm\neps: 0.1\n")
    refused = invoke("evaluate", "spec.yaml", "--dry-run")
    assert refused.exit_code == 2
    assert "names 'net.pt2', which runs code; add --trust-code" in refused.stderr


# --- weights


SUFFIXES = [".pt", ".pth", ".bin", ".ckpt", ".safetensors"]
WRAPPED: dict[str, Any] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "parallel": lambda state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_state_dicts_however_they_are_wrapped(suffix: str, wrapped: str, place: Path) -> None:
    state = packaged.mnist_cnn().state_dict()
    given = WRAPPED[wrapped](state)
    if suffix == ".safetensors":
        if not all(isinstance(value, Tensor) for value in given.values()):
            pytest.skip("holds tensors alone")
        save_file(given, place / "a.safetensors")
    else:
        torch.save(given, place / f"a{suffix}")
    found = models.load(f"small-cnn@a{suffix}").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_state_dict_is_evaluated_attacked_and_trained(place: Path) -> None:
    torch.save(packaged.mnist_cnn().state_dict(), "net.pt")
    assert evaluated("small-cnn@net.pt", "mnist") == evaluated("mnist-cnn", "mnist", out="other")
    assert broken(models.load("small-cnn@net.pt"), packaged.mnist().x[:20]).any()
    after, start = trained("small-cnn@net.pt", "mnist"), packaged.mnist_cnn().state_dict()
    random = SmallCNN().state_dict()
    assert all(not torch.equal(after[name], start[name]) for name in start)
    assert all((after[name] - start[name]).norm() < (after[name] - random[name]).norm() / 3 for name in start)


def test_weights_alone_name_no_network(place: Path) -> None:
    torch.save({}, "net.pt")
    for read in (models.finder, lambda spec: models.architecture(spec, 10)):
        with pytest.raises(ValueError, match=r"net\.pt holds weights without a network; name both, as in resnet18@net"):
            read("net.pt")


def test_no_pickle_runs(place: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(place / "ran"), "w"))

    torch.save({"state_dict": Evil()}, "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt is not a PyTorch file of tensors alone"):
        models.load("small-cnn@net.pt")
    assert not Path("ran").exists()


def test_prefixes_stop_at_the_names_wanted() -> None:
    given = {"module.model.a": torch.ones(1), "module.model.b": torch.ones(1)}
    assert set(weights.bare(given, ["model.a", "model.b"])) == {"model.a", "model.b"}
    assert set(weights.bare(given, ["a", "b"])) == {"a", "b"}
    assert set(weights.bare(given, ["c"])) == {"a", "b"}
    assert weights.bare({}, ["c"]) == {}


# --- Hugging Face


def test_a_vit_is_evaluated_attacked_and_trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tiny_vit import folder, normalised, vit

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder(place / "vit", classes=10)
    x = packaged.cifar10().x
    labels = vit()(pixel_values=normalised(x)).logits.argmax(1)
    np.savez("own.npz", x=x.numpy(), y=labels.numpy())
    found = models.load("hf:vit")
    torch.testing.assert_close(found(x[:8]), vit()(pixel_values=normalised(x[:8])).logits)
    assert broken(found, x[:20]).any()
    clean, robust = evaluated("hf:vit", "own.npz", eps="8/255")
    assert clean == 100
    assert robust < 100
    before = models.architecture("hf:vit", 10)()
    after = trained("hf:vit", "own.npz")
    moved = [name for name, p in before.named_parameters() if not torch.equal(p, after[name])]
    assert len(moved) > 0.9 * len(list(before.parameters()))
    again = models.load("hf:vit@run/last.safetensors")
    torch.testing.assert_close(again.state_dict(), after, rtol=0, atol=0)
    assert evaluated("hf:vit@run/last.safetensors", "own.npz", out="other", eps="8/255")
    plain = {name.removeprefix("model."): value for name, value in after.items()}
    torch.save(plain, "plain.bin")
    torch.testing.assert_close(models.load("hf:vit@plain.bin").state_dict(), after, rtol=0, atol=0)
    assert models.architecture("hf:vit", 4)()(x[:2]).shape == (2, 4)


def test_gradients_of_a_vit_are_exact(place: Path) -> None:
    """ENGM's norms through attention, layer by layer, are those of one backward per example."""
    pytest.importorskip("transformers")
    from tiny_vit import folder

    folder(place / "vit")
    model = models.architecture("hf:vit", 10)().double()
    images = packaged.cifar10()
    losses = nn.functional.cross_entropy(model(images.x[:5].double()), images.y[:5], reduction="none")
    each = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = torch.stack([torch.stack([g.square().sum() for g in one]).sum().sqrt() for one in each])
    found = ENGM(model, alpha=0.5).backward(losses).norms
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_is_no_checkpoint_keeps_the_librarys_message(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (place / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="empty"):
        models.load("hf:empty")
    with pytest.raises(FileNotFoundError, match="hf:nobody/nothing is neither a folder, nor in the local cache, nor"):
        models.load("hf:nobody/nothing")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    import sys

    (place / "a.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'a\.onnx needs onnx2torch: pip install "firstorder-attacks\[onnx\]"'
    ):
        formats.onnx(Path("a.onnx"))
