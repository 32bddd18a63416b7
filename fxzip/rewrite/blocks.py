"""Weights of grouped convolutions: both axes of every block are mapped at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SpaceError

if TYPE_CHECKING:
    from .axes import AxisMap


def in_blocks(x: Tensor, rows: AxisMap | None, columns: AxisMap, blocks: int, where: str) -> Tensor:
    """out[g, p, q] = sum over h, o, c of rows[gp, ho] x[h, o, c] columns[gq, hc]: blocks stay whole.

    Raises SpaceError, naming `where` and the spaces, for widths at which a feature would come into another block."""
    for axis_map in (columns, rows):
        if axis_map is not None and not _whole(axis_map, blocks):
            spaces = " and ".join(dict.fromkeys(run.space for run in axis_map.runs))
            raise SpaceError(f"{where}: its {blocks} groups must stay equally wide: widen {spaces} alike, or neither")
    x = x.unflatten(0, (blocks, -1))  # [h, o, c, *]
    makes = None if rows is None else _dense(rows).to(x.dtype)
    first = torch.eye(blocks * x.shape[1], dtype=x.dtype) if makes is None else makes
    a, b = (m.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1)) for m in (first, _dense(columns).to(x.dtype)))
    out = x.new_zeros(blocks, a.shape[1], b.shape[1], *x.shape[3:])
    for g, h in ((a != 0).any(3).any(1) & (b != 0).any(3).any(1)).nonzero().tolist():  # [g, h]
        out[g] += torch.einsum("po,oc...,qc->pq...", a[g, :, h], x[h], b[g, :, h])
    return out.flatten(0, 1)


def _whole(axis_map: AxisMap, blocks: int) -> bool:
    """Whether all that is in some blocks before is in the same blocks after: where widths are as they were, it is."""
    if all(len(run.source) == len(run.target) for run in axis_map.runs):
        return True
    before, (after, rest) = axis_map.length_in // blocks, divmod(axis_map.length, blocks)
    moved = [(run.source, run.target) for run in axis_map.runs] + [(axis_map.rest_source, axis_map.rest_target)]
    return not rest and all(set((s // before).tolist()) == set((t // after).tolist()) for s, t in moved)


def _dense(axis_map: AxisMap) -> Tensor:
    """The map as a matrix [length, length_in]."""
    matrix = torch.zeros(axis_map.length, axis_map.length_in, dtype=torch.float64)
    matrix[axis_map.rest_target, axis_map.rest_source] = axis_map.scale
    for run in axis_map.runs:
        matrix[run.target[:, None], run.source] = run.matrix
    return matrix
