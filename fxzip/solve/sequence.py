"""The solve pass: fit every merge point in order, in closed form, on the merged network's own inputs.

    for each node, in an order in which the other branch of an add comes first:
        if it contracts data with parameters:   W <- ridge(E[x x^T], E[t x^T], W0)
            x  the merged network's actual input;  t  the parents' outputs after the affine chain that
            follows, in merged coordinates, minus what the merged network has in other branches there
        if it is a norm that no contraction absorbed:   fit scale and shift per feature
        advance all lanes

No gradients, no labels, deterministic for a seed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from tqdm.auto import tqdm

from ..infer import Spaces
from ..match import Matching
from .affine import BATCH_NORMS, Link, chain, packet, plain_norm
from .design import design_of
from .fit import Point, Settings, mixable, solve_point
from .lanes import Chunks, Lane, dynamic_nodes, nbytes
from .norms import NORMS, solve_norm
from .slots import argument


@dataclass(frozen=True)
class Record:
    """One fit: relative squared error of the merge point against its target, with zipped and with solved weights.

    model: whose private layer it is, None for a shared one."""

    node: str
    kind: str
    before: float
    after: float
    model: int | None = None


@dataclass
class Pass:
    """State of the pass. parents: lanes of the N models; merged: the shared part; private: one lane per model."""

    parents: Sequence[Lane]
    merged: Lane
    private: Sequence[Lane]
    is_private: frozenset[str]  # analysed node names that are computed per model
    spaces: Spaces
    matchings: Mapping[str, Matching]
    settings: Settings
    chunks: Chunks
    memory: float  # bytes of activations that stay there
    records: list[Record] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self.dynamic = dynamic_nodes(self.spaces.lowered)
        self.shared_names = frozenset(self.dynamic) - self.is_private
        self.readers = {n: sum(u.name in self.dynamic for u in node.users) for n, node in self.dynamic.items()}
        self.outputs = {n.name for n in self.spaces.lowered.graph.output_node().all_input_nodes}
        self.store = self.merged.store
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.done: set[str] = set()
        self.folded: set[str] = set()  # norms that a contraction's fit has set already

    # -- order ------------------------------------------------------------------------------------

    def run(self, progress: bool) -> None:
        """All nodes, each once."""
        waiting = [n for n in self.dynamic if self.dynamic[n].op != "placeholder"]
        self.done = {n for n in self.dynamic if self.dynamic[n].op == "placeholder"}
        bar = tqdm(total=len(waiting), desc="solve", unit="node", disable=not progress, leave=False)
        with bar:
            while waiting:
                name, links = self._next(waiting)
                self._step(name, links)
                waiting.remove(name)
                bar.update()

    def _next(self, waiting: list[str]) -> tuple[str, list[Link] | None]:
        """The first node that can run; a merge point only once the branches its target subtracts are there.

        When merge points wait for each other (the two branches of an add), the one with fewer columns goes
        first and aims at its own output.
        """
        blocked: list[tuple[int, str, list[Link]]] = []
        for name in waiting:
            node = self.dynamic[name]
            if any(i.name in self.dynamic and i.name not in self.done for i in node.all_input_nodes):
                continue
            if not self._contracts(node):
                return name, None
            links = self._links(name)
            stop = next((k for k, link in enumerate(links) if not self._there(link)), None)
            if stop is None:
                return name, links
            blocked.append((self._columns(node), name, links[:stop]))
        _, name, links = min(blocked, key=lambda b: b[0])
        return name, links

    def _links(self, name: str) -> list[Link]:
        inside = self.is_private if name in self.is_private else self.shared_names
        here = self.parents[0].nodes  # at the shape of the data, where the batch is no axis of size 1
        links = chain(self.dynamic[name], self.dynamic, inside, lambda n: tuple(here[n.name].meta["shape"]))
        ends = [k for k, link in enumerate(links) if link.kind in ("add", "subtract")]
        links = links[: ends[0]] if ends and not self.settings.feedback else links
        while links and name in self.shared_names and not mixable(links[-1].node.name, self.parents[0], self.spaces):
            links.pop()
        return links

    def _there(self, link: Link) -> bool:
        other = link.other
        return (
            link.kind not in ("add", "subtract")
            or other is None
            or (other.name not in self.dynamic or other.name in self.done)
        )

    def _contracts(self, node: fx.Node) -> bool:
        """Data times parameters, as one of DESIGNS knows to regress."""
        design = design_of(node)
        if design is None:
            return False
        data, weight = (argument(node, n) for n in (design.data, design.weight))
        return (
            isinstance(weight, fx.Node)
            and weight.name not in self.dynamic
            and isinstance(data, fx.Node)
            and data.name in self.dynamic
        )

    def _columns(self, node: fx.Node) -> int:
        shape = argument(node, design_of(node).weight).meta["shape"]  # type: ignore[union-attr]
        outputs = shape[1] if argument(node, "transposed") else shape[0]
        return int(torch.tensor(shape).prod()) // max(int(outputs), 1)

    # -- one node ---------------------------------------------------------------------------------

    def _step(self, name: str, links: list[Link] | None) -> None:
        private = name in self.is_private
        self.store.room = self.memory - nbytes([*self.parents, self.merged, *self.private])
        lanes = list(self.private) if private else [self.merged]
        for parent in self.parents:
            parent.compute(name, self.chunks.own, self.dynamic)
        node = self.dynamic[name]
        for i, lane in enumerate(lanes):
            if links is not None:
                self._fit(name, lane, links, i if private else None)
            elif packet(node) in NORMS and name not in self.folded:
                self._fit_norm(node, lane, i if private else None)
            lane.compute(name, self.chunks.own, self.dynamic)
        self.done.add(name)
        self.peak = max(self.peak, nbytes([*self.parents, self.merged, *self.private]))
        self._free(node)

    def _fit(self, name: str, lane: Lane, links: list[Link], model: int | None) -> None:
        last = links[-1].node.name if links else name
        for link in links:
            for parent in self.parents if model is None else [self.parents[model]]:
                if link.kind == "norm" and link.other is not None:
                    parent.compute(link.other.name, self.chunks.own, self.dynamic)
                parent.compute(link.node.name, self.chunks.own, self.dynamic)
        point = Point(name, last, links, lane, self.parents if model is None else [self.parents[model]], model is None)
        record = solve_point(
            point, self.spaces, self.matchings, self.settings, self.chunks, self.dynamic, self.generator
        )
        if record is not None:
            self.records.append(
                Record(self.dynamic[name].meta.get("origin") or name, packet(self.dynamic[name]), *record, model)
            )
            self.folded.update(k.other.name for k in links if k.kind == "norm" and k.other is not None)

    def _fit_norm(self, node: fx.Node, lane: Lane, model: int | None) -> None:
        first = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)
        if first is None or first.name not in self.dynamic:
            return
        if packet(node) in BATCH_NORMS and not plain_norm(node):
            return
        parents = self.parents if model is None else [self.parents[model]]
        for parent in parents:
            parent.compute(first.name, self.chunks.own, self.dynamic)
        record = solve_norm(
            node,
            first.name,
            lane,
            parents,
            model is None,
            self.spaces,
            self.matchings,
            self.settings,
            self.chunks,
            self.dynamic,
        )
        if record is not None:
            self.records.append(Record(node.meta.get("origin") or node.name, packet(node), *record, model))

    def _free(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand.name not in self.readers:
                continue
            self.readers[operand.name] -= 1
            if self.readers[operand.name] == 0 and operand.name not in self.outputs:
                for lane in (*self.parents, self.merged, *self.private):
                    lane.values.pop(operand.name, None)
