"""Run a lowered graph with other parameter values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import InputError
from .kernels import kernel
from .lower import Lowered

Sink = Callable[[fx.Node, Tensor], None]

aten = torch.ops.aten
# Operators that may write over a value that nobody reads again; most of what a fresh result costs is its new pages.
_IN_PLACE: dict[Any, Any] = {aten.relu.default: aten.relu_.default, aten.add.Tensor: aten.add_.Tensor}
# Operators whose result is memory of its own, never a view of an operand or the operand itself.
_OWN = frozenset(
    {aten.convolution.default, aten.native_batch_norm.default, aten.linear.default, aten.addmm.default, *_IN_PLACE}
)


@torch.no_grad()
def run(
    lowered: Lowered,
    state: Mapping[str, Tensor],
    args: tuple,
    *,
    sink: Sink | None = None,
    wanted: Collection[fx.Node] = (),
    stop_early: bool = True,
) -> Any:
    """Execute `lowered` with parameters and buffers from `state` on `args`.

    state: tensors by name; a tied tensor under any one of its names. All on one device, which may differ from
        the one lowered on, and of one floating dtype: constants and explicit dtypes follow (float64 runs in
        float64 throughout). Shapes may differ where the operators allow it.
    args: as given to `lower`, of the same shapes.
    sink: called as sink(node, value) for every node of `wanted`, in graph order.
    stop_early: compute only what `wanted` needs, and return None (only if `wanted` is not empty).

    Returns the model's outputs. Raises InputError if `state` or `args` lack a tensor.

    >>> from torch import nn; from fxzip.trace import lower, state_of
    >>> gm = fx.symbolic_trace(nn.Linear(3, 2).eval()); x = torch.ones(1, 3)
    >>> torch.equal(run(lower(gm, (x,)), state_of(gm), (x,)), gm(x))
    True
    """
    only_wanted = bool(wanted) and stop_early
    outputs = [x for x in tree_flatten(lowered.outputs)[0] if isinstance(x, fx.Node)]
    kept = frozenset(() if only_wanted else outputs)
    wanted = frozenset(wanted)
    order = _needed(lowered.graph, kept | wanted)
    move = _move(lowered, state)
    values = _bind(lowered, order, state, args, move)
    last_use = {x: node for node in order for x in (node, *_operands(node))}
    for node in order:
        if node not in values:
            values[node] = move(node.meta["const"]) if _fixed(node) else _call(node, values, move, wanted | kept)
        if sink is not None and node in wanted:
            sink(node, values[node])
        for x in {node, *_operands(node)}:
            if last_use[x] is node and x not in kept:
                del values[x]
    if only_wanted:
        return None
    return tree_map(lambda x: values[x] if isinstance(x, fx.Node) else x, lowered.outputs)


def _fixed(node: fx.Node) -> bool:
    """A constant that needs nothing from this run, not even a shape or an index table."""
    return bool(node.meta.get("fixed"))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [] if _fixed(node) else node.all_input_nodes


def _needed(graph: fx.Graph, roots: Collection[fx.Node]) -> list[fx.Node]:
    """What `roots` are computed from, in graph order, stopping at fixed constants."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(_operands(node))
    return [node for node in graph.nodes if node in seen]


def _call(
    node: fx.Node, values: Mapping[fx.Node, Any], move: Callable[[Any], Any], kept: Collection[fx.Node]
) -> Any:
    def argument(x: Any) -> Any:
        return values[x] if isinstance(x, fx.Node) else move(x)

    target = overwriting(node, values.__getitem__)
    if target is not node.target and node.args[0] in kept:
        target = node.target
    return kernel(node, target)(*map_aggregate(node.args, argument), **map_aggregate(node.kwargs, argument))


def overwriting(node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    """The operator of `node`, in place if the result may take the place of the first operand, which nobody wants any
    more: only `node` reads it, nothing shares its memory, and it has the shape and dtype of the result."""
    if node.target not in _IN_PLACE or not isinstance(x := node.args[0], fx.Node):
        return node.target
    made = x.args[0] if x.target is operator.getitem else x
    if not isinstance(made, fx.Node) or made.target not in _OWN or "const" in x.meta or len(x.users) > 1:
        return node.target
    value, others = read(x), [read(o) for o in node.all_input_nodes if o is not x]
    fits = value.is_floating_point() and all((o.shape, o.dtype) == (value.shape, value.dtype) for o in others)
    return _IN_PLACE[node.target] if fits else node.target


def _bind(lowered: Lowered, order: list[fx.Node], state: Mapping[str, Tensor], args: tuple, move) -> dict:
    """Placeholder -> tensor, for parameters that are needed and all inputs that are."""
    aliases: dict[str, list[str]] = {}
    for other, first in lowered.tied.items():
        aliases.setdefault(first, []).append(other)
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
    if len(tensors) != len(lowered.inputs):
        raise InputError(f"run: the graph takes {len(lowered.inputs)} input tensors, {len(tensors)} given")
    inputs = dict(zip(lowered.inputs, tensors, strict=True))
    values: dict[fx.Node, Any] = {}
    for node in order:
        if node in inputs:
            values[node] = move(inputs[node])
        elif "parameter" in node.meta:
            first = node.meta["parameter"]
            name = next((n for n in (first, *aliases.get(first, ())) if n in state), None)
            if name is None:
                raise InputError(
                    f"run: state has no {node.meta['kind']} {first!r}. state_of(module) collects them all,"
                    f" non-persistent buffers too"
                )
            values[node] = state[name].detach()
    return values


def _move(lowered: Lowered, state: Mapping[str, Tensor]) -> Callable[[Any], Any]:
    """Takes tensors, dtypes and devices from the run that was lowered to this one."""
    old = next((n for n in lowered.parameters.values() if n.meta["dtype"].is_floating_point), None)
    new = next((t for t in state.values() if t.is_floating_point()), None)
    if old is None or new is None:
        return lambda x: x
    device, dtype = old.meta["value"].device, old.meta["dtype"]
    dtypes = {dtype: new.dtype} if dtype != new.dtype else {}
    if dtypes and new.dtype is not torch.bfloat16:  # whose complex numbers torch has no kernels for
        dtypes[dtype.to_complex()] = new.dtype.to_complex()

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device=new.device, dtype=dtypes.get(x.dtype, x.dtype))
        if isinstance(x, torch.dtype):
            return dtypes.get(x, x)
        return new.device if isinstance(x, torch.device) and x == device else x

    return move
