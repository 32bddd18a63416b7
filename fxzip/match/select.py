"""Keep features rather than average them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matching, mean_correlation, model_of, optimal_unmerge, similarity

EXPLAINED = 1e-6  # a feature with less than this share of its variance left has nothing new to say
SAME = 1e-4  # copies differ by less than this share of their root mean square
REFRESH = 64  # steps between exact recomputations of the running scores


@dataclass(frozen=True)
class Select:
    """Keeps `width` of all Sn features and rebuilds the others from them by least squares.

    Greedy pivoted elimination on the pooled correlation R: keep the feature j with the largest
    sum_k R_kj^2 / R_jj (the variance it explains of all features), subtract R_j R_j^T / R_jj, repeat; column
    subset selection as in Farahat et al., "Greedy column subset selection", KAIS 2015. Selection commutes
    with every pointwise non-linearity, which averaging does not.
    M picks rows; U is the optimal unmerge with `ridge`, and exact on the kept features.
    Raises InputError for ridge < 0 or a width outside 1..Sn.
    """

    ridge: float = 1e-4

    name: ClassVar[str] = "select"
    paper: ClassVar[str] = "Farahat et al., Greedy column subset selection, KAIS 2015"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"Select: ridge must be 0 or more, not {self.ridge}")

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn], U [Sn, m]; kept features by index in their model."""
        total = sum(moments.sizes)
        if not 1 <= width <= total:
            raise InputError(f"select: the width must be in 1..{total}, not {width}")
        correlation = moments.correlation().cpu().numpy()
        dead = moments.dead.cpu().numpy()
        correlation[dead, dead] = 0  # nothing to explain, nothing explained
        alike = similarity(moments)
        same = copies(moments)
        kept = keep(correlation, width, same)
        local = np.concatenate([np.arange(n) for n in moments.sizes])
        kept = kept[np.lexsort((kept, local[kept]))]
        index = torch.from_numpy(kept)
        merge = torch.zeros(width, total, dtype=torch.float64)
        merge[torch.arange(width), index] = 1
        unmerge = optimal_unmerge(merge, moments, self.ridge).cpu()
        unmerge[index] = torch.eye(width, dtype=torch.float64)
        twin = same[:, kept]  # least squares would spread a copy over all that happens to add up to it
        rows, columns = np.flatnonzero(twin.any(1)), twin.argmax(1)
        unmerge[rows] = torch.eye(width, dtype=torch.float64)[columns[rows]]
        quality = _quality(alike, kept, model_of(moments.sizes))
        return Matching(merge, unmerge, moments.sizes, quality, mean_correlation(local, moments.sizes, alike))


def copies(moments: SpaceMoments) -> np.ndarray:
    """Which features are the same function of the data, not just correlated. bool [Sn, Sn], symmetric"""
    second = moments.second.cpu().numpy()
    size = second.diagonal()
    gap = size[:, None] + size[None, :] - 2 * second  # E (f_j - f_k)^2
    return gap <= SAME**2 * np.maximum(size[:, None], size[None, :])


def _quality(correlation: np.ndarray, kept: np.ndarray, model: np.ndarray) -> float:
    """Mean correlation of the dropped features with the nearest kept one of another model, or NaN."""
    dropped = np.setdiff1d(np.arange(len(correlation)), kept)
    across = model[dropped][:, None] != model[kept][None, :]
    nearest = np.where(across, correlation[np.ix_(dropped, kept)], -np.inf).max(1, initial=-np.inf)
    nearest = nearest[nearest > -np.inf]
    return float(nearest.mean()) if len(nearest) else float("nan")


def keep(correlation: np.ndarray, width: int, same: np.ndarray | None = None) -> np.ndarray:
    """The features the elimination keeps, in order of choice; once all is explained, the first ones left that
    are no copy of one kept (same: bool [n, n]; another function of the data may show beyond it), then any.

    correlation: float [n, n], symmetric, not modified. The residual is never formed: R = R0 - L L^T, and
    the column sums of its squares follow each step by one product with R. int64 [width]

    >>> keep(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]), 2)
    array([0, 2])
    """
    n = len(correlation)
    factor = np.zeros((n, width), order="F")  # L
    left = correlation.diagonal().copy()  # diagonal of R
    power = np.einsum("ij,ij->j", correlation, correlation)  # column sums of R^2
    chosen: list[int] = []
    for step in range(width):
        if step and step % REFRESH == 0:
            residual = correlation - factor[:, :step] @ factor[:, :step].T
            power = np.einsum("ij,ij->j", residual, residual)
        open_ = left > EXPLAINED
        open_[chosen] = False
        if not open_.any():
            break
        j = int(np.where(open_, power / np.where(open_, left, 1), -1).argmax())
        past = factor[:, :step]
        column = correlation[:, j] - past @ past[j]  # R_j
        image = correlation @ column - past @ (past.T @ column)  # R R_j
        pivot = column[j]
        power += column * (column * (column @ column) / pivot - 2 * image) / pivot
        factor[:, step] = column / np.sqrt(pivot)
        left = left - factor[:, step] ** 2
        chosen.append(j)
    if same is not None:
        covered = np.asarray(same[:, chosen].any(axis=1))
        for j in np.setdiff1d(np.arange(n), chosen).tolist():
            if len(chosen) < width and not covered[j]:
                chosen.append(j)
                covered = covered | same[:, j]
    rest = np.setdiff1d(np.arange(n), chosen)[: width - len(chosen)]
    return np.concatenate([np.array(chosen, np.int64), rest])
