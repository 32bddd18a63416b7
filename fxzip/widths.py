"""Budgets: how wide every merged space may be, so that the result costs what the user allows.

FLOPs of every contraction scale with the widths of the spaces it reads and writes. From one share of all widths that
fits, spaces grow in steps of `round_to` where a FLOP buys most, and others get narrower for it where one loses least:
of the unexplained variance of a space's joint correlation (eigenvalues beyond the width), once for every layer that
reads it. A residual stream, which many read, so becomes wider, and what is inside its blocks narrower. A space whose
width cannot change keeps it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .errors import InputError, SpaceError
from .infer import FeatureSpace, Segment, Spaces
from .measure.moments import Moments
from .rewrite import Partition
from .rewrite.parameters import layout
from .solve.affine import packet
from .trace import watched

LEAST = 0.25  # of one model's width: no space becomes narrower


@dataclass(frozen=True)
class Term:
    """FLOPs of one contraction at the parents' widths, times (m / n) for every space in `spaces`."""

    flops: float
    spaces: tuple[str, ...]


def cost_terms(spaces: Spaces, cut: Partition, models: int) -> list[Term]:
    """One Term per contraction with a parameter, per sample; private ones count once per model."""
    axes: dict[str, dict[int, str]] = {}
    for space in spaces:
        for s in space.segments:
            axes.setdefault(s.parameter, {})[s.axis] = space.name
    terms = []
    for name, node in spaces.lowered.parameters.items():
        shape = node.meta["shape"]
        for user in _contractions(node):
            many = models if user.meta.get("origin") in cut.private else 1
            work = 2.0 * _times(node, user) * int(np.prod(shape)) * many
            terms.append(Term(work, tuple(axes.get(name, {}).values())))
    return terms


def _times(parameter: fx.Node, user: fx.Node) -> int:
    """How often a contraction multiplies by each entry of a parameter."""
    data, values, made = user.args[0], user.meta["shape"], 0
    if packet(user) in ("mm", "addmm") and user.args[-1] is parameter:
        made = 1
    if packet(user) == "convolution" and user.args[6] and isinstance(data, fx.Node):
        values = data.meta["shape"]  # transposed: every entry meets what goes in, not what comes out
    return int(np.prod(values)) // max(int(parameter.meta["shape"][made]), 1)


def _contractions(parameter: fx.Node) -> list[fx.Node]:
    """Ops that multiply data by this (at least two-dimensional) parameter."""
    return [
        u
        for u in parameter.users
        if len(parameter.meta["shape"]) >= 2
        and u.op == "call_function"
        and u.meta.get("shape") is not None
        and packet(u) in ("linear", "convolution", "addmm", "mm")
    ]


def flops(terms: Sequence[Term], ratio: Mapping[str, float]) -> float:
    """Total at widths m = ratio * n."""
    return sum(t.flops * prod(ratio.get(s, 1.0) for s in t.spaces) for t in terms)


def resizable(spaces: Spaces, merged: Sequence[FeatureSpace], step: int) -> set[str]:
    """Spaces without block structure, on axes that can be laid out anew at another width."""
    above = {p.space for s in spaces for p in s.parents}
    free = {s.name for s in merged if not s.parents and s.name not in above and not s.orthogonal_only and s.segments}
    by_axis: dict[tuple[str, int], list[tuple[str, Segment]]] = {}
    for space in spaces:
        for s in space.segments:
            by_axis.setdefault((s.parameter, s.axis), []).append((space.name, s))
    for (name, axis), runs in by_axis.items():
        length = spaces.lowered.parameters[name].meta["shape"][axis] * runs[0][1].blocks
        held = [(space, s.positions) for space, s in runs]
        sizes = [len(p) + step * (s in free) for s, p in held]
        try:
            layout(length, [p for _, p in held], sizes, name)
        except SpaceError:
            free -= {s for s, _ in held}
    return free


def allocate(
    terms: Sequence[Term],
    merged: Sequence[FeatureSpace],
    moments: Moments,
    free: Collection[str],
    budget: float,
    round_to: int = 8,
) -> dict[str, int]:
    """Widths [space -> m] of the `free` spaces whose FLOPs stay within `budget` times one network's.

    Raises InputError when even the narrowest widths cost more, naming the least possible budget.
    """
    size = {s.name: s.size for s in merged if s.name in free and s.name in moments}
    one = sum(t.flops for t in terms)
    least = {s: _share(n, LEAST, round_to) for s, n in size.items()}
    if (cost := flops(terms, {s: least[s] / n for s, n in size.items()})) > budget * one:
        raise InputError(
            f"budget={budget}: the narrowest merge costs {cost / one:.2f} times one network; allow that or more"
        )
    left = {s.name: _lost(s, moments[s.name].correlation()) for s in merged if s.name in size}
    widths = _Widths(terms, size, least, {s: sum(moments[s].sizes) for s in size}, left, budget * one, round_to)
    widths.settle()
    return widths.now


@dataclass
class _Widths:
    """Widths that settle where no step and no exchange of steps loses less."""

    terms: Sequence[Term]
    size: Mapping[str, int]
    least: Mapping[str, int]
    most: Mapping[str, int]
    left: Mapping[str, np.ndarray]
    allowed: float  # FLOPs
    step: int
    now: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.touched = {s: [t for t in self.terms if s in t.spaces] for s in self.size}
        shares = np.arange(max((self.most[s] / n for s, n in self.size.items()), default=1), LEAST, -1 / 64)
        self.now = next(w for w in map(self._at, (*shares.tolist(), LEAST)) if self._cost(w) <= self.allowed)

    def _at(self, share: float) -> dict[str, int]:
        """The same share of every width, rounded down but for what is least; 1, the widths as they are."""
        whole = {s: n if share == 1 else int(n * share / self.step) * self.step for s, n in self.size.items()}
        return {s: min(max(w, self.least[s]), self.most[s]) for s, w in whole.items()}

    def _cost(self, widths: Mapping[str, int]) -> float:
        return flops(self.terms, {s: w / self.size[s] for s, w in widths.items()})

    def settle(self) -> None:
        """Grow what gains most per FLOP; where that does not fit, make narrower what loses least per FLOP, as long as
        less is lost in all."""
        spent, given_up = self._cost(self.now), set()
        while wanted := self._rates(1, given_up):
            best = max(wanted, key=wanted.__getitem__)
            held = dict(self.now)
            self._move(best, 1)
            while (spent := self._cost(self.now)) > self.allowed and (rates := self._rates(-1, {best})):
                self._move(min(rates, key=rates.__getitem__), -1)
            if spent <= self.allowed and self._loss(self.now) < self._loss(held) - 1e-9:
                given_up.clear()
            else:
                self.now = held
                given_up.add(best)

    def _rates(self, way: int, without: Collection[str]) -> dict[str, float]:
        """Change in loss per FLOP of one step, wider (1) or narrower (-1), of every space that can take it."""
        ratio = {s: w / self.size[s] for s, w in self.now.items()}
        found = {}
        for s in self.size.keys() - set(without):
            then = self._then(s, way)
            if then != self.now[s]:
                some = self.touched[s]
                cost = flops(some, ratio | {s: then / self.size[s]}) - flops(some, ratio)
                found[s] = float(self.left[s][self.now[s]] - self.left[s][then]) / (cost or way)
        return dict(sorted(found.items()))

    def _then(self, space: str, way: int) -> int:
        return min(max(self.now[space] + way * self.step, self.least[space]), self.most[space])

    def _move(self, space: str, way: int) -> None:
        self.now = self.now | {space: self._then(space, way)}

    def _loss(self, widths: Mapping[str, int]) -> float:
        return sum(float(self.left[s][w]) for s, w in widths.items())


def _share(size: int, share: float, round_to: int) -> int:
    """`share` of a width in steps of `round_to`, at least one step; no more than it is."""
    return min(size, max(1, int(np.ceil(size * share / round_to))) * round_to)


def _lost(space: FeatureSpace, correlation: Tensor) -> np.ndarray:
    """[Sn + 1]: variance left out when the k largest principal directions are kept, relative to what is kept (what is
    lost early no width behind it brings back, so the first ones are dearest); once for every layer that reads it."""
    readers = {(s.parameter, s.axis) for s in space.segments if "consume" in s.roles}
    values = torch.linalg.eigvalsh(correlation).flip(0).clamp(min=0)
    kept = torch.cat([values.new_zeros(1), values.cumsum(0)]) / values.sum().clamp(min=1e-30)
    return ((1 - kept).clamp(min=0) / kept.clamp(min=1e-6)).cpu().numpy() * max(len(readers), 1)


def probe(
    build_at: Callable[[Mapping[str, int]], fx.GraphModule],
    spaces: Spaces,
    graph_module: fx.GraphModule,
    args: tuple,
    widths: Mapping[str, int],
) -> set[str]:
    """Spaces that do not take their new width: where the rewritten network stops, or has another shape than the
    types say. build_at: widths -> the merged GraphModule, any weights."""
    try:
        zipped = build_at(widths)
    except SpaceError as error:
        changed = {s: m for s, m in widths.items() if m != spaces[s].size}
        return _stopped(build_at, changed, error) or set(widths)
    expected = _shapes(graph_module, args)
    found = _shapes(zipped, args)
    wrong: set[str] = set()
    for name, shape in expected.items():
        nodes = spaces.lowered.values.get(name, ())
        if name in found and nodes and found[name] != _resized(shape, spaces.layouts(nodes[0].name), spaces, widths):
            wrong |= {s for k in spaces.layouts(nodes[0].name) for s, _ in k.runs} & set(widths)
    return wrong


def _stopped(
    build_at: Callable[[Mapping[str, int]], fx.GraphModule], widths: Mapping[str, int], error: SpaceError
) -> set[str]:
    """Spaces at whose new widths the network does not run: those that the error at `widths` names, else by halving."""
    named = _mentioned(error, widths)
    if named or len(widths) < 2:
        return named or set(widths)
    names, found = list(widths), set()
    for some in (names[: len(names) // 2], names[len(names) // 2 :]):
        part = {s: widths[s] for s in some}
        try:
            build_at(part)
        except SpaceError as inner:
            found |= _stopped(build_at, part, inner)
    return found or set(widths)


def _mentioned(error: SpaceError, widths: Mapping[str, int]) -> set[str]:
    return {s for s in widths if f" {s} " in f" {error} "}


def _shapes(graph_module: fx.GraphModule, args: tuple) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def see(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            found[node.name] = tuple(value.shape)

    watched(graph_module, args, see)
    return found


def _resized(shape: tuple[int, ...], layouts, spaces: Spaces, widths: Mapping[str, int]) -> tuple[int, ...]:
    """`shape` with every feature axis grown by what its spaces grow."""
    out = list(shape)
    for k in layouts:
        grow = sum((widths.get(s, spaces[s].size) - spaces[s].size) * p.shape[1] for s, p in k.runs)
        if grow and len(k.axes) == 1:
            out[k.axes[0]] += grow
        elif grow:
            return ()  # several axes label these features jointly: no width fits but the old one
    return tuple(out)
