"""What is known of the models before the data are touched, as a value; and the seconds of the stages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .infer import Anchor, FeatureSpace, Spaces
from .match import Weights, reading
from .measure.moments import Moments
from .padding import Real
from .rewrite import Partition, Stems, Tails, owned
from .trace import Traced
from .verification import Verification


@dataclass
class Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


_LATER: Any = None  # what `begin` leaves open


@dataclass(frozen=True)
class Prepared:
    """N traced models of one graph; from `infer_spaces` on with its spaces, from `cut_graph` on with its cut.

    args: example arguments, two samples. call: what the user called, for messages. models: the user's, see
    `Checked`; notices: what was done to them. shares: what each counts in the means, adding up to 1.
    real, unpadded, widest: of models whose widths differ, see `padding`. tails: of models that end differently.
    stems: where what comes before `since` stays per model; traced and args are those of the rest then.
    """

    call: str
    names: tuple[str, ...]
    as_dict: bool
    traced: tuple[Traced, ...]
    args: tuple
    device: torch.device
    loader: Iterable | Mapping | None
    spaces: Spaces = _LATER
    cut: Partition = _LATER
    verification: Verification | None = None
    models: tuple[nn.Module, ...] = ()
    notices: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    real: Real = field(default_factory=dict)
    unpadded: tuple[Traced, ...] = ()
    widest: int = 0
    tails: Tails | None = None
    stems: Stems | None = None

    @property
    def graph_modules(self) -> list:
        return [t.graph_module for t in self.traced]

    @property
    def own(self) -> list:
        """The models' graphs before they were made alike."""
        if self.stems:
            return [t.graph_module for t in self.stems.own]
        return list(self.tails.own) if self.tails else [t.graph_module for t in self.unpadded or self.traced]

    @property
    def foreign(self) -> list[frozenset[str]]:
        """Per model, the nodes of `graph_modules` that only others have."""
        return [self.tails.foreign(k) if self.tails else frozenset() for k in range(len(self.names))]

    @property
    def copies(self) -> dict[str, int]:
        """Of nodes that models keep, how many have one."""
        return {n: sum(n not in of for of in self.foreign) for n in self.cut.private}

    def merged_spaces(self) -> list[FeatureSpace]:
        """Spaces that shared parameters lie on, with their parents; anchors in the shared part only."""
        return shared_spaces(self.spaces, self.cut, owned(self.graph_modules[0], self.cut.shared))

    def reading(self, moments: Moments) -> Callable[[str, Any], Any]:
        """A function of a space's name and its moments, of those given: these with what reads the features, in the
        shared part and in the heads (see `match.Read`)."""
        states = [dict(m.named_parameters()) for m in self.graph_modules]
        for model, state, foreign in zip(self.graph_modules, states, self.foreign, strict=True):
            for name in owned(model, foreign):
                state.pop(name, None)
        known = {s.name: s for s in self.merged_spaces()}
        return lambda name, seen: reading(known[name], seen, states, self.real)

    def weights(self) -> Weights:
        """The shared parameters of all models, for matchers that compare weights; no buffers."""
        states = [dict(m.named_parameters(remove_duplicate=False)) for m in self.graph_modules]
        tied = self.spaces.lowered.tied
        shared = {tied.get(n, n) for n in owned(self.graph_modules[0], self.cut.shared)}
        return Weights.of(states, self.merged_spaces(), shared, self.real)


def shared_spaces(spaces: Spaces, cut: Partition, parameters: Iterable[str]) -> list[FeatureSpace]:
    """Spaces that a shared parameter holds, or a value that private parts read, and all their ancestors. Where their
    features would be measured in a private part, they are measured in what that part reads."""
    shared = {spaces.lowered.tied.get(p, p) for p in parameters}
    wanted = {s.name for s in spaces if any(g.parameter in shared for g in s.segments)}
    border: dict[str, list[Anchor]] = defaultdict(list)
    for node in (v for name in cut.boundary for v in spaces.lowered.values.get(name, ())):
        layouts = spaces.layouts(node.name)
        for name, positions in (run for layout in layouts for run in layout.runs):
            wanted.add(name)
            border[name] += [Anchor(node.name, layouts[0].axes, positions)] * (len(layouts) == 1)
    for space in reversed(spaces.spaces):
        if space.name in wanted:
            wanted |= {p.space for p in space.parents}
    origin = {n.name: n.meta.get("origin") for n in spaces.lowered.graph.nodes}
    found = []
    for space in spaces:
        if space.name in wanted:
            inside = [a for a in space.anchors if origin[a.node] in cut.shared]
            if any(a.weight == 1 for a in space.anchors if origin[a.node] not in cut.shared):
                inside += [a for a in border[space.name] if (a.node, a.axes) not in {(b.node, b.axes) for b in inside}]
            found.append(replace(space, anchors=tuple(inside) or space.anchors))
    return found
