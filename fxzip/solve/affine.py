"""From a merge point downstream to the last value that is affine in its output: where its target is taken.

y -> norm in eval -> reshape -> + other branch -> T. Walking back from a target at T to the merge point's
own output undoes moves and scalars and subtracts what the merged network really has in the other branch
(error feedback); norms and learned scales are folded into the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor, fx

from .slots import argument

MOVES = frozenset({"reshape", "permute", "transpose", "t", "squeeze", "unsqueeze"})  # as lowering writes them
BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"})


@dataclass(frozen=True)
class Link:
    """One op on the way. kind: "move", "add", "subtract", "scalar", "scale" (by a parameter) or "norm".

    node: the op (for a norm its first result); source: its operand on the way; other: the second operand.
    """

    kind: str
    node: fx.Node
    source: fx.Node
    other: fx.Node | None = None


def packet(node: fx.Node) -> str:
    """`convolution` of aten.convolution.default; "" for what is no ATen op."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def chain(
    start: fx.Node,
    dynamic: Mapping[str, fx.Node],
    inside: frozenset[str],
    shape: Callable[[fx.Node], tuple[int, ...]],
) -> list[Link]:
    """Links from `start` while the value has one reader and that is affine in it, entry by entry. Who gets an output
    reads it, too: nothing may be folded behind it.

    inside: names the way may not leave (the part of the graph that is shared, or private). shape: of a node's value
    on the data.
    """
    links: list[Link] = []
    value = start
    while True:
        readers = [u for u in value.users if u.name in dynamic or u.op == "output"]
        if len(readers) != 1 or readers[0].name not in inside:
            return links
        link = _link(readers[0], value, dynamic)
        if link is None or (link.kind != "move" and shape(link.node) != shape(value)):
            return links  # or spread over more entries than it has: none of them is its own
        if not link.node.meta["dtype"].is_floating_point:
            return links  # least squares are over real numbers
        if link.kind in ("norm", "scale") and not _per_feature(start, links, link):
            return links
        links.append(link)
        value = link.node


def _link(node: fx.Node, source: fx.Node, dynamic: Mapping[str, fx.Node]) -> Link | None:
    name = packet(node)
    if name in MOVES:
        return Link("move", node, source)
    if name in BATCH_NORMS and plain_norm(node):
        first = first_result(node, dynamic)
        return Link("norm", first, source, node) if first else None
    if node.kwargs:  # alpha of an addition, the rounding mode of a division
        return None
    if name in ("mul", "div") and isinstance(node.args[1], (int, float)):
        factor = float(node.args[1])  # zero leaves nothing to undo
        return Link("scalar", node, source) if factor and isfinite(factor) else None
    other = next((n for n in node.all_input_nodes if n is not source), None)  # None: a number, or the source again
    if other is None:
        return None
    if name == "add" or (name == "sub" and node.args[0] is source):
        return Link("add" if name == "add" else "subtract", node, source, other)
    if name == "mul" and "parameter" in other.meta and "const" not in other.meta and len(other.users) == 1:
        return Link("scale", node, source, other)
    return None


def _per_feature(start: fx.Node, way: Sequence[Link], link: Link) -> bool:
    """Whether a norm or scale behind `way` has one entry for each feature that the contraction `start` makes, in their
    order, and lies along them: only then it can be folded into the rows of the weight."""
    if any(k.kind != "move" for k in way):
        return False
    made = tuple(start.meta["shape"])
    axis = 1 if packet(start) == "convolution" else len(made) - 1
    place = _along(axis, made)
    for move in way:
        place = move.node.target(place, *move.node.args[1:], **move.node.kwargs)  # type: ignore[operator]
    if link.kind == "norm":
        return torch.equal(_along(1, tuple(place.shape)), place)
    own = link.other.meta["shape"]  # type: ignore[union-attr]
    return torch.equal(torch.arange(prod(own)).view(own).expand_as(place), place)


def _along(axis: int, shape: tuple[int, ...]) -> Tensor:
    """The index along one axis, everywhere. int64 [*shape]"""
    return torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)


def first_result(node: fx.Node, dynamic: Mapping[str, fx.Node]) -> fx.Node | None:
    """The first of an op's several results, if an output depends on it."""
    return next((u for u in node.users if u.args[1] == 0 and u.name in dynamic), None)


def plain_norm(node: fx.Node) -> bool:
    """Whether a batch norm is in eval, with scale, shift and running statistics that are in the checkpoint and that no
    other op uses: they can be set."""
    operands = (argument(node, n) for n in ("weight", "bias", "running_mean", "running_var"))
    return not argument(node, "training") and all(
        isinstance(o, fx.Node) and "parameter" in o.meta and "const" not in o.meta and len(o.users) == 1
        for o in operands
    )


def undo(link: Link, target: Tensor, shape: tuple[int, ...], other: Tensor | None) -> Tensor:
    """The target for the link's source, from the target for its result. shape: of the source's value."""
    if link.kind == "add":
        return target - other  # type: ignore[operator]
    if link.kind == "subtract":
        return target + other  # type: ignore[operator]
    if link.kind == "scalar":
        factor = float(link.node.args[1])  # type: ignore[arg-type]
        return target / factor if packet(link.node) == "mul" else target * factor
    if link.kind == "move":
        return _unmove(link.node, target, shape)
    return target  # norm and scale are folded into the fit


def _unmove(node: fx.Node, target: Tensor, shape: tuple[int, ...]) -> Tensor:
    name = packet(node)
    if name == "permute":
        dims = [int(d) % target.dim() for d in node.args[1]]  # type: ignore[union-attr]
        return target.permute([dims.index(i) for i in range(len(dims))])
    if name == "transpose":
        return target.transpose(int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
    if name == "t":
        return target.t()
    return target.reshape(shape)
