"""Norms that no contraction absorbed: scale and shift fitted per feature, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..infer import Spaces
from ..match import Matching
from ..measure.programs import rows_at
from .affine import BATCH_NORMS, packet
from .design import pick
from .fit import Mix, Outcome, Settings, mixer_at
from .lanes import Chunks, Lane
from .mixing import Mixer
from .slots import Slot, argument, arguments

NORMS = BATCH_NORMS | {"native_layer_norm", "native_group_norm"}


def solve_norm(
    node: fx.Node,
    first: str,
    lane: Lane,
    parents: Sequence[Lane],
    shared: bool,
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    settings: Settings,
    chunks: Chunks,
    dynamic: Mapping[str, fx.Node],
    generator: torch.Generator,
) -> Outcome | None:
    """Scale and shift of a norm, per feature, towards the parents' outputs, on `settings.least` rows; batch statistics
    are set first, on all."""
    op = lane.nodes[node.name]
    scale, shift = (Slot.of(lane, argument(op, n)) for n in ("weight", "bias"))
    mix = mixer_at(first, parents, shared, spaces, matchings)
    if scale is None or shift is None or mix is None or len(lane.state[scale.name].shape) != 1:
        return None
    if packet(op) in BATCH_NORMS:
        _set_statistics(op, lane, chunks, dynamic)
    size, device = lane.state[scale.name].shape[0], lane.state[scale.name].device
    sums = torch.zeros(5, size, dtype=torch.float64, device=device)
    shape, count = lane.nodes[first].meta["shape"], 0
    axis = len(shape) - 1 if packet(op) == "native_layer_norm" else 1
    given = {scale.name: torch.ones_like(lane.state[scale.name]), shift.name: torch.zeros_like(lane.state[shift.name])}
    for j in chunks:
        index = pick(prod(shape) // size, settings.least // chunks.total + 1, generator, device)
        if j is None:  # drawn as by the rank that has it
            continue
        plain = lane.apply(op, lambda n, j=j: _plain(lane, n, j, dynamic, given))[0]
        rows = _rows(plain, axis, index), _mixed(mix, [p.value(first, j) for p in parents], axis, index)
        x, t = (v.double() for v in rows)  # squares too: a small variance is a difference of them
        sums += torch.stack([v.sum(0) for v in (x, t, x * x, x * t, t * t)])
        count += len(x)
    counted = torch.tensor([count], dtype=torch.float64, device=sums.device)
    chunks.processes.sum(sums, counted)
    count = int(counted)
    mx, mt, xx, xt, tt = sums / count
    old, b = lane.state[scale.name].double(), lane.state[shift.name].double()
    var, cov = xx - mx * mx, xt - mx * mt
    gamma = (cov + settings.lam * var * old) / ((1 + settings.lam) * var).clamp(min=1e-12)
    beta = mt - gamma * mx

    def error(g: Tensor, b: Tensor) -> float:
        """Mean of (t - g x - b)^2, relative to that of t^2."""
        squares = tt - 2 * (g * xt + b * mt) + g * g * xx + 2 * g * b * mx + b * b
        return max(float(squares.sum() / tt.sum().clamp(min=1e-300)), 0.0)

    before, after = error(old, b), error(gamma, beta)
    lane.write(scale.name, gamma)
    lane.write(shift.name, beta)
    return before, after


def _rows(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """[r, features], these along `axis`."""
    return rows_at(value.movedim(axis, -1), index, value.dim() - 1)


def _mixed(mix: Mix, values: Sequence[Tensor], axis: int, index: Tensor) -> Tensor:
    """Rows of the parents' values in merged coordinates; mixed is what was drawn, not all there is. [r, features]"""
    if isinstance(mix, Mixer) and mix.axes == (axis,):
        return replace(mix, axes=(1,))([_rows(v, axis, index) for v in values])
    return _rows(mix(values), axis, index)


def _plain(lane: Lane, node: fx.Node, chunk: int, dynamic: Mapping[str, fx.Node], given: Mapping[str, Tensor]) -> Any:
    if "parameter" in node.meta and "const" not in node.meta and lane.parameter(node) in given:
        return given[lane.parameter(node)]
    return lane.operand(node, chunk, dynamic)


def _set_statistics(op: fx.Node, lane: Lane, chunks: Chunks, dynamic: Mapping[str, fx.Node]) -> None:
    """Running mean and variance of a batch norm: those of what it reads in the merged network."""
    total = square = count = torch.zeros((), dtype=torch.float64)
    for j in range(chunks.own):
        x = lane.operand(op.args[0], j, dynamic).movedim(1, 0).flatten(1).double()  # type: ignore[arg-type]
        total, square, count = total + x.sum(1), square + (x * x).sum(1), count + x.shape[1]
    sums = torch.stack([total, square, torch.full_like(total, float(count))])
    chunks.processes.sum(sums)
    total, square, count = sums
    mean, given = total / count, arguments(op)
    lane.write(lane.parameter(given["running_mean"]), mean)
    lane.write(lane.parameter(given["running_var"]), (square / count - mean**2).clamp(min=1e-8))
