"""Outputs of several models as one: side by side, or their mean."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ..errors import InputError

HEADS = ("separate", "concat", "average")


def same_outputs(graph_modules: Sequence[fx.GraphModule], names: Sequence[str], args: tuple, heads: str) -> None:
    """Raises InputError unless outputs have one shape, or for "concat" one shape but for axis 1."""
    with torch.no_grad():
        shapes = [
            [list(t.shape) for t in tree_leaves(g(*args)) if isinstance(t, Tensor)] for g in graph_modules
        ]
    seen = ", ".join(f"{n}: {s}" for n, s in zip(names, shapes, strict=True))
    if heads == "concat":
        shapes = [[s[:1] + s[2:] if len(s) > 1 else None for s in of] for of in shapes]
        if any(s != shapes[0] or None in s for s in shapes):
            raise InputError(
                f'heads="concat" needs outputs that differ along axis 1 alone, got {seen}; use heads="separate"'
            )
    elif any(s != shapes[0] for s in shapes):
        raise InputError(f'heads="average" needs outputs of one shape, got {seen}; use heads="separate"')


def joined(graph: fx.Graph, outputs: Sequence[Any], heads: str, shares: Sequence[float]) -> Any:
    """Every tensor of the output structure side by side over models, or its mean: `extract` knows these forms."""
    leaves: list[list[fx.Node]] = []
    for output in outputs:
        leaves.append([])
        map_arg(output, lambda n, into=leaves[-1]: into.append(n) or n)
    made = []
    for group in zip(*leaves, strict=True):
        if heads == "concat":
            made.append(graph.call_function(torch.cat, (list(group), 1)))
        elif not shares:
            made.append(graph.call_method("mean", (graph.call_function(torch.stack, (list(group),)), 0)))
        else:
            parts = [graph.call_function(operator.mul, (n, s)) for n, s in zip(group, shares, strict=True)]
            made.append(graph.call_method("sum", (graph.call_function(torch.stack, (parts,)), 0)))
    rest = iter(made)
    return map_arg(outputs[0], lambda _: next(rest))


def own_output(joined: fx.Node, place: int) -> fx.Node:
    """What model `place` adds to a node of `joined`."""
    if joined.target is torch.cat:
        return cast(Any, joined.args[0])[place]
    found = cast(Any, joined.args[0]).args[0][place]
    return found.args[0] if joined.target == "sum" else found
