"""Batch norm that a graph has as a function, as a module again: it keeps statistics, in train mode as the original
did. torch.export writes it so, and symbolic tracing where a model calls the function in a forward of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

_NAMES = ("weight", "bias", "running_mean", "running_var")


class RunningNorm(nn.Module):
    """`aten.batch_norm` over the tensors of `path`, which keep their names and identities."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, path: str, tensors: Mapping[str, Tensor], momentum: float | None, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        for name in (*_NAMES, "num_batches_tracked"):
            tensor = tensors.get(f"{path}.{name}")
            if isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, momentum or 0.0, self.eps)


def norm_of(
    node: fx.Node, name: Callable[[Any], str], tensors: Mapping[str, Tensor]
) -> tuple[str, float, float] | None:
    """(path, momentum, eps) if an `aten.batch_norm` in eval mode works on the tensors of one module that counts
    its batches; else None. name: operand -> parameter name."""
    return _module_of(node.args[:8], name, tensors)


def norms_as_modules(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Put modules in the place of `F.batch_norm` in eval mode, where all its tensors are those of one module."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    signature = inspect.signature(F.batch_norm)
    # the operands of `aten.batch_norm`, in its order
    order = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    calls = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
    for node in calls:
        bound = signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        found = _module_of([bound.arguments[key] for key in order], _attribute, tensors)
        if found is None:
            continue
        path, momentum, eps = found
        norm = RunningNorm(path, tensors, momentum, eps)
        for name, child in graph_module.get_submodule(path).named_children():  # what ran after it in that forward
            norm.add_module(name, child)
        graph_module.set_submodule(path, norm)
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_module(path, (bound.arguments["input"],))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
    if calls:
        graph_module.graph.eliminate_dead_code(lambda n: n.op != "get_attr")
        graph_module.recompile()


def _attribute(value: Any) -> str:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else ""


def _module_of(
    values: Sequence[Any], name: Callable[[Any], str], tensors: Mapping[str, Tensor]
) -> tuple[str, float, float] | None:
    _, *operands, training, momentum, eps = values
    path = name(operands[2]).rpartition(".")[0]
    expected = [f"{path}.{n}" if f"{path}.{n}" in tensors else "" for n in _NAMES]
    counts = f"{path}.num_batches_tracked" in tensors
    if not path or training or not counts or [name(o) for o in operands] != expected:
        return None
    return path, momentum, eps  # type: ignore[return-value]
