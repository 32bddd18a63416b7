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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from tqdm.auto import tqdm

from ..infer import Spaces
from ..match import Matching
from .affine import BATCH_NORMS, Link, chain, first_result, packet, plain_norm
from .design import design_of
from .fit import Parts, Settings, mixable, mixer_at, nonlinearity, parts_of, solve_point
from .folding import Point
from .lanes import Chunks, Lane, dynamic_nodes, nbytes
from .norms import NORMS, solve_norm
from .passing import passing_nodes, readers
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
    foreign: Sequence[frozenset[str]] = ()  # per model, analysed nodes of what only others have; none: ()
    records: list[Record] = field(default_factory=list)
    fits: list[tuple[Point, Parts, int | None]] = field(default_factory=list)  # all that were made, and whose they are

    def __post_init__(self) -> None:
        self.dynamic = dynamic_nodes(self.spaces.lowered)
        self.shared_names = frozenset(self.dynamic) - self.is_private
        self.lanes = [*self.parents, self.merged, *self.private]
        self.passing = passing_nodes(self.dynamic)
        self.readers = {name: readers(name, self.dynamic, self.passing) for name in self.dynamic}
        for lane in self.lanes:
            lane.passing = self.passing
        self.store = self.merged.store
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.done: set[str] = set()
        self.folded: set[str] = set()  # norms that a contraction's fit has set already

    # -- order ------------------------------------------------------------------------------------

    def run(self, progress: bool) -> None:
        """All nodes, each once; of inputs the values are there."""
        waiting = list(self.dynamic)
        for _ in tqdm(range(len(waiting)), desc="solve", unit="node", disable=not progress, leave=False):
            name, links = self._next(waiting)
            self._step(name, links)
            waiting.remove(name)

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
        return self._bare(name, links) if name in self.shared_names else links

    def _bare(self, name: str, links: list[Link]) -> list[Link]:
        """Without moves at the end, across which all values would be mixed, not only the rows that are drawn; a
        non-linearity has to be seen, though."""
        bare = [k for i, k in enumerate(links) if any(later.kind != "move" for later in links[i:])]
        last = bare[-1].node.name if bare else name
        if len(bare) == len(links) or nonlinearity(links[-1].node.name, links, self.dynamic) is not None:
            return links
        return links if mixer_at(last, self.parents, True, self.spaces, self.matchings) is None else bare

    def _there(self, link: Link) -> bool:
        """Whether the other branch of an addition is computed."""
        other = link.other if link.kind in ("add", "subtract") else None
        return other is None or other.name not in self.dynamic or other.name in self.done

    def _contracts(self, node: fx.Node) -> bool:
        """Data times parameters, as one of DESIGNS knows to regress."""
        design = design_of(node)
        if design is None:
            return False
        data, weight = (argument(node, n) for n in (design.data, design.weight))
        return data.name in self.dynamic and weight.name not in self.dynamic

    def _columns(self, node: fx.Node) -> int:
        """How many inputs each output of a merge point has."""
        design = design_of(node)
        assert design is not None  # `_contracts` was asked first
        weight = torch.empty(argument(node, design.weight).meta["shape"], device="meta")
        return design.matrix(weight, int(argument(node, "groups") or 1)).shape[-1]

    # -- one node ---------------------------------------------------------------------------------

    def _step(self, name: str, links: list[Link] | None) -> None:
        self.store.held = nbytes(self.lanes)
        node, owners = self.dynamic[name], self.owners(name)
        for model, parent in enumerate(self.parents):
            if None in owners or model in owners:
                self._compute(parent, name)
        for model in owners:
            lane = self.merged if model is None else self.private[model]
            if links is not None:
                self._fit(node, lane, links, model)
            elif packet(node) in NORMS and name not in self.folded:
                self._fit_norm(node, lane, model)
            self._compute(lane, name)
        self.done.add(name)
        self._free(node)

    def _compute(self, lane: Lane, name: str) -> None:
        """The values of a node. An operand is spent if all its readers have their values: a fit that aims at it was
        made before they were computed."""
        there = self.done | lane.values.keys() | {name}
        spent = [o for o in self._read_by(name) if self.readers[o] <= there]
        lane.compute(name, self.chunks.own, self.dynamic, spent)

    def owners(self, name: str) -> Sequence[int | None]:
        """Whose values a node has: [None] where it is shared, or else the models that have it."""
        if name not in self.is_private:
            return [None]
        return [k for k in range(len(self.private)) if not self.foreign or name not in self.foreign[k]]

    def _parents(self, model: int | None) -> Sequence[Lane]:
        """Those that a fit aims at: all, or the model whose private layer it is."""
        return self.parents if model is None else [self.parents[model]]

    def _fit(self, node: fx.Node, lane: Lane, links: list[Link], model: int | None) -> None:
        parents, last = self._parents(model), links[-1].node.name if links else node.name
        point = Point(node.name, last, links, lane, parents, model is None)
        parts = parts_of(point, self.spaces, self.matchings)
        if parts is None:  # and a norm behind it is fitted by itself, when it comes to it
            return
        for link in links:
            for parent in parents:
                if link.kind == "norm":
                    self._compute(parent, link.other.name)  # type: ignore[union-attr]
                self._compute(parent, link.node.name)
        outcome = solve_point(point, parts, self.settings, self.chunks, self.dynamic, self.generator)
        self.records.append(Record(node.meta["origin"], packet(node), *outcome, model))
        self.fits.append((point, parts, model))
        self.folded.update(k.other.name for k in links if k.kind == "norm")  # type: ignore[union-attr]

    def _fit_norm(self, node: fx.Node, lane: Lane, model: int | None) -> None:
        first = first_result(node, self.dynamic)
        if first is None or (packet(node) in BATCH_NORMS and not plain_norm(node)):
            return
        parents = self._parents(model)
        for parent in parents:
            self._compute(parent, first.name)
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
            self.generator,
        )
        if record is not None:
            self.records.append(Record(node.meta["origin"], packet(node), *record, model))

    def _free(self, node: fx.Node) -> None:
        """Forget the operands that no node will read any more."""
        for operand in self._read_by(node.name):
            if self.readers[operand] <= self.done:
                for lane in self.lanes:
                    lane.forget(operand)

    def _read_by(self, name: str) -> list[str]:
        """Names of the values that a node reads, of those that are passed on to it as well."""
        found = [i.name for i in self.dynamic[name].all_input_nodes if i.name in self.dynamic]
        return found + [o for i in found if i in self.passing for o in self._read_by(i)]
