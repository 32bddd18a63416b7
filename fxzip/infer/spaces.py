"""Feature spaces: what inference found out, as every later stage sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import networkx as nx
    from torch import fx

    from ..trace.lower import Lowered


MAKES = frozenset({"produce", "vector"})  # roles in which an axis holds features; "consume" reads them


@dataclass(frozen=True)
class Segment:
    """One space on one parameter axis: feature k sits at index `positions[k]` of that axis.

    roles: "produce" (apply M), "consume" (apply U), "vector" (apply M). An axis may hold several
    segments, of several spaces (concatenation) or of one space twice (packed q and k).
    blocks: above 1, the axis has features of its own in each of so many equal blocks of axis 0, and `positions` are
    indices of (block, index on the axis), flattened: the input side of a grouped convolution, see `inner`.
    """

    parameter: str
    axis: int
    positions: np.ndarray  # int64 [n]
    roles: frozenset[str]
    blocks: int = 1


@dataclass(frozen=True)
class Anchor:
    """A value in which the features are visible: feature k is at the entries `positions[k]` of its
    row-major flattened `axes` (several where pixels were flattened in, each a sample); the other axes
    are samples. Those in `unordered` hold features of another space, whose order differs between models: there
    only the set of values is comparable."""

    node: str
    axes: tuple[int, ...]
    positions: np.ndarray  # int64 [n, t]
    weight: float = 1.0  # in the pooled moments
    unordered: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The features on jointly labelled axes of one value: per space the positions [n, t] of its features in
    the row-major flattened `axes`, as in `Anchor`. Positions of no space are inert."""

    axes: tuple[int, ...]
    runs: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class Parent:
    """Every feature of a child space belongs to one feature (block) of the parent: a head-dim to its head."""

    space: str
    index: np.ndarray  # int64 [n]


@dataclass(frozen=True)
class FeatureSpace:
    """A set of `size` features the network may re-coordinate without changing what it computes.

    The group: any permutation of the parents' features, and any permutation among features whose
    parents agree (a wreath product). Without segments it is a pure block space (attention heads).
    """

    name: str
    size: int
    parents: tuple[Parent, ...] = ()
    segments: tuple[Segment, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    nonlinear: frozenset[str] = frozenset()
    orthogonal_only: bool = False

    @property
    def blocks(self) -> np.ndarray:
        """int64 [n]: features with equal block may be exchanged; one block when there is no parent."""
        if not self.parents:
            return np.zeros(self.size, np.int64)
        return np.unique(np.stack([p.index for p in self.parents], 1), axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def structure(self) -> str:
        """`64`, or `12 x 64` for twelve blocks of 64."""
        sizes = np.bincount(self.blocks)
        if len(sizes) == 1:
            return str(self.size)
        inner = str(sizes[0]) if (sizes == sizes[0]).all() else f"{sizes.min()}..{sizes.max()}"
        return f"{len(sizes)} x {inner}"

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.parameter for s in self.segments))


@dataclass(frozen=True)
class Frozen:
    """An op that pinned what it touches, and why."""

    node: str
    op: str
    line: str
    reason: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" at {self.line}" if self.line else ""
        return f"frozen: %{self.node} ({self.op}){where}, {self.reason}"


@dataclass(frozen=True)
class Spaces:
    """All spaces of one graph, parents before children, with what stays unmerged and why."""

    spaces: tuple[FeatureSpace, ...]
    frozen: tuple[Frozen, ...]
    untouched: tuple[str, ...]
    opaque: frozenset[str]
    lowered: Lowered = field(repr=False)
    layouts: Callable[[str], tuple[Layout, ...]] = field(repr=False, default=lambda name: ())
    graph_module: fx.GraphModule | None = field(repr=False, default=None)
    notices: tuple[str, ...] = ()  # of the trace: which front end, and what it could not keep

    def __iter__(self) -> Iterator[FeatureSpace]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, name: str) -> FeatureSpace:
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(name)

    def __str__(self) -> str:
        from .show import table

        return table(self)

    def explain(self, name: str) -> str:
        """What lies on the spaces of module, parameter or space `name`; KeyError with near names otherwise."""
        from .show import explain

        return explain(self, name)

    def to_networkx(self) -> nx.DiGraph:
        """The dataflow of the lowered graph with spaces as node attributes."""
        from .show import to_networkx

        return to_networkx(self)

    def readable(self, lowered: bool = False) -> str:
        """The traced graph, a line per node, with the spaces on its axes; lowered: the graph of ATen operators."""
        from .annotate import readable
        from .show import readable_lowered

        if lowered:
            return readable_lowered(self)
        return readable(self.graph_module) if self.graph_module is not None else ""

    def _repr_html_(self) -> str:
        from .show import table_html

        return table_html(self)
