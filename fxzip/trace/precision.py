"""A graph in float64: its tensors, and the dtypes written in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .state import empty

_COMPLEX = {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_METHODS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble", "chalf": "cdouble"}


def doubled(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph_module` that computes in float64 throughout, even where its code asks for less.

    >>> from torch import nn, ones; gm = fx.symbolic_trace(nn.Linear(2, 1))
    >>> doubled(gm)(ones(1, 2, dtype=torch.float64)).dtype, gm.weight.dtype
    (torch.float64, torch.float32)
    """
    module = copy.deepcopy(graph_module).double()
    module._apply(lambda t: t.to(_COMPLEX.get(t.dtype, t.dtype)))
    for node in module.graph.nodes:
        node.args, node.kwargs = _renamed(node.args), _renamed(node.kwargs)
        if node.op == "call_method":
            node.target = _METHODS.get(str(node.target), node.target)
    module.recompile()
    return module


@contextmanager
def in_double(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """`doubled`, in evaluation, whose tensors are freed afterwards: a GraphModule and its graph hold each other, so
    that twice the model's memory would stay until Python's next collection of cycles."""
    module = doubled(graph_module).eval()
    try:
        yield module
    finally:
        empty(module)


@contextmanager
def double_by_default() -> Iterator[None]:
    """torch.float64 for tensors made without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _renamed(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else _COMPLEX.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(v) for v in value)
    return {k: _renamed(v) for k, v in value.items()} if isinstance(value, dict) else value
