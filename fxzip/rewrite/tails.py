"""Networks on one trunk that end differently: one graph for all, with every network's own end.

Up to where they differ the graphs are alike. What follows, a tail, is copied into every network's graph, with the
parameters of the network it belongs to, so that all graphs are alike and every value of the trunk has all its readers.
`build` keeps of each network its own tail alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from ..trace import Traced, alike, state_by_all_names, watched
from ..trace.guards import kept_rng
from .modules import attribute, rooted
from .partition import selected
from .zipped import Zipped


@dataclass(frozen=True)
class Tails:
    """own: the graphs as they were traced. nodes: per network, the names of its tail's nodes in the joined graphs.
    targets: of the tails, target in the joined graphs -> in the network's own."""

    own: tuple[fx.GraphModule, ...]
    nodes: tuple[frozenset[str], ...]
    targets: dict[str, str]

    def foreign(self, i: int) -> frozenset[str]:
        """Nodes of the other networks' tails."""
        return frozenset().union(*(names for k, names in enumerate(self.nodes) if k != i))


def join(traced: Sequence[Traced], args: tuple, until: str | None = None) -> tuple[tuple[Traced, ...], Tails] | None:
    """All networks with all tails, each returning a tuple with an output per network; or None.

    args: example arguments, on which every output is compared with the network's own. until: as for `partition`; None
    also where a network that has this module or node differs from the others before it. None, too, where the inputs are
    not the same, nothing is in common, or the networks write into values that both parts read.
    The tensors are those of `traced`, not copies.
    """
    own = tuple(t.graph_module for t in traced)
    trunk = _trunk(own)
    if trunk is None or not all(_apart(g, in_common, until) for g, in_common in zip(own, trunk, strict=True)):
        return None
    with torch.no_grad(), kept_rng(t for t in tree_leaves(args) if isinstance(t, Tensor)):
        outputs = [g(*_fresh(args)) for g in own]
        for cloned in (False, True):  # only where a tail writes into what others read
            read = [_boundary(g, t, _fresh(args)) if cloned else {} for g, t in zip(own, trunk, strict=True)]
            joined, tails = _joined(own, trunk, read)
            if all(_same(y, u(*_fresh(args))[i]) for i, (y, u) in enumerate(zip(outputs, joined, strict=True))):
                return tuple(replace(t, graph_module=u) for t, u in zip(traced, joined, strict=True)), tails
    return None


# A trunk: per network, its nodes that all have in common -> the first network's.
Trunk = tuple[dict[fx.Node, fx.Node], ...]


def _trunk(own: Sequence[fx.GraphModule]) -> Trunk | None:
    first = own[0]
    inputs = [[n.target for n in g.graph.nodes if n.op == "placeholder"] for g in own]
    if any(i != inputs[0] for i in inputs):
        return None
    found = [{n: n for n in first.graph.nodes if n.op != "output"}, *(_common(first, g) for g in own[1:])]
    everywhere = set(found[0].values()).intersection(*(f.values() for f in found[1:]))
    if not any(n.op in ("call_module", "get_attr") for n in everywhere):
        return None
    return tuple({n: a for n, a in f.items() if a in everywhere} for f in found)


def _common(first: fx.GraphModule, other: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Nodes of `other` that compute what a node of `first` does -> that node, in the order of both."""
    free: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in first.graph.nodes:
        free[_key(node, {n: n for n in node.all_input_nodes})].append(node)
    found: dict[fx.Node, fx.Node] = {}
    for node in other.graph.nodes:
        if node.op == "output" or not all(n in found for n in node.all_input_nodes):
            continue
        same = free[_key(node, found)]
        if same and alike(first, other, same[0], node):
            found[node] = same.pop(0)
    return found


def _key(node: fx.Node, found: dict[fx.Node, fx.Node]) -> tuple:
    arguments = map_arg((node.args, node.kwargs), lambda n: f"%{found[n].name}")
    return node.op, node.target, repr(arguments)


def _apart(module: fx.GraphModule, in_common: dict[fx.Node, fx.Node], until: str | None) -> bool:
    """Whether a network's tail shares no tensor with its trunk, and is all in `until` or behind it, if it has that."""
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    tensors = [{id(t) for n in nodes if (n in in_common) == c for t in _tensors(module, n)} for c in (True, False)]
    names = selected(module, until) if until is not None else set()
    behind: set[fx.Node] = set()
    for node in nodes:
        if node.name in names or behind & set(node.all_input_nodes):
            behind.add(node)
    tail = {n for n in nodes if n not in in_common and n.all_input_nodes}
    return not tensors[0] & tensors[1] and (not names or behind >= tail)


def _tensors(module: nn.Module, node: fx.Node) -> list[Tensor]:
    found = attribute(module, str(node.target)) if node.op in ("call_module", "get_attr") else None
    if isinstance(found, Tensor):
        return [found]
    return list(state_by_all_names(found).values()) if isinstance(found, nn.Module) else []


def _joined(own: Sequence[fx.GraphModule], trunk: Trunk, read: Sequence[dict[fx.Node, Any]]) -> tuple[list, Tails]:
    """The joined graphs. read: per network, the values of its trunk that its tail reads through a clone."""
    graph, env, outputs = fx.Graph(), {}, []
    for node in trunk[0]:
        env[node] = graph.node_copy(node, lambda n: env[n])
    here = [{n: env[a] for n, a in in_common.items()} for in_common in trunk]
    made = [[graph.call_method("clone", (h[n],)) for n in reads] for h, reads in zip(here, read, strict=True)]
    for h, reads, clones in zip(here, read, made, strict=True):
        h |= dict(zip(reads, clones, strict=True))
    common = {str(n.target) for n in trunk[0] if n.op in ("call_module", "get_attr")}
    sources: dict[str, tuple[int, str]] = {}  # target of a tail -> network, its own target
    for k, module in enumerate(own):
        renamed: dict[str, str] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                outputs.append(map_arg(node.args[0], lambda n, k=k: here[k][n]))
            elif node not in trunk[k]:
                new = here[k][node] = graph.node_copy(node, lambda n, k=k: here[k][n])
                made[k].append(new)
                if node.op in ("call_module", "get_attr"):
                    target = str(node.target)
                    new.target = renamed.get(target) or _free(target, k, common, sources)
                    renamed[target], sources[new.target] = new.target, (k, target)
    graph.output(tuple(outputs))
    names = tuple(frozenset(n.name for n in nodes) for nodes in made)
    tails = Tails(tuple(own), names, {new: old for new, (_, old) in sources.items()})
    return [_module(graph, own, i, common, sources) for i in range(len(own))], tails


def _boundary(module: fx.GraphModule, trunk: dict[fx.Node, fx.Node], args: tuple) -> dict[fx.Node, Any]:
    """The tensors of the trunk that the tail reads, in graph order."""
    values: dict[fx.Node, Any] = {}

    watched(module, args, values.__setitem__)
    return {n: 0 for n in trunk if isinstance(values[n], Tensor) and any(u not in trunk for u in n.users)}


def _free(target: str, k: int, common: set[str], sources: dict[str, tuple[int, str]]) -> str:
    """`target`, or with a number: no other part of the joined graph may use a name of it, above it or below it. The
    number goes to where the names part: `head.0` beside another network's layer `head` becomes `head_1.0`."""
    new = target
    taken = [t for t, found in sources.items() if found != (k, t)]  # a network's own names do not meet, until renamed
    while clash := next((t for t in (*common, *taken) if meet(new, t)), ""):
        parts = new.split(".")
        parts[min(len(parts) - 1, clash.count("."))] += f"_{k}"
        new, taken = ".".join(parts), list(sources)
    return new


def meet(one: str, other: str) -> bool:
    """Whether a path is the other, or above or below it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _module(
    graph: fx.Graph, own: Sequence[fx.GraphModule], i: int, common: set[str], sources: dict[str, tuple[int, str]]
) -> fx.GraphModule:
    """The joined graph with network i's tensors in the trunk, and everyone's own in the tails."""
    parts = [*((t, own[i], t) for t in common), *((new, own[k], old) for new, (k, old) in sources.items())]
    return rooted(copy.deepcopy(graph), parts, Zipped, "Joined")


def _fresh(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _same(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )
