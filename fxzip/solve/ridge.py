"""Ridge least squares towards given weights, from streamed Gram matrices.

    W (S + lam D) = C + lam W0 D,    S = E[x x^T],  C = E[t x^T],  D = diag S

A direction the data does not determine keeps the weights it started from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Gram:
    """Streamed second moments of design rows x [r, g, p] and targets t [r, g, o]; g independent groups."""

    second: Tensor | None = None  # float64 [g, p, p]
    cross: Tensor | None = None  # float64 [g, o, p]
    energy: Tensor | None = None  # float64 [g, o]: E[t^2], for the fit's residual
    rows: int = field(default=0)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Products in the data's precision, sums in float64 (float64 throughout where the device lacks speed)."""
        x, t = x.transpose(0, 1), t.transpose(0, 1)  # [g, r, p], [g, r, o]
        second, cross = (x.mT @ x).double(), (t.mT @ x).double()
        energy = (t.double() ** 2).sum(1)
        if self.second is None or self.cross is None or self.energy is None:
            self.second, self.cross, self.energy = second, cross, energy
        else:
            self.second += second
            self.cross += cross
            self.energy += energy
        self.rows += x.shape[1]


@dataclass(frozen=True)
class Fit:
    """weights float64 [g, o, p]; relative squared error on the rows it was fitted to, before and after."""

    weights: Tensor
    before: float
    after: float


def ridge(gram: Gram, start: Tensor, lam: float) -> Fit:
    """Solve for weights [g, o, p], pulled towards `start` [g, o, p] by `lam` times each input's energy.

    Cholesky with jitter; where that fails, eigen-decomposition with a warning.

    >>> g = Gram(); x = torch.randn(64, 1, 3); g.add(x, x @ torch.ones(3, 2))
    >>> ridge(g, torch.zeros(1, 2, 3, dtype=torch.float64), 1e-9).weights.round(decimals=3).unique().tolist()
    [1.0]
    """
    assert gram.second is not None and gram.cross is not None and gram.energy is not None
    s, c = gram.second / gram.rows, gram.cross / gram.rows
    diagonal = s.diagonal(dim1=-2, dim2=-1)  # [g, p]
    floor = 1e-10 * diagonal.mean(-1, keepdim=True).clamp(min=1e-30)
    weight = lam * diagonal + floor  # [g, p]
    a = s + torch.diag_embed(weight)
    b = c + start * weight.unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(a)
    solution = torch.cholesky_solve(b.mT, factor).mT if not bool(info.any()) else _by_eigen(a, b)
    energy = float((gram.energy / gram.rows).sum())
    return Fit(solution, _error(start, s, c, energy), _error(solution, s, c, energy))


def _by_eigen(a: Tensor, b: Tensor) -> Tensor:
    warnings.warn("a Gram matrix is ill-conditioned: solved by eigen-decomposition", RuntimeWarning, stacklevel=3)
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp(min=float(values.max()) * 1e-12)
    return ((b @ vectors) / values.unsqueeze(-2)) @ vectors.mT


def _error(w: Tensor, s: Tensor, c: Tensor, energy: float) -> float:
    """E|t - W x|^2 / E|t|^2."""
    residual = energy - 2 * float((w * c).sum()) + float(((w @ s) * w).sum())
    return max(residual, 0.0) / max(energy, 1e-300)
