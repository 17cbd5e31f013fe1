"""Models in other stacks' formats: ONNX files, torch.export programs, Hugging Face's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from firstorder.attacks.distribution import pip_install

LOSSY = ("ArgMax", "Cast", "Ceil", "DequantizeLinear", "Floor", "QuantizeLinear", "Round", "Sign")
"""Operations of ONNX that have no gradient, or one of zero."""

TEMPLATE = "export it with a dynamic batch, for images (N, C, H, W) in [0, 1] and logits (N, K)"


def onnx(file: Path) -> nn.Module:
    """The network in an ONNX file, converted by onnx2torch; its weights are parameters, so it can be trained on.

    Raises:
        ModuleNotFoundError: onnx2torch is not installed.
        ValueError: not an ONNX file; operations that are not converted; not a classifier of batches of images, or one
            through which no gradient flows.
    """
    try:
        import onnx as library
        from onnx2torch import convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file} needs onnx2torch: {pip_install('onnx')}", name=error.name) from None
    try:
        proto = library.load(str(file))
        library.checker.check_model(proto)
    except Exception as error:  # protobuf and the checker fail in any way
        raise ValueError(f"{file} is not an ONNX model, or a damaged one: {_line(error)}") from None
    constants = {one.name for one in proto.graph.initializer}
    given = [one for one in proto.graph.input if one.name not in constants]
    if (len(given), len(proto.graph.output)) != (1, 1):
        raise ValueError(
            f"{file} has {len(given)} inputs and {len(proto.graph.output)} outputs; {TEMPLATE}, one of each"
        )
    try:
        network: nn.Module = convert(proto)
    except Exception as error:  # of operations, versions and attributes that are not known
        raise ValueError(f"{file} cannot be converted to PyTorch by onnx2torch: {_line(error)}") from None
    shape = [axis.dim_value if axis.HasField("dim_value") else None for axis in given[0].type.tensor_type.shape.dim]
    _weights(network)
    lossy = sorted({node.op_type for node in proto.graph.node if node.op_type in LOSSY})
    _probed(network, file, shape, f" (it has {', '.join(lossy)})" if lossy else "")
    return network


def program(file: Path) -> nn.Module:
    """The network in a program that torch.export saved, in the mode that it was exported in.

    Reading such a file can run code: torch evaluates expressions in it, and may unpickle.

    Raises:
        ValueError: no such program; not a classifier of batches of images, or one through which no gradient flows.
    """
    try:
        found = torch.export.load(file)
        module: Any = found.module()
    except Exception as error:  # of another version, damaged
        raise ValueError(f"{file} is not a program of torch.export, or a damaged one: {_line(error)}") from None
    network = fx.GraphModule(module, module.graph)  # one that has modes, as modules have
    given = found.example_inputs
    if given is not None and (len(given[0]) != 1 or given[1] or not isinstance(given[0][0], Tensor)):
        raise ValueError(f"{file} takes {len(given[0]) + len(given[1])} inputs; {TEMPLATE}, one of each")
    if given is not None:
        _probed(network, file, [None, *given[0][0].shape[1:]], "")
    return network


def hugging_face(name: str, classes: int | None = None) -> nn.Module:
    """The image classifier of transformers in a folder, the local cache or on the hub; see
    `firstorder.transformers.classifier`.

    Raises:
        FileNotFoundError: it is neither here nor could it be downloaded; with the library's own message.
        ValueError: a checkpoint that needs code of its own, or is of no image classifier.
    """
    from firstorder.transformers import classifier

    try:
        return classifier(name, classes=classes)
    except OSError as error:
        raise FileNotFoundError(
            f"hf:{name} is neither a folder, nor in the local cache, nor could it be downloaded: {_line(error)}"
        ) from error


FILES: dict[str, Callable[[Path], nn.Module]] = {".onnx": onnx, ".pt2": program}
"""Formats that hold a network with its weights, by the file's ending."""


def _weights(network: nn.Module) -> None:
    """Make the weights that onnx2torch keeps as constants parameters: matrices that are multiplied by, and vectors."""
    graph: Any = network
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, name = str(node.target).rpartition(".")
        parent = network.get_submodule(owner)
        value = parent._buffers.get(name)
        if value is None or not value.is_floating_point() or value.numel() < 2:
            continue
        users = {
            type(network.get_submodule(str(user.target))).__name__ for user in node.users if user.op == "call_module"
        }
        if value.ndim == 1 or (value.ndim > 1 and users & {"OnnxMatMul", "OnnxGemm"}):
            del parent._buffers[name]
            parent.register_parameter(name, nn.Parameter(value.clone()))


def _probed(network: nn.Module, file: Path, shape: list[int | None], why: str) -> None:
    """Two forwards' worth of random images, and the gradient of their logits by them.

    Raises:
        ValueError: they fail, or there is no gradient.
    """
    if len(shape) != 4:
        raise ValueError(f"{file} takes an input of {len(shape)} dimensions; {TEMPLATE}")
    sides = shape[1:]
    if any(not side for side in sides):
        return  # any size: what it is made for cannot be known
    source = torch.Generator().manual_seed(0)
    x = torch.rand(2, *[int(side or 1) for side in sides], generator=source).requires_grad_()
    modes = [(part, part.training) for part in network.modules()]
    try:
        with torch.enable_grad():
            logits = network.eval()(x)
    except Exception as error:  # of shapes that are written into the graph
        raise ValueError(
            f"{file} fails for two images of shape {tuple(x.shape[1:])}; {TEMPLATE}: {_line(error)}"
        ) from None
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{file} returns {found} for two images; {TEMPLATE}")
    gradient: Tensor | None = None
    if logits.requires_grad:
        weights = torch.randn(logits.shape, generator=source)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), x, allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        raise ValueError(
            f"no gradient flows from the output of {file} to its images{why}, so first-order attacks would say nothing "
            "about it; export the network in floating point, up to its logits"
        )


def _line(error: BaseException) -> str:
    """A message in one line, cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:296]} ..."
