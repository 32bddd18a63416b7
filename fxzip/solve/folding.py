"""A merge point, and its weights as one matrix: norms and scales behind it folded in, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .affine import Link
from .design import Design
from .lanes import Lane
from .slots import Slot, arguments

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Point:
    """A contraction `name` whose target is taken at `last`; links lead from one to the other.

    parents: the lanes whose values at `last` are the target (all N, or the one model that owns a head).
    """

    name: str
    last: str
    links: Sequence[Link]
    lane: Lane
    parents: Sequence[Lane]
    shared: bool

    @property
    def normed(self) -> bool:
        """Whether a norm behind it is folded into its weights."""
        return any(k.kind == "norm" for k in self.links)


def folded(point: Point, design: Design, weight: Slot, bias: Slot | None, groups: int, intercept: bool) -> Tensor:
    """The weights as they are [g, o, p(+1)] in float64, with norm and scale folded in."""
    lane = point.lane
    matrix = design.matrix(lane.state[weight.name].flatten()[weight.index], groups).double()
    g, o, _ = matrix.shape
    shift = lane.state[bias.name].flatten()[bias.index].double() if bias else matrix.new_zeros(g * o)
    for link in point.links:
        if link.kind == "norm":
            given = arguments(_norm(lane, link))
            gamma, beta, mean, var = (lane.static(given[n]) for n in _BATCH_NORM)
            scale = (gamma / torch.sqrt(var + given["eps"])).double()
            matrix, shift = matrix * scale.reshape(g, o, 1), (shift - mean) * scale + beta
        elif link.kind == "scale":
            scale = lane.static(other(lane, link)).double().flatten()
            matrix, shift = matrix * scale.reshape(g, o, 1), shift * scale
    return torch.cat([matrix, shift.reshape(g, o, 1)], -1) if intercept else matrix


def other(lane: Lane, link: Link) -> fx.Node:
    """The second operand of an addition or a scale in this lane's graph, where names may be others."""
    source = lane.nodes[link.source.name]
    return next(n for n in lane.nodes[link.node.name].all_input_nodes if n is not source)


def _norm(lane: Lane, link: Link) -> fx.Node:
    return lane.nodes[link.other.name]  # type: ignore[union-attr]


def write_back(
    point: Point,
    design: Design,
    weight: Slot,
    bias: Slot | None,
    solution: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    intercept: bool,
) -> None:
    """Weights, bias and folded norms into the lane: a folded norm gets the exact statistics of its new input."""
    lane = point.lane
    matrix = solution[..., :-1] if intercept else solution  # [g, o, p]
    shift = solution[..., -1].flatten() if intercept else None  # [g * o]
    weight.write(lane, design.operand(matrix.to(lane.state[weight.name].dtype), weight.index.shape))
    norm = next((k for k in point.links if k.kind == "norm"), None)
    if norm is not None:
        assert shift is not None and statistics is not None  # a norm on the way brings an intercept
        mean, var = statistics
        given, var = arguments(_norm(lane, norm)), var.clamp(min=1e-8)
        values = (torch.sqrt(var + given["eps"]), shift + mean, mean, var)
        for name, value in zip(_BATCH_NORM, values, strict=True):
            lane.write(lane.parameter(given[name]), value)
        shift = torch.zeros_like(mean)
    for link in point.links:
        if link.kind == "scale":
            name = lane.parameter(other(lane, link))
            lane.write(name, torch.ones_like(lane.state[name]))
    if bias is not None and shift is not None:
        bias.write(lane, shift)
