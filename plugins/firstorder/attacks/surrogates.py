"""Surrogates: copies of a module that give the same logits and another gradient, of which examples transfer better.

    from firstorder.attacks import MIFGSM, surrogates
    adversarial = MIFGSM(eps=16 / 255, steps=10)(surrogates.sgm(model, gamma=0.5), x, y)

They are functions from a module to a module, outside of the attacks: any attack takes what they return. The module's
forward is followed by torch.fx, in which functions count like modules; what cannot be followed, or has nothing to
change, is refused. A surrogate is in evaluation mode and has frozen weights: it is for gradients by the input alone.
"""

from __future__ import annotations

from torch import fx, nn

from firstorder.attacks import backward, validation
from firstorder.attacks.residual import Block, blocks, call, is_rectifier, traced, used, within

__all__ = ["linbp", "sgm"]


def sgm(model: nn.Module, *, gamma: float = 0.2) -> nn.Module:
    """Skip gradients: what comes back through a residual branch counts `gamma` times (Wu et al. 2020).

    For z_{i+1} = z_i + f_i(z_i) the gradient is that of the loss by z_L times the product of all (1 + gamma f_i'(z_i)).
    Every residual block counts, also one whose skip connection is a projection, which keeps its gradient; the authors'
    code leaves out first blocks of stages, and divides the gradient between blocks by one number, which changes no
    direction.

    Args:
        model: with residual blocks, from images to logits; it is not changed.
        gamma: in (0, 1]; 1 changes nothing. The authors take 0.2 for ResNets and 0.5 for DenseNets (whose connections
            are no sums, and are refused here).

    Returns:
        The surrogate; its logits are the model's.

    Raises:
        ValueError: gamma out of range; a module that cannot be followed, without residual blocks, or with one inside
            another's branch.
    """
    validation.number("gamma", gamma, low=0, high=1, above=True)
    graph = traced(model)
    found = _found(model, graph)
    for block in found:
        with graph.graph.inserting_after(block.branch):
            lessened = call(graph, backward.scaled_gradient, block.branch, float(gamma))
        block.addition.replace_input_with(block.branch, lessened)
    return _made(graph)


def linbp(model: nn.Module, *, start: str | None = None) -> nn.Module:
    """Linear backpropagation: from a layer on gradients pass ReLUs as if there were none (Guo et al. 2020).

    In a residual block those of the branch do so, the one after the sum does not; the branch's gradient by the
    block's input then gets, for each example, the length that it has with the ReLUs in place, as in the authors' code.
    ReLUs outside of residual blocks, as in VGG, pass gradients as they are.

    Args:
        model: with ReLUs, from images to logits; it is not changed.
        start: the name of the module to begin with, as in `model.named_modules()`: a residual block ("layer3.1", the
            paper's of ResNet-50) or, outside of blocks, any layer. By default the block with half of the blocks before
            it, which that is.

    Returns:
        The surrogate; its logits are the model's.

    Raises:
        ValueError: a module that cannot be followed, or without a ReLU from `start` on; a `start` that is no part of
            the model, or inside a block; a branch that takes more than its block's input.
    """
    graph = traced(model)
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    if start is None:
        found = _found(model, graph, "; name the layer to begin with, start=")
        first = order[found[len(found) // 2].inside[0]]
    else:
        found = blocks(graph)
        first = _place(model, graph, start)
    chosen = [block for block in found if order[block.inside[0]] >= first]
    for block in found:
        if order[block.inside[0]] < first <= order[block.branch]:
            raise ValueError(f"start={start!r} is inside the residual block {block.name!r}; begin with the block")
    done: set[fx.Node] = {node for block in found for node in (*block.inside, *block.addition.users)}
    changed = 0
    for block in chosen:
        changed += _linear_branch(graph, block, [node for node in block.inside if is_rectifier(node, graph)])
    for node in list(graph.graph.nodes):
        if node in order and node not in done and order[node] >= first and is_rectifier(node, graph):
            _replace(graph, node, None)
            changed += 1
    if not changed:
        raise ValueError(
            f"{type(model).__name__} has no ReLU from {repr(start) if start else 'its middle block'} on whose gradient "
            f"could be passed on; its parts are {_kinds(graph)}"
        )
    return _made(graph)


def _linear_branch(graph: fx.GraphModule, block: Block, rectifiers: list[fx.Node]) -> int:
    """Let gradients pass the ReLUs of a branch; how many it has."""
    if not rectifiers:
        return 0
    inside, live = set(block.inside), used(graph)
    for node in block.inside:
        others = [before for before in node.all_input_nodes if before not in inside and before is not block.start]
        leaves = [user for user in node.users if user in live - inside and user is not block.addition]
        if leaves or any(before.op != "get_attr" for before in others):
            raise ValueError(
                f"the branch of the residual block {block.name!r} exchanges {(leaves or others)[0].name} with what is "
                "outside of it; only a function of the block's input can be passed linearly"
            )
    with graph.graph.inserting_before(block.inside[0]):
        record = call(graph, backward.branch, block.start)
        begin = call(graph, backward.point, record)
    for node in block.inside:
        node.replace_input_with(block.start, begin)
    end = block.branch
    for node in rectifiers:
        new = _replace(graph, node, record)
        end = new if node is end else end
    with graph.graph.inserting_after(end):
        out = call(graph, backward.normalised, block.start, end, record)
    block.addition.replace_input_with(end, out)
    return len(rectifiers)


def _replace(graph: fx.GraphModule, node: fx.Node, record: fx.Node | None) -> fx.Node:
    """A ReLU that passes gradients in the place of a usual one."""
    with graph.graph.inserting_after(node):
        new = call(graph, backward.linear_relu, node.args[0] if node.args else node.kwargs["input"], record)
    new.meta.update({key: value for key, value in node.meta.items() if key == "nn_module_stack"})
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def _found(model: nn.Module, graph: fx.GraphModule, remedy: str = "") -> list[Block]:
    """The residual blocks.

    Raises:
        ValueError: there are none.
    """
    found = blocks(graph)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no residual block, a sum of a branch with layers and a skip connection that "
            f"leads back to where it begins; its parts are {_kinds(graph)}{remedy}"
        )
    return found


def _place(model: nn.Module, graph: fx.GraphModule, start: str) -> int:
    """Where in the graph the module called `start` begins."""
    for place, node in enumerate(graph.graph.nodes):
        if within(node, start):
            return place
    names = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"start={start!r} is no module that {type(model).__name__} runs; name one of its named_modules(), which begin "
        f"with {names}"
    )


def _kinds(graph: fx.GraphModule) -> str:
    """The classes of the layers and the functions that a graph calls."""
    found: dict[str, None] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            found[type(graph.get_submodule(str(node.target))).__name__] = None
        elif node.op in ("call_function", "call_method"):
            found[getattr(node.target, "__name__", str(node.target))] = None
    return ", ".join(found) or "none"


def _made(graph: fx.GraphModule) -> nn.Module:
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph
