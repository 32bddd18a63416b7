"""Lowered graphs of all models at the batch shapes of the calibration data, and anchors found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from ..errors import SpaceError
from ..infer import Anchor, FeatureSpace, Spaces, infer
from ..trace import run, state_of
from ..trace.lower import Lowered, corresponding, lower


@dataclass
class Programs:
    """N models of one graph, ready to run at any batch shape with chosen values observed.

    Graphs are lowered once per batch shape and shared by models whose parameters have the same shapes.
    """

    graph_modules: Sequence[fx.GraphModule]
    spaces: Spaces
    states: Sequence[Mapping[str, Tensor]] = ()
    _lowered: dict[tuple, tuple[Lowered, Mapping[str, str]]] = field(default_factory=dict)
    _anew: dict[tuple, Spaces] = field(default_factory=dict)  # spaces inferred at another batch shape

    def __post_init__(self) -> None:
        self.states = self.states or [state_of(m) for m in self.graph_modules]
        shapes = [tuple((n, tuple(t.shape)) for n, t in s.items()) for s in self.states]
        self.owner = [shapes.index(s) for s in shapes]  # model i runs the graph of model owner[i]

    def lowered(self, model: int, args: tuple) -> tuple[Lowered, Mapping[str, str]]:
        """(graph of `model` at the shapes of `args`, node name in the analysed graph -> node name in it)."""
        key = (self.owner[model], _shapes(args))
        if key not in self._lowered:
            graph = lower(self.graph_modules[self.owner[model]], args)
            self._lowered[key] = graph, corresponding(self.spaces.lowered, graph)
        return self._lowered[key]

    def observe(self, model: int, args: tuple, names: Sequence[str], sink) -> None:
        """Run one model on one batch; sink(name, value) for every analysed node name in `names`."""
        graph, twin = self.lowered(model, args)
        back = {twin[n]: n for n in names}
        nodes = [n for n in graph.graph.nodes if n.name in back]
        run(graph, self.states[model], args, wanted=nodes, sink=lambda node, value: sink(back[node.name], value))

    def visible(self, space: FeatureSpace, args: tuple) -> list[Anchor]:
        """The anchors of `space` at this batch shape: those whose feature axes have the size they were analysed
        with; if there is none, because the batch is flattened into them, what inference finds at this shape.

        Raises SpaceError when that does not show the space either.
        """
        graph, twin = self.lowered(0, args)
        now = {n.name: n.meta.get("shape") for n in graph.graph.nodes}
        then = {n.name: n.meta.get("shape") for n in self.spaces.lowered.graph.nodes}
        fits = [a for a in space.anchors if all(now[twin[a.node]][x] == then[a.node][x] for x in a.axes)]
        return fits if fits or not space.anchors else self._inferred_anew(space, args)

    def _inferred_anew(self, space: FeatureSpace, args: tuple) -> list[Anchor]:
        graph, twin = self.lowered(0, args)
        key = _shapes(args)
        if key not in self._anew:
            self._anew[key] = infer(graph)
        back = {b: a for a, b in twin.items()}
        wanted = {a.node for a in space.anchors}  # tell blocks apart, which have no parameters
        same = (s for s in self._anew[key] if s.size == space.size and _uses(s) == _uses(space))
        found = [replace(a, node=back[a.node]) for s in same for a in s.anchors if back[a.node] in wanted]
        if not found:
            raise SpaceError(
                f"{space.name}: at this batch size its features are flattened together with the batch in "
                f"%{space.anchors[0].node}; it cannot be measured"
            )
        return found


def _uses(space: FeatureSpace) -> set[tuple]:
    return {(s.parameter, s.axis, s.positions.tobytes()) for s in space.segments}


def _shapes(args: Any) -> tuple:
    return tuple((tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else repr(x) for x in tree_flatten(args)[0])


def rows_in(anchor: Anchor, shape: tuple[int, ...]) -> int:
    """How many rows `rows_of` gives of a value of this shape."""
    n, t = anchor.positions.shape
    features = prod(shape[a] for a in anchor.axes)
    return prod(shape) // features * (t if n else 1) if features else 0


def rows_at(value: Tensor, index: Tensor, samples: int) -> Tensor:
    """Rows of a value whose first `samples` axes are samples, all others features; what is not chosen is not copied.
    [..., *features] -> [r, features]"""
    if not samples:
        return value.unsqueeze(0).expand(len(index), *value.shape).flatten(1)
    if value.is_contiguous():  # rows side by side are found faster than places
        return value.flatten(0, samples - 1).index_select(0, index).flatten(1)
    return value[torch.unravel_index(index, value.shape[:samples])].flatten(1)


def rows_of(anchor: Anchor, value: Tensor, chosen: Tensor | None = None) -> Tensor:
    """[samples, n]: the features of `anchor` in `value`, one row per sample (batch item, pixel or token; along axes
    in an order of the model's own, per rank). chosen: int64, only these rows; the others are not even copied."""
    if chosen is None:
        chosen = torch.arange(rows_in(anchor, tuple(value.shape)))
    chosen = chosen.to(value.device)
    rest = [i for i in range(value.dim()) if i not in anchor.axes and i not in anchor.unordered]
    value = value.permute(*rest, *anchor.unordered, *anchor.axes)
    if anchor.unordered:
        flat = value.flatten(len(rest) + len(anchor.unordered))  # [..., ranks, features and what is flattened in]
        flat = flat.reshape(*flat.shape[: len(rest)], -1, flat.shape[-1])
        value, rest = flat.sort(-2).values, [*rest, -1]
    n, t = anchor.positions.shape  # t samples lie side by side along the features
    flat = rows_at(value, chosen // t, len(rest))
    if t == 1 and np.array_equal(anchor.positions[:, 0], np.arange(flat.shape[1])):
        return flat
    index = torch.from_numpy(anchor.positions.T.copy()).to(flat.device)  # [t, n]
    return flat.gather(1, index[chosen % t])
