"""Lanes: the parents and the merged network, advanced through one lowered graph in step.

A lane holds parameters and the values of one network on all calibration samples, chunk by chunk, keyed
by the node names of the analysed graph. Values are freed after their last reader; beyond the memory cap they
are mapped to temporary files, which change nothing but the time. What is made of a value for next to nothing (views,
parts of a tuple, batch norms) is not kept beside it but made whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from ..allocator import relieve
from ..memory import Store
from ..processes import ALONE, Processes
from ..trace import Lowered, kernel, overwriting


@dataclass(frozen=True)
class Chunks:
    """The calibration samples in `total` chunks of one size, dealt to the ranks, so many `together` that a sum over
    those is the same on any number of them; a lane holds those of its own.

    >>> list(Chunks(3)), list(Chunks(3, Processes(rank=1, world=2)))
    ([0, 1, 2], [None, 0, None])
    """

    total: int
    processes: Processes = ALONE
    together: int = 1

    def mine(self, k: int) -> bool:
        """Whether chunk k is dealt to this rank."""
        return self.processes.mine(k // self.together)

    def ends(self, k: int) -> bool:
        """Whether chunk k is the last of those that are dealt together."""
        return (k + 1) % self.together == 0 or k + 1 == self.total

    @property
    def own(self) -> int:
        return sum(map(self.mine, range(self.total)))

    def __iter__(self) -> Iterator[int | None]:
        """For every chunk in order where it is in this rank's lanes; None: in another's."""
        places = count()
        for k in range(self.total):
            yield next(places) if self.mine(k) else None


@dataclass
class Lane:
    """One network. nodes: analysed name -> node of its own lowered graph; state: parameters by name; share: what it
    counts in the means, of a parent."""

    lowered: Lowered
    nodes: Mapping[str, fx.Node]
    state: dict[str, Tensor]
    store: Store
    values: dict[str, list[Any]] = field(default_factory=dict)  # name -> one value per chunk
    absorbed: frozenset[str] = frozenset()  # spaces that heads read in merged coordinates
    fallback: Callable[[str, int], Any] | None = None  # values that another lane computes
    share: float = 1.0
    passing: Mapping[str, str] = field(default_factory=dict)  # see `passing.py`
    ready: set[str] = field(default_factory=set)  # those of them whose operand is there
    _static: dict[fx.Node, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.nodes.items()}
        self.aliases = {}
        for other, first in self.lowered.tied.items():
            self.aliases.setdefault(first, []).append(other)
        self.device = next((t.device for t in self.state.values()), torch.device("cpu"))

    def parameter(self, node: fx.Node) -> str:
        """The name in `state` of a parameter placeholder (tied tensors go by any of their names)."""
        first = node.meta["parameter"]
        return next((n for n in (first, *self.aliases.get(first, ())) if n in self.state), first)

    def static(self, node: fx.Node, given: Mapping[str, Tensor] | None = None) -> Any:
        """The value of a node that depends on parameters and constants only; `given` replaces parameters."""
        if "parameter" in node.meta and "const" not in node.meta:
            name = self.parameter(node)
            return given[name] if given is not None else self.state[name]
        if "const" in node.meta:
            return self.written(node.meta["const"])
        if given is None and node in self._static:
            return self._static[node]
        value = self.apply(node, lambda n: self.static(n, given))
        if given is None:
            self._static[node] = value
        return value

    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter; what was computed from parameters is forgotten."""
        self.state[name] = value.to(self.state[name])
        self._static.clear()

    def apply(self, node: fx.Node, read: Callable[[fx.Node], Any], target: Any = None) -> Any:
        """Run one op, or `target` instead of it, with operands from `read`."""
        args = map_aggregate(node.args, lambda x: read(x) if isinstance(x, fx.Node) else self.written(x))
        kwargs = map_aggregate(node.kwargs, lambda x: read(x) if isinstance(x, fx.Node) else self.written(x))
        return kernel(node, target)(*args, **kwargs)

    def written(self, x: Any) -> Any:
        """A constant or a dtype of the graph, as this lane takes it."""
        return x

    def value(self, name: str, chunk: int) -> Any:
        if name in self.values:
            held = self.values[name][chunk]
            if isinstance(held, Tensor):  # as most are: a tree costs as much as a small operator
                return held.to(self.device)
            return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, held)
        if name in self.ready:
            source = self.passing[name]
            read = lambda n: self.value(source, chunk) if self.names.get(n) == source else self.static(n)  # noqa: E731
            return self.apply(self.nodes[name], read)
        assert self.fallback is not None, name
        return self.fallback(name, chunk)

    def operand(self, node: fx.Node, chunk: int, dynamic: Mapping[str, Any]) -> Any:
        """The value of an operand node: computed in a lane if its name is in `dynamic`, static otherwise."""
        name = self.names.get(node)
        return self.value(name, chunk) if name is not None and name in dynamic else self.static(node)

    def compute(self, name: str, chunks: int, dynamic: Mapping[str, Any], spent: Collection[str] = ()) -> None:
        """Values of one node on all chunks. spent: names of operands that nobody else will read in this lane; they are
        forgotten chunk by chunk, or written over, so that what comes next finds their memory at hand."""
        if self.has(name):
            return
        if name in self.passing:
            self.ready.add(name)
            return
        node, made = self.nodes[name], []
        left = {o: list(self.values[o]) for o in spent if o in self.values}
        self.values |= left
        first = self.names.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        fresh = first in self.ready and self.passing[first] in self.ready  # the result of a norm, made just now
        for j in range(chunks):
            known: dict[fx.Node, Any] = {}

            def read(n: fx.Node, j: int = j, known: dict[fx.Node, Any] = known) -> Any:
                if n not in known:
                    known[n] = self.operand(n, j, dynamic)
                return known[n]

            target = overwriting(node, read) if first in left or fresh else node.target
            value = self.apply(node, read, target)
            if over := target is not node.target and first in left:
                made.append(value)  # where its operand was
            else:
                made.append(self.store.keep(value, [of[j] for of in left.values()]))
            for operand, chunks_of in left.items():
                self.store.held -= 0 if over and operand == first else _size(chunks_of[j])
                chunks_of[j] = None
        self.values[name] = made
        relieve()

    def has(self, name: str) -> bool:
        """Whether the values of a node are there, or at hand."""
        return name in self.values or name in self.ready

    def forget(self, name: str) -> None:
        self.values.pop(name, None)
        self.ready.discard(name)


def dynamic_nodes(lowered: Lowered) -> dict[str, fx.Node]:
    """Nodes that depend on inputs and that an output depends on, in graph order, inputs included."""
    depends = set(lowered.inputs)
    for node in lowered.graph.nodes:
        if node.op == "call_function" and any(i in depends for i in node.all_input_nodes):
            depends.add(node)
    needed: set[fx.Node] = set()
    stack = [n for n in lowered.graph.output_node().all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in needed and node in depends:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return {n.name: n for n in lowered.graph.nodes if n in needed}


def nbytes(lanes: list[Lane]) -> int:
    """Bytes of memory that all values take; those in files take none."""
    return sum(_size(v) for lane in lanes for chunks in lane.values.values() for v in chunks)


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        mapped = value.is_cpu and value.untyped_storage().is_shared()
        return 0 if mapped else value.numel() * value.element_size()
    return sum(_size(v) for v in value) if isinstance(value, (tuple, list)) else 0
