"""Budgets: how wide every merged space may be, so that the result costs what the user allows.

FLOPs of every contraction scale with the widths of the spaces it reads and writes. From the models' widths (or,
below 1, from the same share of each that fits) widths grow in steps of `round_to`, each time where a FLOP buys most:
the drop in unexplained variance of a space's joint correlation (eigenvalues beyond the width), once for every layer
that reads it, per FLOP. A space whose width cannot change keeps it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .errors import InputError, SpaceError
from .infer import FeatureSpace, Segment, Spaces
from .measure.moments import Moments
from .rewrite import Partition
from .rewrite.axes import layout
from .solve.affine import packet
from .trace import watched

LEAST = 0.25  # no space becomes narrower than this share of one model's width


@dataclass(frozen=True)
class Term:
    """FLOPs of one contraction at the parents' widths. axes: of every axis of its parameter, which share of it which
    space has; FLOPs go with the product over the axes of what their lengths become."""

    flops: float
    axes: tuple[Mapping[str, float], ...] = ()

    def at(self, ratio: Mapping[str, float]) -> float:
        """FLOPs at widths m = ratio * n."""
        lengths = (1 + sum(share * (ratio.get(s, 1.0) - 1) for s, share in axis.items()) for axis in self.axes)
        return self.flops * prod(lengths)


def cost_terms(spaces: Spaces, cut: Partition, models: int) -> list[Term]:
    """One Term per contraction with a parameter, per sample; private ones count once per model."""
    axes: dict[str, dict[int, dict[str, float]]] = {}
    for space in spaces:
        for s in space.segments:
            length = spaces.lowered.parameters[s.parameter].meta["shape"][s.axis] * s.blocks
            shares = axes.setdefault(s.parameter, {}).setdefault(s.axis, {})
            shares[space.name] = shares.get(space.name, 0.0) + s.positions.size / length
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
    return sum(t.at(ratio) for t in terms)


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
    one = flops(terms, {})
    width = _start(terms, size, budget * one, round_to)
    if width is None:
        least = flops(terms, {s: _share(n, LEAST, round_to) / n for s, n in size.items()}) / one
        raise InputError(
            f"budget={budget}: the narrowest merge costs {least:.2f} times one network; allow that or more"
        )
    left = {s.name: _unexplained(moments[s.name].correlation()) * _readers(s) for s in merged if s.name in size}
    most = {s: sum(moments[s].sizes) for s in size}
    growing = set(size)
    while growing:
        now = flops(terms, {s: width[s] / size[s] for s in size})
        best, gain = None, 0.0
        for s in sorted(growing):
            wider = min(width[s] + round_to, most[s])
            extra = flops(terms, {k: (wider if k == s else width[k]) / size[k] for k in size}) - now
            if wider == width[s] or now + extra > budget * one:
                growing.discard(s)
                continue
            value = float(left[s][width[s]] - left[s][wider]) / max(extra, 1.0)
            if best is None or value > gain:
                best, gain = s, value
        if best is not None:
            width[best] = min(width[best] + round_to, most[best])
    return width


def _start(terms: Sequence[Term], size: Mapping[str, int], most: float, round_to: int) -> dict[str, int] | None:
    """The models' own widths, or the largest common share of them that costs at most `most` FLOPs; None: none does."""
    for share in np.arange(1, LEAST - 1e-9, -1 / 64):
        width = {s: _share(n, float(share), round_to) for s, n in size.items()}
        if flops(terms, {s: width[s] / n for s, n in size.items()}) <= most:
            return width
    return None


def _share(size: int, share: float, round_to: int) -> int:
    """`share` of a width in steps of `round_to`, at least one step; whole, the width as it is."""
    return size if share == 1 else min(size, max(1, int(np.ceil(size * share / round_to))) * round_to)


def _readers(space: FeatureSpace) -> int:
    """How many layers contract over the features: of a residual stream many."""
    return max(len({(s.parameter, s.axis) for s in space.segments if "consume" in s.roles}), 1)


def _unexplained(correlation: Tensor) -> np.ndarray:
    """[Sn + 1]: share of variance left when the k largest principal directions are kept."""
    values = torch.linalg.eigvalsh(correlation).flip(0).clamp(min=0)
    left = 1 - torch.cat([values.new_zeros(1), values.cumsum(0)]) / values.sum().clamp(min=1e-30)
    return left.cpu().numpy()


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
