"""Running a graph node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class Interpreter(fx.Interpreter):
    """Passes arguments as generated code does: a list that the function may write to is not the graph's own, which
    refuses that (torchvision's 3d Swin transformers do so)."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_thawed(a) for a in args), {k: _thawed(v) for k, v in kwargs.items()}


def watched(graph_module: fx.GraphModule, args: tuple, see: Callable[[fx.Node, Any], None]) -> Any:
    """What the graph returns on `args`, without gradients; `see` gets every node and its value once it is known.

    >>> names = []
    >>> net = fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
    >>> watched(net, (torch.tensor([-1.0]),), lambda node, value: names.append((node.name, value.item())))
    tensor([0.])
    >>> names
    [('input_1', -1.0), ('_0', 0.0), ('output', 0.0)]
    """

    class Watched(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            see(n, value)
            return value

    with torch.no_grad():
        return Watched(graph_module).run(*args)


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, list) else value
