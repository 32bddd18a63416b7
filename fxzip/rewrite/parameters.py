"""Merged weights: W* = sum_i W_i x_axis A_i; A = M_i where an axis makes features, U_i^T where it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SpaceError
from ..infer.inner import AXIS
from ..infer.spaces import MAKES
from ..products import product
from .blocks import in_blocks

if TYPE_CHECKING:
    from ..infer.spaces import Segment, Spaces
    from ..match import Matching


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


def merge_parameters(
    states: Sequence[Mapping[str, Tensor]],
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    names: Collection[str],
    shares: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge the parameters `names` of N models (design, section 1; ZipIt!, arXiv:2305.03053, eq. 4).

    states: per model name -> tensor. spaces: inferred on model 0. matchings: space name -> Matching; spaces
    without one are averaged as they are, model i counting shares[i] (default: all alike). Computed in float64 on
    the CPU, returned in the dtype and on the device of model 0. Integers must agree.
    Untouched parameters (counters of batches) are left out: build takes model 0's, extract gives back each model's own.
    Raises SpaceError when an axis cannot be laid out at the merged width, or integers differ.
    """
    shares = shares or (1.0 / len(states),) * len(states)
    segments = _by_parameter(spaces, matchings)
    first_name = tied_names(spaces)
    merged = {}
    for name in names:
        key = first_name.get(name, name)
        if key in spaces.untouched:
            continue
        tensors = [_get(s, name if name in s else key, i) for i, s in enumerate(states)]
        first = tensors[0].detach()
        if not (first.is_floating_point() or first.is_complex()):
            merged[name] = _integers(name, tensors)
        else:
            merged[name] = _merge(name, tensors, segments.get(key, {}), matchings, shares)
    return merged


def tied_names(spaces: Spaces) -> Mapping[str, str]:
    """Other name -> first name of tied parameters; segments speak of first names only."""
    return getattr(spaces.lowered, "tied", {})


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


def _by_parameter(spaces: Spaces, matchings: Mapping[str, Matching]) -> dict[str, dict[int, list]]:
    """parameter -> axis -> [(space name, segment)], matched spaces only."""
    table: dict[str, dict[int, list]] = {}
    for space in spaces:
        for segment in space.segments if space.name in matchings else ():
            table.setdefault(segment.parameter, {}).setdefault(segment.axis, []).append((space.name, segment))
    return table


def _merge(
    name: str,
    tensors: Sequence[Tensor],
    axes: Mapping[int, list],
    matchings: Mapping[str, Matching],
    shares: Sequence[float],
) -> Tensor:
    """sum_i W_i x_axis A_i. The first axis that makes features sums over models; without one, the weighted mean.
    An axis in blocks is mapped together with axis 0, whose blocks they are."""
    making = min((a for a, held in axes.items() if any(s.roles & MAKES for _, s in held)), default=None)
    total = None
    for i, tensor in enumerate(tensors):
        x = tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
        share, steps = shares[i], {}
        for axis, held in sorted(axes.items()):
            where, many = f"{name}[axis {axis}]", held[0][1].blocks
            pieces = _pieces(held, matchings, i, axis == making, share)
            step = axis_map(pieces, tensors[0].shape[axis] * many, where, scale=share if axis == making else 1.0)
            if step.length_in != x.shape[axis] * many:
                raise SpaceError(
                    f"{where}: model {i} has {x.shape[axis] * many} entries where its spaces make {step.length_in}"
                )
            steps[axis] = step
        blocks = max((held[0][1].blocks for held in axes.values()), default=1)
        if blocks > 1:
            x = in_blocks(x, steps.pop(0, None), steps.pop(AXIS), blocks, name)
        for axis, step in steps.items():
            x = apply(x, axis, step)
        x = x if making is not None else x * share
        if total is not None and total.shape != x.shape:
            raise SpaceError(
                f"{name}: {list(tensors[0].shape)} and {list(tensor.shape)} differ outside any space"
            )
        total = x if total is None else total + x
    assert total is not None
    return total.contiguous().to(tensors[0].device, tensors[0].dtype)


def _pieces(
    held: Sequence[tuple[str, Segment]], matchings: Mapping[str, Matching], i: int, making: bool, share: float
) -> list[tuple[str, np.ndarray, Tensor]]:
    """(space, positions, matrix [m, n_i]) of every segment of an axis: M_i, or U_i^T.

    On the summing axis U_i^T takes the model's share, so that its rows are means over models.
    """
    made: dict[tuple[str, bool], Tensor] = {}
    pieces = []
    for space, segment in held:
        merges = making and bool(segment.roles & MAKES)
        if (space, merges) not in made:
            matching = matchings[space]
            matrix = matching.blocks_merge(i) if merges else matching.blocks_unmerge(i).T
            made[space, merges] = matrix * share if making and not merges else matrix
        pieces.append((space, segment.positions, made[space, merges]))
    return pieces


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


def _integers(name: str, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    if any(t.shape != first.shape or not torch.equal(t.to(first.device), first) for t in tensors[1:]):
        raise SpaceError(f"{name}: integer buffers differ between models and cannot be averaged")
    return first.clone()


def _get(state: Mapping[str, Tensor], name: str, i: int) -> Tensor:
    if name not in state:
        raise SpaceError(f"{name}: model {i} has no such parameter or buffer")
    return state[name]


def _long(positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(positions, dtype=np.int64))
