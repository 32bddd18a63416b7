"""Linear maps of an axis that holds features of several spaces: out[target] = matrix @ in[source], space by space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SpaceError
from ..products import product

Entries = tuple[Tensor, Tensor, Tensor, bool]  # target, source, value; whether every output, in order, is of one input


@dataclass(frozen=True)
class Run:
    """One space on one axis: out[target] = matrix @ in[source]."""

    space: str
    source: Tensor  # int64 [a]
    target: Tensor  # int64 [b]
    matrix: Tensor  # float64 [b, a]


@dataclass(frozen=True)
class AxisMap:
    """A linear map of one axis: runs, and inert entries that are carried over times `scale`."""

    runs: tuple[Run, ...]
    rest_source: Tensor  # int64 [r]
    rest_target: Tensor  # int64 [r]
    length_in: int
    length: int
    scale: float = 1.0
    _held: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def entries(self, device: torch.device) -> Entries | None:
        """What is not zero, on this device, found once; None if there is too much of it for going by index to pay."""
        if device not in self._held:
            self._held[device] = _entries(self, device)
        return self._held[device]

    def matrix(self, like: Tensor) -> Tensor:
        """As a matrix [length, length_in] of the dtype and on the device of `like`, made once."""
        key = like.device, like.dtype
        if key not in self._held:
            found = torch.zeros(self.length, self.length_in, dtype=torch.float64)
            found[self.rest_target, self.rest_source] = self.scale
            for run in self.runs:
                found[run.target.unsqueeze(1), run.source] = run.matrix
            self._held[key] = found.to(like)
        return self._held[key]


def apply(x: Tensor, axis: int, axis_map: AxisMap) -> Tensor:
    """`x` with `axis` mapped: [.., length_in, ..] -> [.., length, ..]. Sparse maps go by index, exactly."""
    axis %= x.dim()
    if axis > 1 and axis == x.dim() - 1:  # `index_select` takes several times as long over the last of three axes
        return apply(x.flatten(0, -2), 1, axis_map).unflatten(0, x.shape[:-1])
    entries = axis_map.entries(x.device)
    if entries is None:
        return _apply_dense(x, axis, axis_map)
    target, source, value, copies = entries
    column = value.to(x.dtype).view([-1] + [1] * (x.dim() - axis - 1))
    if copies:
        out = x.index_select(axis, source)
        return out if bool((value == 1).all()) else out.mul_(column)
    out = x.new_zeros([*x.shape[:axis], axis_map.length, *x.shape[axis + 1 :]])
    return out.index_add_(axis, target, x.index_select(axis, source) * column)


def axis_map(
    pieces: Sequence[tuple[str, np.ndarray, Tensor]],
    length: int,
    where: str,
    flip: bool = False,
    scale: float = 1.0,
) -> AxisMap:
    """The map of an axis of `length` (model 0's) under `pieces` = (space, positions [n], matrix [b, a]).

    a and b: widths of that space before and after; the axis is laid out for each. flip: transpose matrices.
    """
    once = {id(m): m.detach().to("cpu", torch.float64) for _, _, m in pieces}
    once = {k: m.T if flip else m for k, m in once.items()}
    matrices = [once[id(m)] for _, _, m in pieces]  # pieces that share a matrix still do
    positions = [p for _, p, _ in pieces]
    source, rest_source, length_in = layout(length, positions, [m.shape[1] for m in matrices], where)
    target, rest_target, length_out = layout(length, positions, [m.shape[0] for m in matrices], where)
    runs = (Run(p[0], s, t, m) for p, s, t, m in zip(pieces, source, target, matrices, strict=True))
    return AxisMap(tuple(runs), rest_source, rest_target, length_in, length_out, scale)


def layout(
    length: int, positions: Sequence[np.ndarray], sizes: Sequence[int], where: str
) -> tuple[list[Tensor], Tensor, int]:
    """Positions of every piece, of the inert rest, and the length, when piece k holds sizes[k] features.

    Where widths change the axis must be regions end to end: a run of one space, or t pieces of equal width
    interleaved with stride t (the flattened (c h w) of a map). Anything else raises SpaceError.
    """
    taken = np.concatenate([np.zeros(0, np.int64), *positions])
    if len(np.unique(taken)) != len(taken):
        raise SpaceError(f"{where}: two features claim one index; the spaces of this axis overlap")
    rest = np.setdiff1d(np.arange(length), taken)
    if all(len(p) == s for p, s in zip(positions, sizes, strict=True)):
        return [_long(p) for p in positions], _long(rest), length
    regions = _regions(positions, sizes, where)
    moves = sorted(
        [(start, old, members) for start, old, members in regions] + [(int(r), 1, []) for r in rest]
    )
    out, kept, at, expected = [np.zeros(0, np.int64)] * len(positions), [], 0, 0
    for start, old, members in moves:
        if start != expected:
            raise SpaceError(
                f"{where}: the features of its spaces are interleaved, so its width cannot change; keep it"
            )
        expected = start + old
        for slot, k in enumerate(members):
            out[k] = at + slot + len(members) * np.arange(sizes[k])
        if not members:
            kept.append(at)
        at += len(members) * sizes[members[0]] if members else 1
    return [_long(p) for p in out], _long(np.array(kept, np.int64)), at


def _regions(
    positions: Sequence[np.ndarray], sizes: Sequence[int], where: str
) -> list[tuple[int, int, list[int]]]:
    """(start, length, pieces) of every contiguous region: t pieces with stride t that start side by side."""
    free, regions = sorted(range(len(positions)), key=lambda k: int(positions[k][0])), []
    while free:
        k = free[0]
        n = len(positions[k])
        stride = int(positions[k][1] - positions[k][0]) if n > 1 else 1
        start = int(positions[k][0])
        members = free[:stride]
        fits = (
            stride >= 1
            and len(members) == stride
            and all(
                sizes[j] == sizes[k] and np.array_equal(positions[j], start + slot + stride * np.arange(n))
                for slot, j in enumerate(members)
            )
        )
        if not fits or (n == 1 and len(positions) > 1):
            raise SpaceError(
                f"{where}: its features do not lie in runs, so its width cannot change; keep the width"
            )
        regions.append((start, n * stride, members))
        free = free[stride:]
    return regions


def _entries(axis_map: AxisMap, device: torch.device) -> Entries | None:
    """The map by its non-zero entries; None if it has too many for that to pay."""
    target, source = [axis_map.rest_target], [axis_map.rest_source]
    value = [torch.full((len(axis_map.rest_target),), axis_map.scale, dtype=torch.float64)]
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for run in axis_map.runs:
        if id(run.matrix) not in known:
            held = run.matrix.nonzero()
            known[id(run.matrix)] = held[:, 0], held[:, 1]
        rows, columns = known[id(run.matrix)]
        if len(rows) > 4 * max(run.matrix.shape):
            return None
        target.append(run.target[rows])
        source.append(run.source[columns])
        value.append(run.matrix[rows, columns])
    to, of, by = torch.cat(target), torch.cat(source), torch.cat(value)
    copies = len(to) == axis_map.length == len(to.unique())
    order = to.argsort() if copies else slice(None)
    return to[order].to(device), of[order].to(device), by[order].to(device), copies


def _apply_dense(x: Tensor, axis: int, axis_map: AxisMap) -> Tensor:
    moved = x.movedim(axis, 0)
    flat = moved.reshape(moved.shape[0], -1)  # [length_in, *]
    out = flat.new_zeros(axis_map.length, flat.shape[1])
    out[axis_map.rest_target] = flat[axis_map.rest_source] * axis_map.scale
    for run in axis_map.runs:
        out[run.target] = product(run.matrix.to(flat), flat[run.source])
    return out.reshape(axis_map.length, *moved.shape[1:]).movedim(0, axis)


def _long(positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(positions, dtype=np.int64))
