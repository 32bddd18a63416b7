"""The private parts: what each model keeps, and how it reads the merged features at the boundary.

Where the private part only consumes a space, U_i is absorbed into the weights that consume it (no extra op,
no extra parameter), if that is exact (absorb.py). Otherwise U_i z is explicit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import SpaceError
from ..trace import state_by_all_names, watched
from .absorb import Value, absorb, consumed_only, copied, exact, groups, numbers
from .axes import axis_map
from .partition import Partition, owned
from .unmerge import Unmerge, copies, is_identity

if TYPE_CHECKING:
    from ..infer.spaces import Layout, Spaces
    from ..match import Matching

# FX node name -> (feature axes of its value, [(space, positions in these axes flattened)]), or None.
FeatureAxis = Callable[[str], tuple[Sequence[int], Sequence[tuple[str, np.ndarray]]] | None]


@dataclass(frozen=True)
class Heads:
    """What the models keep.

    states: per model, name -> tensor of its private parameters and buffers, absorbed ones included.
    unmerge: boundary node -> one Unmerge per model. absorbed: spaces whose U_i moved into private weights.
    cloned: boundary nodes that a private part writes to in place, so that every model needs its own copy.
    """

    states: tuple[Mapping[str, Tensor], ...]
    unmerge: Mapping[str, tuple[Unmerge, ...]]
    absorbed: frozenset[str]
    cloned: frozenset[str]


def head_parameters(
    graph_modules: Sequence[fx.GraphModule],
    cut: Partition,
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    feature_axis: FeatureAxis,
    example_args: tuple,
) -> Heads:
    """Private parameters of every model, and the unmerge ops at the boundary.

    graph_modules: the N traced models, nodes named alike. feature_axis: see FeatureAxis, on model 0's values.
    example_args: positional inputs, run once through model 0. Inputs are not modified; the RNG is not used.
    Raises SpaceError when a boundary value cannot be laid out at the merged width.
    """
    private_names = [owned(g, cut.private | cut.copied) for g in graph_modules]
    kept = [
        {n: t.detach().clone() for n, t in state_by_all_names(g).items() if n in set(names)}
        for g, names in zip(graph_modules, private_names, strict=True)
    ]
    captured = _capture(graph_modules[0], cut.boundary, example_args)
    values = _values(captured, spaces, matchings, feature_axis, len(graph_modules))
    networks = [private_network(g, cut) for g in graph_modules]
    whole = {s for n, v in values.items() if not numbers(captured[n]) for s in v.spaces}  # no weight reads these
    candidates = consumed_only(values, spaces, private_names[0]) - whole
    absorbed = {s for v in values.values() if v.trivial for s in v.spaces}
    for group in groups(values):
        if group <= candidates and exact(networks, kept, captured, values, spaces, matchings, group):
            absorbed |= group
    explicit = {n: v for n, v in values.items() if not v.trivial and not v.spaces <= absorbed}
    states = [absorb(s, spaces, matchings, absorbed & candidates, i) for i, s in enumerate(kept)]
    ops = {
        n: tuple(Unmerge(v.axes, m, captured[n].dtype).to(captured[n].device) for m in v.maps)
        for n, v in explicit.items()
    }
    written = _written(graph_modules[0], networks[0], captured, cut) - set(explicit)
    return Heads(tuple(states), ops, frozenset(absorbed), frozenset(written))


def private_network(graph_module: fx.GraphModule, cut: Partition) -> fx.GraphModule:
    """One model's private part alone: boundary values in, the model's output out. Shares the modules."""
    graph, env = fx.Graph(), {}
    for name in cut.boundary:
        env[name] = graph.placeholder(name)
    for node in graph_module.graph.nodes:
        if node.name in cut.private or node.name in cut.copied:
            env[node.name] = graph.node_copy(node, lambda n: env[n.name])
    return fx.GraphModule(graph_module, graph)


def _capture(graph_module: fx.GraphModule, names: Collection[str], args: tuple) -> dict[str, Any]:
    """Values of the nodes `names` on `args`, copied at once so that later in-place ops don't show."""
    found: dict[str, Any] = {}

    def see(node: fx.Node, value: Any) -> None:
        if node.name in names:
            found[node.name] = copied(value)

    watched(graph_module, args, see)
    return found


def unreadable(name: str, spaces: Spaces, merged: Collection[str]) -> str:
    """Why no single gather or product gives back the features that a value of the graph has on `merged` spaces, as
    far as its layout tells; "" if one does."""
    held = _held(name, spaces, merged)
    if held and len(spaces.lowered.values[name]) > 1:
        return "is several tensors"
    first = [k.axes for k in spaces.layouts(spaces.lowered.values[name][0].name)][:1] if held else []
    return "has merged features along several axes" if [k.axes for k in held] != first else ""


def _held(name: str, spaces: Spaces, merged: Collection[str]) -> list[Layout]:
    """The layouts of a value with features of these spaces."""
    nodes = getattr(spaces.lowered, "values", {}).get(name, ())
    layouts = [k for n in nodes for k in spaces.layouts(n.name)]
    return [k for k in layouts if any(s in merged for s, _ in k.runs)]


def _refuse_unreadable(name: str, value: Any, spaces: Spaces, matchings: Mapping[str, Matching]) -> None:
    """SpaceError for a boundary value whose features no single gather or product gives back."""
    moved = {s for s, m in matchings.items() if _moves(m)}
    layouts = _held(name, spaces, moved)
    why = unreadable(name, spaces, moved)
    if layouts and not why:
        shape = spaces.lowered.values[name][0].meta["shape"]
        if not isinstance(value, Tensor):
            why = "is several tensors"
        elif any(value.shape[a] != shape[a] for a in layouts[0].axes):
            why = "has its features flattened together with the batch"
        elif not numbers(value) and not all(
            copies(matchings[s].unmerge) for k in layouts for s, _ in k.runs if s in moved
        ):
            why = f"is {str(value.dtype).removeprefix('torch.')} and its merged features are mixtures"
    if not why:
        return
    raise SpaceError(f"%{name} {why}, so the cut cannot be here: cut before or after it (see fxzip.cut_points)")


def _moves(matching: Matching) -> bool:
    """Whether U gives any model other features, or in another order, than are merged."""
    same = torch.eye(matching.width, dtype=matching.unmerge.dtype)
    return not all(torch.equal(matching.blocks_unmerge(i), same) for i in range(len(matching.sizes)))


def _values(
    captured: Mapping[str, Any],
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    feature_axis: FeatureAxis,
    models: int,
) -> dict[str, Value]:
    values = {}
    for name, value in captured.items():
        _refuse_unreadable(name, value, spaces, matchings)
        featured = feature_axis(name) if isinstance(value, Tensor) else None
        held = [(s, p) for s, p in featured[1] if s in matchings] if featured else []
        if featured is None or not held:
            continue
        axes = tuple(a % value.dim() for a in featured[0])
        length = int(np.prod([value.shape[a] for a in axes]))
        maps = tuple(
            axis_map([(s, p, matchings[s].blocks_unmerge(i)) for s, p in held], length, f"%{name}[axes {axes}]")
            for i in range(models)
        )
        values[name] = Value(axes, frozenset(s for s, _ in held), maps, all(is_identity(m) for m in maps))
    return values


def _written(
    graph_module: fx.GraphModule, network: fx.GraphModule, captured: Mapping[str, Any], cut: Partition
) -> set[str]:
    """Boundary tensors that the private part changes in place (also through views)."""
    copies = {n: copied(v) for n, v in captured.items()}
    before = {n: v._version for n, v in copies.items() if isinstance(v, Tensor)}
    with torch.no_grad():
        network(*(copies[n] for n in cut.boundary))
    written = {n for n, version in before.items() if copies[n]._version != version}
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in graph_module.graph.nodes:
        if node.name in before and any(u.name in cut.private and _in_place(u, modules) for u in node.users):
            written.add(node.name)
    return written


def _in_place(node: fx.Node, modules: Mapping[str, torch.nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    return bool(node.kwargs.get("inplace", False))
