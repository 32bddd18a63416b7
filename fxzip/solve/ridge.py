"""Ridge least squares towards given weights, from streamed Gram matrices.

    W (S + lam D) = C + lam W0 D,    S = E[x x^T],  C = E[t x^T],  D = diag S

A direction the data does not determine keeps the weights it started from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure.gram import mirrored, tiles
from ..processes import Processes
from ..products import product


@dataclass
class Gram:
    """Streamed second moments of design rows x [r, g, p] and targets t [r, g, o]; g independent groups."""

    second: Tensor = torch.zeros(())  # float64 [g, p, p], once there are rows: blocks on and below the diagonal
    cross: Tensor = torch.zeros(())  # float64 [g, o, p]
    energy: Tensor = torch.zeros(())  # float64 [g, o]: E[t^2], for the fit's residual
    rows: int = 0

    def add(self, x: Tensor, t: Tensor) -> None:
        """Products in the data's precision, sums in float64 (float64 throughout where the device lacks speed)."""
        x, t = x.transpose(0, 1), t.transpose(0, 1)  # [g, r, p], [g, r, o]
        if not self.rows:
            g, p, o = len(x), x.shape[-1], t.shape[-1]
            self.second, self.cross, self.energy = (
                x.new_zeros(shape, dtype=torch.float64) for shape in ((g, p, p), (g, o, p), (g, o))
            )
        columns = x.mT.contiguous()  # rows of tiles are dense then
        for i, j in tiles(x.shape[-1]):  # `mirrored` fills in the rest
            self.second[:, i:j, :j] += product(columns[:, i:j], columns[:, :j].mT)
        self.cross += product(t.mT, columns.mT)
        self.energy += (t.double() ** 2).sum(1)
        self.rows += x.shape[1]

    def reduce(self, processes: Processes) -> None:
        """Of all ranks together; each has added something."""
        rows = torch.tensor([self.rows], dtype=torch.float64, device=self.second.device)  # of the others' kind: one sum
        processes.sum(self.second, self.cross, self.energy, rows)
        self.rows = int(rows)

    def mean(self) -> None:
        """Sums become means, in place, as of one row."""
        mirrored(self.second)
        for total in (self.second, self.cross, self.energy):
            total /= self.rows
        self.rows = 1


@dataclass(frozen=True)
class Fit:
    """weights float64 [g, o, p]; relative squared error on the rows it was fitted to, before and after."""

    weights: Tensor
    before: float
    after: float


class Ridge:
    """The normal equations of one Gram, factored once and solved for its target and for others near a fit.

    Cholesky with jitter; where that fails, eigen-decomposition with a warning.
    """

    def __init__(self, gram: Gram, start: Tensor, lam: float) -> None:
        gram.mean()
        self.s, self.c, self.energy = gram.second, gram.cross, float(gram.energy.sum())
        diagonal = self.s.diagonal(dim1=-2, dim2=-1)  # [g, p]
        floor = 1e-10 * diagonal.mean(-1, keepdim=True).clamp(min=1e-30)
        weight = lam * diagonal + floor  # [g, p]
        self.start, self.weight = start, weight.unsqueeze(-2)
        matrix = self.s.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(weight)
        self.definite = _factored(matrix)
        if not self.definite:
            matrix = self.s + torch.diag_embed(weight)
        self.factor = matrix  # one of the two: of wide layers they are what memory goes to

    def solve(self) -> Tensor:
        """Weights [g, o, p] for the Gram's own target."""
        return self._inverse(self.c + self.start * self.weight, self.start)

    def moved(self, weights: Tensor, gap: Tensor) -> Tensor:
        """Weights for the target y + d, y = weights x, of which the cross moment E[d x^T] is `gap`; both [g, o, p].

        (W S + gap + lam W0 D) (S + lam D)^-1 = W + (gap + lam (W0 - W) D) (S + lam D)^-1, without the product W S."""
        change = torch.sub(self.start, weights).mul_(self.weight).add_(gap)
        return self._inverse(change, torch.zeros_like(weights)).add_(weights)

    def _inverse(self, b: Tensor, start: Tensor) -> Tensor:
        return _substituted(self.factor, b) if self.definite else _by_eigen(self.factor, b, start)

    def error(self, weights: Tensor) -> float:
        """E|t - W x|^2 / E|t|^2 on the rows of the Gram."""
        residual = self.energy - 2 * float((weights * self.c).sum()) + float(((weights @ self.s) * weights).sum())
        return max(residual, 0.0) / max(self.energy, 1e-300)


def ridge(gram: Gram, start: Tensor, lam: float) -> Fit:
    """Solve for weights [g, o, p], pulled towards `start` [g, o, p] by `lam` times each input's energy.

    >>> g = Gram(); x = torch.randn(64, 1, 3); g.add(x, x @ torch.ones(3, 2))
    >>> ridge(g, torch.zeros(1, 2, 3, dtype=torch.float64), 1e-9).weights.round(decimals=3).unique().tolist()
    [1.0]
    """
    problem = Ridge(gram, start, lam)
    weights = problem.solve()
    return Fit(weights, problem.error(start), problem.error(weights))


def _factored(matrix: Tensor) -> bool:
    """Whether a symmetric matrix [g, p, p] is definite; its lower triangle's factor is in its place then, transposed as
    LAPACK has it, which saves two copies. If not, nothing of use is."""
    columns = matrix.mT
    info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return not bool(info.any())


def _substituted(factor: Tensor, b: Tensor) -> Tensor:
    """W with W a = b, of what `_factored` left of `a`. As `cholesky_solve`, to the bit, but that copies the factor."""
    half = torch.linalg.solve_triangular(factor.mT, b.mT, upper=False)
    return torch.linalg.solve_triangular(factor, half, upper=True).mT


def _by_eigen(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """W with W a = b where `a` says so, to what float32 sums are known to; `start` in all other directions."""
    warnings.warn("a Gram matrix is ill-conditioned: solved by eigen-decomposition", RuntimeWarning, stacklevel=4)
    size = a.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)  # [g, 1, p]: each column in units of its own
    values, vectors = torch.linalg.eigh(a / size / size.mT)
    inverse = torch.where(values > 1e-6 * values.amax(-1, keepdim=True), 1 / values, 0)
    rest = (b - start @ a) / size
    return start + ((rest @ vectors) * inverse.unsqueeze(-2)) @ vectors.mT / size
