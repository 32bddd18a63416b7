"""Which nodes are merged into one, which stay per model, and what flows between the two."""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..errors import InputError, SpaceError
from ..trace import state_by_all_names

# What a program can ask of a tensor without seeing its features: such values never carry a space.
SHAPE_METHODS = frozenset({"size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point"})
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})
SHAPE_FUNCTIONS = (len, isinstance, torch.numel, torch.is_floating_point)


@dataclass(frozen=True)
class Partition:
    """A cut through one graph. All names are FX node names of that graph.

    shared: computed once; private: computed per model. private is closed under users.
    boundary: shared nodes that private ones read, in graph order.
    copied: shared nodes without data, made from parameters alone (a get_attr, an expanded class token),
        which private nodes read too: each model computes its own copy from its own parameters.
    """

    shared: frozenset[str]
    private: frozenset[str]
    boundary: tuple[str, ...]
    copied: frozenset[str] = frozenset()


def partition(
    graph_module: fx.GraphModule,
    opaque: Collection[str],
    until: str | None = None,
    reasons: Sequence[str] = (),
) -> Partition:
    """Split the graph: `opaque` nodes, the nodes `until` selects and all that is downstream stay per model.

    until: module path ("layer3", "layer2.1.conv2") or FX node name, the first that stays per model.
    reasons: why nodes are opaque, for the error when nothing is left to merge.
    Raises InputError for an unknown `until`, SpaceError when no parameter would be shared.

    >>> layers = torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)
    >>> cut = partition(fx.symbolic_trace(torch.nn.Sequential(*layers)), {"_2"})
    >>> sorted(cut.private), cut.boundary
    (['_2', 'output'], ('_1',))
    """
    nodes = list(graph_module.graph.nodes)
    unknown = sorted(set(opaque) - {n.name for n in nodes})
    if unknown:
        raise SpaceError(f"partition: opaque names {unknown}, which are no nodes of this graph")
    seeds = set(opaque) | (set() if until is None else named(graph_module, until)) | {"output"}
    private: set[str] = set()
    for node in nodes:
        seeded = node.name in seeds and node.op != "placeholder"
        if seeded or node.op == "output" or any(n.name in private for n in node.all_input_nodes):
            private.add(node.name)
    private, copied = _pull_constants(nodes, private)
    shared = frozenset(n.name for n in nodes) - private
    readers = private | copied
    boundary = tuple(
        n.name
        for n in nodes
        if n.name in shared and n.name not in copied and any(u.name in readers for u in n.users)
    )
    result = Partition(shared, frozenset(private), boundary, frozenset(copied))
    trained = {n for n, _ in graph_module.named_parameters(remove_duplicate=False)}
    if not trained & set(owned(graph_module, shared)):
        raise SpaceError(_nothing(graph_module, opaque, until, reasons))
    return result


def cut_points(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the nodes that every path from an input to the output passes, in graph order.

    Cutting at one of them leaves a single value between the shared and the private part. They are the
    dominators of the output in the dataflow (shapes and constants left out).

    >>> cut_points(fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())))
    ('_0', '_1')
    """
    import networkx as nx

    data = data_nodes(graph_module.graph)
    flow = nx.DiGraph()
    flow.add_edges_from(("", n.name) for n in data if n.op == "placeholder")
    flow.add_edges_from((i.name, n.name) for n in data for i in n.all_input_nodes if i in data)
    by_name = {n.name: n for n in data}
    output = next((n.name for n in data if n.op == "output"), None)
    if output is None or output not in flow:
        return ()
    above = nx.immediate_dominators(flow, "")
    chain, node = [], above[output]
    while node != "":
        chain.append(node)
        node = above[node]
    return tuple(n for n in reversed(chain) if by_name[n].op != "placeholder")


def owned(graph_module: fx.GraphModule, nodes: Collection[str]) -> tuple[str, ...]:
    """Names of the parameters and buffers that `nodes` use, tied names included, in graph order."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    tensors = state_by_all_names(graph_module)
    names: dict[str, None] = {}
    for node in graph_module.graph.nodes:
        if node.name not in nodes:
            continue
        if node.op == "get_attr" and node.target in tensors:
            names[str(node.target)] = None
        if node.op == "call_module":
            names.update((f"{node.target}.{n}", None) for n in state_by_all_names(modules[str(node.target)]))
    return tuple(names)


def module_paths(node: fx.Node) -> tuple[str, ...]:
    """Every module path the node belongs to: its own target, and the modules whose forward made it."""
    paths = [str(node.target)] if node.op in ("call_module", "get_attr") else []
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        paths.append(entry[0] if isinstance(entry, tuple) else str(entry))
    return tuple(paths)


def selected(graph_module: fx.GraphModule, until: str) -> set[str]:
    """Names of the nodes of module path `until`; if there are none, the layer's that is called so."""
    nodes = list(graph_module.graph.nodes)
    inside = {n.name for n in nodes if any(p == until or p.startswith(until + ".") for p in module_paths(n))}
    return inside or {n.name for n in nodes if n.name == until and n.op not in ("placeholder", "output")}


def named(graph_module: fx.GraphModule, path: str, option: str = "until") -> set[str]:
    """`selected`; raises InputError, about this option, if that is nothing."""
    found = selected(graph_module, path)
    if found:
        return found
    nodes = list(graph_module.graph.nodes)
    called = [n for n in nodes if n.name == path]
    if called:
        raise InputError(
            f'{option}="{path}" is an {called[0].op} of the graph, not a layer. {legal(graph_module)}'
        )
    known = {
        ".".join(p.split(".")[: k + 1])
        for n in nodes
        for p in module_paths(n)
        for k in range(p.count(".") + 1)
    }
    close = difflib.get_close_matches(path, sorted(known - {""} | {n.name for n in nodes}), n=4, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    raise InputError(
        f'{option}="{path}" is no module or node that this graph runs.{hint} {legal(graph_module)}'
    )


def legal(graph_module: fx.GraphModule, most: int = 12) -> str:
    """Where a cut is simple, in a sentence."""
    points = cut_points(graph_module)
    more = f", ... ({len(points)} in all, see cut_points)" if len(points) > most else ""
    return f"Cut points with a single value between the parts: {', '.join(points[:most]) or 'none'}{more}."


def _nothing(
    graph_module: fx.GraphModule, opaque: Collection[str], until: str | None, reasons: Sequence[str]
) -> str:
    why = []
    if until is not None:
        why.append(f'until="{until}" keeps it and all that is downstream per model')
    first = next((n.name for n in graph_module.graph.nodes if n.name in opaque), None)
    if first is not None:
        why.append(f"%{first} cannot be shared, nor what is downstream of it")
    if not why:
        why.append("the graph uses no parameters")
    return f"nothing can be merged: {'; '.join([*why, *reasons])}. {legal(graph_module)}"


def _pull_constants(nodes: Sequence[fx.Node], private: set[str]) -> tuple[set[str], set[str]]:
    """Parameter-only values that private nodes read become private, or copied if shared ones read them."""
    data = data_nodes(nodes[0].graph)
    made: set[fx.Node] = set()  # from parameters alone
    for node in nodes:
        if node not in data and (node.op in ("get_attr", "call_module") or made & set(node.all_input_nodes)):
            made.add(node)
    private, copied = set(private), set()
    for node in reversed(nodes):
        readers = {u.name for u in node.users}
        if node not in made or node.name in private or not readers & (private | copied):
            continue
        (private if readers <= private else copied).add(node.name)
    return private, copied


def data_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value depends on the entries, not only on the shape, of a graph input."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (data & set(node.all_input_nodes) and not _asks_shape(node)):
            data.add(node)
    return data


def _asks_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is builtins.getattr:
        return node.args[1] in SHAPE_ATTRIBUTES
    return node.target in SHAPE_FUNCTIONS
