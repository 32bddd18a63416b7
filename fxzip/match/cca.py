"""CCA Merge: linear maps between the models' features, instead of a pairing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matching, mean_correlation, similarity


@dataclass(frozen=True)
class CCA:
    """Maps every model's features into those of one (the first of the widest) by canonical correlation analysis, then
    averages.

    Horoi et al., "Harmony in Diversity", ICML 2024, section 4: with canonical directions P_0, P_i (columns) of the
    covariances S, T_i = P_0^-T P_i^T, M = [I, T_1, ...] / N and U = stacked T_i^-1. In closed form
    T = S_0^1/2 A B^T S_i^-1/2, where A, B are the singular vectors of S_0^-1/2 S_0i S_i^-1/2 (of a narrower model, T
    has no inverse, and U the pseudo-inverse in whitened coordinates). `ridge`, times the
    mean variance, is added to every variance. A non-linearity does not commute with T: expect less than of
    a pairing unless what follows is fitted ("solve").
    Raises InputError for ridge < 0 or any width but the widest model's.
    """

    ridge: float = 0.3

    name: ClassVar[str] = "cca"
    paper: ClassVar[str] = "Horoi et al., Harmony in Diversity: CCA Merge, ICML 2024"
    correspondence: ClassVar[Correspondence] = "free"
    widens: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"CCA: ridge must be 0 or more, not {self.ridge}")

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features, width n = max n_i -> M [n, Sn], U [Sn, n]."""
        sizes, n = moments.sizes, max(moments.sizes)
        if width != n:
            raise InputError(f"cca: the width must be {n}, the models' own, not {width}; use 'zip' or 'select'")
        covariance, first = moments.covariance().cpu(), sizes.index(n)
        of = [covariance[rows] for rows in torch.arange(sum(sizes)).split(sizes)]  # per model [n_i, Sn]
        roots = [_roots(own.split(sizes, 1)[i], self.ridge) for i, own in enumerate(of)]
        maps, back = [], []
        for i, cross in enumerate(of[first].split(sizes, 1)):
            a, _, b = torch.linalg.svd(roots[first][1] @ cross @ roots[i][1], full_matrices=False)
            turn = a @ b if i != first else torch.eye(n, dtype=torch.float64)
            maps.append(roots[first][0] @ turn @ roots[i][1])  # f_0 ~ T f_i
            back.append(roots[i][0] @ turn.T @ roots[first][1])
        maps[first] = back[first] = torch.eye(n, dtype=torch.float64)
        local = np.concatenate([np.arange(k) for k in sizes])
        return Matching(
            torch.cat(maps, 1) / len(sizes), torch.cat(back), sizes, _quality(moments, maps, first),
            mean_correlation(local, sizes, similarity(moments)),
        )  # fmt: skip


def _roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The square root of covariance + ridge, and its inverse. [n, n]"""
    mean = float(covariance.diagonal().mean())
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + max(ridge * mean, 1e-12 * mean, 1e-30)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _quality(moments: SpaceMoments, maps: list[Tensor], first: int) -> float:
    """Mean correlation of one model's features with every other model's, mapped; NaN for a single model."""
    n = len(maps[0])
    blocks = torch.block_diag(*maps)
    mapped = blocks @ moments.covariance().cpu() @ blocks.T  # [N n, N n]
    scale = mapped.diagonal().clamp(min=0).sqrt()
    parts = torch.arange(len(mapped)).split(n)
    value = [mapped[parts[first], p] / (scale[parts[first]] * scale[p]).clamp(min=1e-30)
             for k, p in enumerate(parts) if k != first]  # fmt: skip
    return float(torch.cat(value).clamp(-1, 1).mean()) if value else float("nan")
