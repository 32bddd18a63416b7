"""CCA Merge: linear maps between the models' features, instead of a pairing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, SpaceError
from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matching, mean_correlation, similarity


@dataclass(frozen=True)
class CCA:
    """Maps every model's features into model 0's by canonical correlation analysis, then averages.

    Horoi et al., "Harmony in Diversity", ICML 2024, section 4: with canonical directions P_0, P_i (columns) of the
    covariances S, T_i = P_0^-T P_i^T, M = [I, T_1, ...] / N and U = stacked T_i^-1. In closed form
    T = S_0^1/2 A B^T S_i^-1/2, where A, B are the singular vectors of S_0^-1/2 S_0i S_i^-1/2. `ridge`, times the
    mean variance, is added to every variance. A non-linearity does not commute with T: expect less than of
    a pairing unless what follows is fitted ("solve").
    Raises InputError for ridge < 0 or any width but the models', SpaceError when the models' widths differ.
    """

    ridge: float = 1e-2

    name: ClassVar[str] = "cca"
    paper: ClassVar[str] = "Horoi et al., Harmony in Diversity: CCA Merge, ICML 2024"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"CCA: ridge must be 0 or more, not {self.ridge}")

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of N n features, width n -> M [n, N n], U [N n, n]."""
        sizes = moments.sizes
        if len(set(sizes)) > 1:
            raise SpaceError(f"cca: the models have {sizes} features; use 'permute', 'zip' or 'select'")
        n, models = sizes[0], len(sizes)
        if width != n:
            raise InputError(f"cca: the width must be {n}, the models' own, not {width}; use 'zip' or 'select'")
        covariance = moments.covariance().cpu().reshape(models, n, models, n)
        roots = [_roots(covariance[i, :, i], self.ridge) for i in range(models)]
        eye = torch.eye(n, dtype=torch.float64)
        maps, back = [eye], [eye]
        for i in range(1, models):
            a, _, b = torch.linalg.svd(roots[0][1] @ covariance[0, :, i] @ roots[i][1])
            turn = a @ b
            maps.append(roots[0][0] @ turn @ roots[i][1])  # f_0 ~ T f_i
            back.append(roots[i][0] @ turn.T @ roots[0][1])
        merge = torch.cat(maps, 1) / models
        local = np.tile(np.arange(n), models)
        return Matching(
            merge, torch.cat(back), sizes, _quality(moments, maps),
            mean_correlation(local, sizes, similarity(moments)),
        )  # fmt: skip


def _roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The square root of covariance + ridge, and its inverse. [n, n]"""
    mean = float(covariance.diagonal().mean())
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + max(ridge * mean, 1e-12 * mean, 1e-30)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _quality(moments: SpaceMoments, maps: list[Tensor]) -> float:
    """Mean correlation of model 0's features with every other model's, mapped; NaN for a single model."""
    n = moments.sizes[0]
    blocks = torch.block_diag(*maps)
    mapped = blocks @ moments.covariance().cpu() @ blocks.T
    scale = mapped.diagonal().clamp(min=0).sqrt()
    value = [mapped[:n, k * n : (k + 1) * n].diagonal() / (scale[:n] * scale[k * n : (k + 1) * n]).clamp(min=1e-30)
             for k in range(1, len(maps))]  # fmt: skip
    return float(torch.cat(value).clamp(-1, 1).mean()) if value else float("nan")
