"""Outputs of several models as one: side by side, or their mean."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError
from ..trace import watched
from ..trace.guards import kept_rng
from .absorb import numbers

HEADS = ("separate", "concat", "joint", "average")


def same_outputs(
    graph_modules: Sequence[fx.GraphModule], names: Sequence[str], args: tuple, heads: str
) -> list[list[Tensor]]:
    """The output tensors of every model on `args`, which are not modified.

    Raises InputError unless they are tensors of one shape, or for "concat" and "joint" of one shape but for axis 1; for
    "average" numbers that have a mean; for "joint" logits, one tensor per model."""
    found = [_outputs(g, args) for g in graph_modules]
    odd = {f"%{n}": type(v).__name__ for of in found for n, v in of if not isinstance(v, Tensor)}
    if odd:
        kinds = ", ".join(f"{n} is of type {kind}" for n, kind in odd.items())
        raise InputError(
            f'heads="{heads}" needs outputs that are tensors one by one, but {kinds}; return the tensors in it (a[0], '
            'a[1]), or use heads="separate"'
        )
    tensors = [[(n, v) for n, v in of if isinstance(v, Tensor)] for of in found]
    if heads == "average":
        whole = {f"%{n}": v.dtype for of in tensors for n, v in of if not numbers(v)}
        if whole:
            kinds = ", ".join(f"{n} is {str(dtype).removeprefix('torch.')}" for n, dtype in whole.items())
            raise InputError(
                f'heads="average" cannot average indices or truth values, and of the outputs {kinds}; return scores '
                'instead (forward_fn= may choose what comes out), or use heads="separate"'
            )
    if heads == "joint" and any(len(of) != 1 or not of[0][1].is_floating_point() for of in tensors):
        kinds = ", ".join(
            f"{n}: {', '.join(str(v.dtype).removeprefix('torch.') for _, v in of)}"
            for n, of in zip(names, tensors, strict=True)
        )
        raise InputError(
            f'heads="joint" compares logits, one tensor of real numbers per model, got {kinds}; return these alone'
            ' (forward_fn= may choose what comes out), or use heads="separate"'
        )
    shapes: list[list[Any]] = [[list(v.shape) for _, v in of] for of in tensors]
    seen = ", ".join(f"{n}: {s}" for n, s in zip(names, shapes, strict=True))
    if heads in ("concat", "joint"):
        shapes = [[s[:1] + s[2:] if len(s) > 1 else None for s in of] for of in shapes]
        if any(s != shapes[0] or None in s for s in shapes):
            raise InputError(
                f'heads="{heads}" needs outputs that differ along axis 1 alone, got {seen}; use heads="separate"'
            )
    elif any(s != shapes[0] for s in shapes):
        raise InputError(f'heads="average" needs outputs of one shape, got {seen}; use heads="separate"')
    return [[v for _, v in of] for of in tensors]


def _outputs(graph_module: fx.GraphModule, args: tuple) -> list[tuple[str, Any]]:
    """The nodes that a graph returns, by name, with their values on `args`, in the order of its output."""
    values: dict[fx.Node, Any] = {}
    nodes: list[fx.Node] = []
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    map_arg(output.args[0], lambda n: nodes.append(n) or n)

    def see(node: fx.Node, value: Any) -> None:
        if node in nodes:
            values[node] = value

    fresh = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    with kept_rng(t for t in tree_leaves(args) if isinstance(t, Tensor)):
        watched(graph_module, fresh, see)
    return [(n.name, values[n]) for n in nodes]


def joined(
    graph: fx.Graph, outputs: Sequence[Any], heads: str, shares: Sequence[float], comparable: Sequence[str] = ()
) -> Any:
    """Every tensor of the output structure side by side over models, or its mean: `extract` knows these forms.

    comparable: the target of a `Comparable` per model, for "joint"."""
    leaves: list[list[fx.Node]] = []
    for output in outputs:
        leaves.append([])
        map_arg(output, lambda n, into=leaves[-1]: into.append(n) or n)
    made = []
    for group in zip(*leaves, strict=True):
        if heads == "joint":
            group = [graph.call_module(t, (n,)) for t, n in zip(comparable, group, strict=True)]
        if heads in ("concat", "joint"):
            made.append(graph.call_function(torch.cat, (list(group), 1)))
        elif not shares:
            made.append(graph.call_method("mean", (graph.call_function(torch.stack, (list(group),)), 0)))
        else:
            parts = [graph.call_function(operator.mul, (n, s)) for n, s in zip(group, shares, strict=True)]
            made.append(graph.call_method("sum", (graph.call_function(torch.stack, (parts,)), 0)))
    rest = iter(made)
    return map_arg(outputs[0], lambda _: next(rest))


def own_output(joined: fx.Node, place: int, heads: str) -> fx.Node:
    """What model `place` adds to a node of `joined`."""
    if joined.target is torch.cat:
        found = cast(Any, joined.args[0])[place]
        return found.args[0] if heads == "joint" else found
    found = cast(Any, joined.args[0]).args[0][place]
    return found.args[0] if joined.target == "sum" else found
