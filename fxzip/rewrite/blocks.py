"""Weights of grouped convolutions: both axes of every block are mapped at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .parameters import AxisMap


def in_blocks(x: Tensor, rows: AxisMap | None, columns: AxisMap, blocks: int) -> Tensor:
    """out[g, p, q] = sum over h, o, c of rows[gp, ho] x[h, o, c] columns[gq, hc]: blocks stay whole."""
    x = x.unflatten(0, (blocks, -1))  # [h, o, c, *]
    makes = None if rows is None else _dense(rows).to(x.dtype)
    first = torch.eye(blocks * x.shape[1], dtype=x.dtype) if makes is None else makes
    a, b = (m.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1)) for m in (first, _dense(columns).to(x.dtype)))
    out = x.new_zeros(blocks, a.shape[1], b.shape[1], *x.shape[3:])
    for g, h in ((a != 0).any(3).any(1) & (b != 0).any(3).any(1)).nonzero().tolist():  # [g, h]
        out[g] += torch.einsum("po,oc...,qc->pq...", a[g, :, h], x[h], b[g, :, h])
    return out.flatten(0, 1)


def _dense(axis_map: AxisMap) -> Tensor:
    """The map as a matrix [length, length_in]."""
    matrix = torch.zeros(axis_map.length, axis_map.length_in, dtype=torch.float64)
    matrix[axis_map.rest_target, axis_map.rest_source] = axis_map.scale
    for run in axis_map.runs:
        matrix[run.target[:, None], run.source] = run.matrix
    return matrix
