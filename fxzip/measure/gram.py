"""Products of tall matrices with themselves: half of the arithmetic, in single precision where that is enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..products import exact, product

TILE = 512  # columns of a block: of a matrix of k blocks (k + 1) / 2k is computed
WIDE = 2048  # columns, from which on float64 is dear even for few rows
FEW = 128  # rows, below which float64 costs nothing unless they are wide
_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST, _LARGEST = 1e-17, 1e15  # whose products float32 holds, and sums of them


def gram(x: Tensor) -> Tensor:
    """x.mT @ x in the precision of x: [..., r, p] -> [..., p, p].

    >>> x = torch.randn(3, 700, dtype=torch.float64); torch.allclose(gram(x), x.T @ x)
    True
    """
    y, width = x.mT.contiguous(), x.shape[-1]  # rows of tiles are dense then
    if width <= TILE:
        return product(y, y.mT)
    found = x.new_empty(*x.shape[:-2], width, width)
    for i, j in tiles(width):
        found[..., i:j, :j] = product(y[..., i:j, :], y[..., :j, :].mT)
    return mirrored(found)


def add_gram(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """total += weight * rows.T @ rows, in blocks on and below the diagonal; `mirrored` fills in the rest.

    total: float64 [p, p]; rows: [r, p]. Rows of float32 and less are centred, so that a mean far from zero costs no
    digits, and multiplied in float32: the error is about 1e-6 of the features' deviations. Float64 throughout for few
    (and narrow) rows, for rows of float64, where float32 might overflow, and where torch is told to multiply float32 as
    TF32.
    """
    centred = _centred(rows)
    if centred is None:
        x = rows.to(total)
        for i, j in tiles(len(total)):
            total[i:j, :j].addmm_(x[:, i:j].T, x[:, :j], alpha=weight)
        return
    y, centre = centred  # y: [p, r]
    c = centre.double()
    u = y.sum(1, dtype=torch.float64) + len(rows) / 2 * c  # sum x x' = sum y y' + c u' + u c'
    left, right = weight * torch.stack([c, u], 1), torch.stack([u, c])  # [p, 2], [2, p]
    for i, j in tiles(len(total)):
        total[i:j, :j].add_(product(y[i:j], y[:j].T), alpha=weight).addmm_(left[i:j], right[:, :j])


def finite(rows: Tensor) -> bool:
    """Whether every entry is: by their sum, which is read off ten times faster than the entries one by one.

    >>> finite(torch.full((2,), 3e38)), finite(torch.tensor([1.0, float("inf")]))
    (True, False)
    """
    return bool(rows.sum().isfinite()) or bool(rows.isfinite().all())  # the sum of large ones may overflow


def tiles(columns: int) -> Iterator[tuple[int, int]]:
    """Start and end of every block."""
    return ((i, min(i + TILE, columns)) for i in range(0, columns, TILE))


def mirrored(matrix: Tensor) -> Tensor:
    """`matrix` itself, its blocks above the diagonal taken from below."""
    for i, j in tiles(matrix.shape[-1]):
        matrix[..., :i, i:j] = matrix[..., i:j, :i].mT
    return matrix


def _centred(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """((rows - centre).T, centre) in float32; None where float64 is needed."""
    few = len(rows) < FEW and rows.numel() < FEW * WIDE
    if rows.dtype not in _SINGLE or few or not exact():
        return None
    rows = rows.float()
    centre = rows.mean(0)
    y = (rows - centre).T.contiguous()  # rows of tiles are dense then
    peak = y.abs().amax(1)
    fits = ((peak == 0) | (peak > _SMALLEST)) & (peak < _LARGEST) & (centre.abs() < _LARGEST)
    return (y, centre) if bool(fits.all()) else None
