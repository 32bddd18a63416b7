"""Lists that Python functions in a graph may write to."""

from __future__ import annotations

import inspect

from torch import fx
from torch.fx.immutable_collections import immutable_list


def fresh_lists(graph: fx.Graph) -> None:
    """A list that is an argument of a Python function (one of those that `torch.fx.wrap` keeps whole) is made by a node
    of its own, at every run: `torch.export` interprets a graph, and what stands in a node cannot be written to, as
    torchvision's 3d Swin transformers do.

    >>> graph = fx.Graph(); x = graph.placeholder("x")
    >>> node = graph.call_function(inspect.unwrap, ([x],)); fresh_lists(graph); node.args
    (list_1,)
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not inspect.isfunction(node.target) or _of_torch(node.target.__module__):
            continue
        with graph.inserting_before(node):
            node.args = tuple(_made(graph, node, a) for a in node.args)
            node.kwargs = {k: _made(graph, node, v) for k, v in node.kwargs.items()}


def _of_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def _made(graph: fx.Graph, reader: fx.Node, value: object) -> object:
    if not isinstance(value, immutable_list):
        return value
    node = graph.call_function(list, (tuple(_made(graph, reader, v) for v in value),))  # type: ignore[arg-type]
    node.meta |= {k: reader.meta[k] for k in ("line", "stack_trace", "nn_module_stack") if k in reader.meta}
    return node
