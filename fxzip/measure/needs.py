"""What measuring takes, in bytes, from shapes alone; and the passes over the batches that a cap allows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx
from torch.utils._pytree import tree_flatten

from ..infer import FeatureSpace
from ..trace import batch_size
from ..trace.lower import Lowered
from .collect import places, quota
from .gram import TILE
from .moments import ROWS
from .programs import Programs, rows_in


@dataclass(frozen=True)
class SpaceNeed:
    """Bytes for one space of Sn features of all models together.

    sums: its second moments, 8 Sn^2. rows: what is held of a batch until the last model has run, on the batch that
    takes most. work: while those rows are added, or the sums become moments."""

    name: str
    features: int
    sums: int
    rows: int
    work: int


@dataclass(frozen=True)
class Needs:
    """forward: activations of one model on the batch that takes most. copies: of all sums, where a checkpoint is
    written from them."""

    forward: int
    spaces: tuple[SpaceNeed, ...]
    copies: int = 0

    def of(self, spaces: Sequence[SpaceNeed]) -> int:
        """Bytes that one pass takes that measures these.

        >>> Needs(5, ()).of([SpaceNeed("s0", 2, 32, 10, 40), SpaceNeed("s1", 1, 8, 10, 20)])
        105
        """
        sums = sum(s.sums for s in spaces) * (1 + self.copies)
        return self.forward + sums + sum(s.rows for s in spaces) + max((s.work for s in spaces), default=0)

    def passes(self, cap: float) -> tuple[tuple[str, ...], ...]:
        """Names of the spaces of each pass: in order, as many at a time as stay below `cap`, but one at least.

        >>> Needs(0, tuple(SpaceNeed(n, 1, 8, 0, 0) for n in "abc")).passes(16)
        (('a', 'b'), ('c',))
        """
        found: list[list[SpaceNeed]] = []
        for space in self.spaces:
            if found and self.of([*found[-1], space]) <= cap:
                found[-1].append(space)
            else:
                found.append([space])
        return tuple(tuple(s.name for s in group) for group in found)


def needs(
    programs: Programs, spaces: Sequence[FeatureSpace], batches: Iterable[tuple], count: int, copies: int = 0
) -> Needs:
    """Of measuring `spaces` as `collect_moments` does on these arguments."""
    models, forward = len(programs.states), 0
    held = {s.name: (0, 0) for s in spaces}
    forms = {repr([getattr(x, "shape", x) for x in tree_flatten(b)[0]]): b for b in batches}
    for args in forms.values():
        forward = max(forward, *(peak(programs.lowered(i, args)[0]) for i in range(models)))
        share = max(batch_size(args), 1) / max(count, batch_size(args), 1)
        for name, need in _rows(programs, spaces, args, share).items():
            held[name] = max(held[name][0], need[0]), max(held[name][1], need[1])
    every = []
    for space in spaces:
        features = models * space.size
        rows, work = held[space.name]
        sums = 8 * features**2
        every.append(SpaceNeed(space.name, features, sums, rows, max(work + 4 * TILE * features, sums + sums // 8)))
    return Needs(forward, tuple(every), copies)


def _rows(programs: Programs, spaces: Sequence[FeatureSpace], args: tuple, share: float) -> dict[str, tuple[int, int]]:
    """Space -> (bytes of rows and of their numbers until the last model, bytes while those of one anchor are added)."""
    graph, twin = programs.lowered(0, args)
    nodes = {n.name: n for n in graph.graph.nodes}
    anchors, _ = places(programs, spaces, args)
    models, found = len(programs.states), {}
    for space in spaces:
        held = most = 0
        for i, anchor in enumerate(anchors[space.name]):
            node = nodes[twin[anchor.node]]
            every = rows_in(anchor, tuple(node.meta["shape"]))
            rows = min(every, quota(space, anchors[space.name], i, models, share))
            size = rows * space.size * node.meta["dtype"].itemsize  # of one model
            held += (models - 1) * size + 8 * rows
            centred = 8 * min(rows, ROWS) * models * space.size  # rows less their mean, and its absolute values
            most = max(most, models * size + centred)
        found[space.name] = held, most
    return found


def peak(lowered: Lowered, wanted: Callable[[fx.Node], bool] = lambda _: True) -> int:
    """Bytes of the values that are alive together, at most, while `run` goes through the graph; views cost nothing.

    >>> import torch; from fxzip.trace.lower import lower
    >>> net = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())).eval()
    >>> peak(lower(net, (torch.ones(2, 4),)))  # two values of 2 x 8 float32
    128
    """
    order = [n for n in lowered.graph.nodes if n.op == "call_function" and "const" not in n.meta and wanted(n)]
    root: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for k, node in enumerate(order):
        viewed: fx.Node = node.all_input_nodes[0] if _is_view(node) and node.all_input_nodes else node
        root[node] = root.get(viewed, viewed)
        used: fx.Node
        for used in (node, *node.all_input_nodes):
            last[root.get(used, used)] = k
    ends: dict[int, list[fx.Node]] = {}
    for node, k in last.items():
        ends.setdefault(k, []).append(node)
    now = most = 0
    for k, node in enumerate(order):
        now += size_of(node) if root[node] is node else 0
        most = max(most, now)
        now -= sum(size_of(n) for n in ends.get(k, ()) if root.get(n) is n)
    return most


def size_of(node: fx.Node) -> int:
    """Bytes of a node's value, or of all its results."""
    several = node.meta.get("results") or [(node.meta["shape"], node.meta["dtype"])]
    return sum(prod(r[0]) * r[1].itemsize for r in several if r is not None)


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)
