"""Private stems: every network keeps its own layers up to a module, and their features are merged there.

    h_i = stem_i(x);   z = sum_i M_i h_i;   what is shared reads z

Each network becomes a stem and a body. The body of network i begins with a layer of its own, `Enter`, which takes the
features of all stems side by side and picks those of stem i: a linear layer like any other, so that merging it makes
it [M_1 .. M_N], and solving fits it. The stems themselves nothing touches: `prepend` puts them before the merged body.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError, SpaceError
from ..trace import Traced, batch_size, state_by_all_names, watched
from .modules import has_path, rooted
from .partition import data_nodes, legal, named
from .zipped import Zipped

ENTER, STEMS = "enter", "stems"  # what the layer that reads stems, and the value it reads, are called after a node


class Enter(nn.Module):
    """z = W h along one axis.

    >>> Enter(1, torch.tensor([[0.0, 1.0]]))(torch.tensor([[3.0, 4.0]])).tolist()
    [[4.0]]
    """

    def __init__(self, axis: int, weight: Tensor) -> None:
        super().__init__()
        self._axis = axis
        self.weight = nn.Parameter(weight)  # [m, n_1 + .. + n_N]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h.movedim(self._axis, -1), self.weight).movedim(-1, self._axis).contiguous()

    def extra_repr(self) -> str:
        return f"axis={self._axis}"


@dataclass(frozen=True)
class Stems:
    """since: as in `merge`. own: the networks as they were traced; args: example arguments for them. parts: per network
    its stem, inputs -> the values that its body reads. entries: (node of the first network, feature axis) of these.
    inputs: which of the networks' inputs bodies read, too."""

    since: str
    own: tuple[Traced, ...]
    args: tuple
    parts: tuple[fx.GraphModule, ...]
    entries: tuple[tuple[str, int], ...]
    inputs: tuple[int, ...]

    @torch.no_grad()
    def before(self, args: tuple) -> tuple:
        """Arguments of the networks -> those of their bodies."""
        found = [part(*fresh(args)) for part in self.parts]
        values = zip(*found, strict=True)
        beside = [torch.cat(v, axis) for v, (_, axis) in zip(values, self.entries, strict=True)]
        return (*beside, *(args[k] for k in self.inputs))

    def only(self, parameters: Collection[str]) -> bool:
        """Whether these belong to `Enter` layers alone, so that nothing of the networks is shared."""
        return {n.rpartition(".")[0] for n in parameters} <= {f"{name}_{ENTER}" for name, _ in self.entries}


def split(
    traced: Sequence[Traced], args: tuple, names: Sequence[str], since: str, axis: Callable[[str], int]
) -> tuple[tuple[Traced, ...], Stems] | None:
    """The bodies, and the stems; None where nothing comes before `since`.

    since: path of the first module that is shared, or a node's name: what does not read it and depends on parameters is
    the stem. args: example arguments, two samples. axis: node of the first network -> the axis of its features, or
    SpaceError. The tensors are those of `traced`, not copies.
    Raises InputError for an unknown `since`, SpaceError where the cut cannot be there.
    """
    own = [t.graph_module for t in traced]
    takes = [[str(n.target) for n in g.graph.nodes if n.op == "placeholder"] for g in own]
    if any(t != takes[0] for t in takes) or any(n.startswith("*") for n in takes[0]):
        forwards = " and ".join(dict.fromkeys(f"forward({', '.join(t)})" for t in takes))
        raise InputError(f'since="{since}" needs models with the same inputs, each by its name, not {forwards}')
    sides = [_sides(g, since) for g in own]
    counts = [len(entries) for _, entries in sides]
    if not any(counts):
        return None
    if len(set(counts)) > 1:
        odd = ", ".join(f"{c} in {n}" for n, c in zip(names, counts, strict=True))
        raise SpaceError(f'since="{since}": what is shared reads different numbers of values from the stems ({odd})')
    entries = tuple((n.name, axis(n.name)) for n in sides[0][1])
    sizes = _sizes(own, args, names, since, [e for _, e in sides], [a for _, a in entries])
    bodies = [_body(g, side, i, entries, sizes) for i, (g, side) in enumerate(zip(own, sides, strict=True))]
    _name_alike(bodies)
    read = {str(n.target) for n in bodies[0].graph.nodes if n.op == "placeholder"}
    parts = tuple(_part(g, values) for g, (_, values) in zip(own, sides, strict=True))
    stems = Stems(since, tuple(traced), args, parts, entries, tuple(k for k, n in enumerate(takes[0]) if n in read))
    with torch.no_grad():
        before = stems.before(args)
        for name, g, body in zip(names, own, bodies, strict=True):
            if not _close(g(*fresh(args)), body(*fresh(before))):
                raise SpaceError(
                    f'since="{since}": {name} is another network when cut there: its parts write into each other\'s'
                    f" values. {legal(g)}"
                )
    return tuple(replace(t, graph_module=b) for t, b in zip(traced, bodies, strict=True)), stems


# -------------------------------------------------------------------------------------------- the two parts

Sides = tuple[list[fx.Node], list[fx.Node]]  # nodes of the body, in graph order; nodes of the stem that these read


def _sides(graph_module: fx.GraphModule, since: str) -> Sides:
    """Behind `since` is the body, with all it needs that is made without parameters; other values are the stem's."""
    first, nodes = named(graph_module, since, "since"), list(graph_module.graph.nodes)
    behind: set[fx.Node] = set()
    learned: set[fx.Node] = set()  # depends on parameters or buffers
    for node in nodes:
        if (node.name in first and node.op != "placeholder") or behind & set(node.all_input_nodes):
            behind.add(node)
        if _holds(graph_module, node) or learned & set(node.all_input_nodes):
            learned.add(node)
    stem = {n for n in data_nodes(graph_module.graph) if n.op != "placeholder" and n in learned and n not in behind}
    body = set(behind)
    for node in reversed(nodes):
        if node in body:
            body |= set(node.all_input_nodes) - stem
    output = graph_module.graph.output_node()
    if output not in behind:
        raise SpaceError(f'since="{since}" leads to no output. {legal(graph_module)}')
    skips = [n.name for n in output.all_input_nodes if n in stem]
    if skips:
        raise SpaceError(
            f'since="{since}": the output reads %{skips[0]}, which comes before. {legal(graph_module)}'
        )
    entries = [n for n in nodes if n in stem and any(u in body for u in n.users)]
    return [n for n in nodes if n in body], entries


def _holds(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node has parameters or buffers of its own."""
    if node.op == "call_module":
        return bool(state_by_all_names(graph_module.get_submodule(str(node.target))))
    return node.op == "get_attr"


def _sizes(
    own: Sequence[fx.GraphModule], args: tuple, names: Sequence[str], since: str,
    entries: Sequence[Sequence[fx.Node]], axes: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """Per entry, how many features every network has there. Raises SpaceError for values that cannot stand side by
    side: no tensors of numbers by sample, or of other shapes."""
    found: list[list[Tensor]] = []
    for graph_module, values in zip(own, entries, strict=True):
        seen: dict[fx.Node, Any] = {}
        watched(graph_module, fresh(args), seen.__setitem__)
        found.append([seen[n] for n in values])
    for k, (node, axis) in enumerate(zip(entries[0], axes, strict=True)):
        shapes = []
        for values in found:
            value, what = values[k], f'since="{since}": %{node.name}, which crosses there,'
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise SpaceError(f"{what} is no tensor of floating-point numbers. {legal(own[0])}")
            if axis == 0 or len(value) != batch_size(args):
                raise SpaceError(f"{what} has not one row per sample. {legal(own[0])}")
            shapes.append([s for d, s in enumerate(value.shape) if d != axis])
        for name, shape in zip(names, shapes, strict=True):
            if shape != shapes[0]:
                raise SpaceError(
                    f'since="{since}": %{node.name} is {list(found[0][k].shape)} in {names[0]} and of another shape in'
                    f" {name}: only the number of features may differ"
                )
    return [[values[k].shape[axis] for values in found] for k, axis in enumerate(axes)]


def _body(
    own: fx.GraphModule, side: Sides, i: int, entries: Sequence[tuple[str, int]], sizes: Sequence[Sequence[int]]
) -> fx.GraphModule:
    """Network i from `since` on, on the features of all stems."""
    nodes, values = side
    graph, env, layers = fx.Graph(), {}, nn.Module()
    beside = [graph.placeholder(f"{name}_{STEMS}") for name, _ in entries]
    parts: list[tuple[str, nn.Module, str]] = [
        (str(n.target), own, str(n.target)) for n in nodes if n.op in ("call_module", "get_attr")
    ]
    for node in nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(str(node.target), type_expr=node.type)  # all arguments are given
    for value, (name, axis), widths, read in zip(values, entries, sizes, beside, strict=True):
        target = f"{name}_{ENTER}"
        if has_path(own, target):
            raise SpaceError(f"{target!r} is a name of the network's own, and that of a layer that since= adds")
        like = next(t for t in (*own.parameters(), *own.buffers()) if t.is_floating_point())
        weight = torch.eye(sum(widths), device=like.device, dtype=like.dtype)
        start = sum(widths[:i])
        layers.add_module(target, Enter(axis, weight[start : start + widths[i]].clone()))
        env[value] = graph.create_node("call_module", target, (read,), name=target)
        env[value].meta = {k: v for k, v in value.meta.items() if k != "nn_module_stack"}
        parts.append((target, layers, target))
    for node in nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
    return rooted(graph, parts, Zipped, "Body")


def _name_alike(bodies: Sequence[fx.GraphModule]) -> None:
    """Nodes of the first body's names: behind stems of other kinds they are counted from other numbers on."""
    first = list(bodies[0].graph.nodes)
    for body in bodies[1:]:
        nodes = list(body.graph.nodes)
        if [(n.op, n.target) for n in nodes] == [(n.op, n.target) for n in first]:
            for node, like in zip(nodes, first, strict=True):
                node.name = like.name
            body.recompile()


def _part(own: fx.GraphModule, values: Sequence[fx.Node]) -> fx.GraphModule:
    """The stem: all inputs in, `values` out."""
    graph, env, needed = fx.Graph(), {}, set(values)
    for node in reversed(own.graph.nodes):
        needed |= set(node.all_input_nodes) if node in needed else set()
    for node in own.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(str(node.target), type_expr=node.type)
        elif node in needed:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[n] for n in values))
    held = [(str(n.target), own, str(n.target)) for n in needed if n.op in ("call_module", "get_attr")]
    return rooted(graph, held, Zipped, "Stem")


def fresh(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _close(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        not isinstance(x, Tensor) or torch.allclose(x, y, 1e-4, 1e-5 * float(x.abs().max() if x.numel() else 0) + 1e-7)
        for x, y in zip(left, right, strict=True)
    )
