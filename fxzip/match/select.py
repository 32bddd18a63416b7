"""Keep features rather than average them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np
import torch

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .elimination import Elimination
from .matching import Correspondence, Matching, mean_correlation, model_of, optimal_unmerge, similarity
from .readers import Read

SAME = 1e-3  # copies differ by less than this share of their root mean square; what float32 products can tell
FILL, EXCHANGE = 64, 16  # of the width, one in so many is chosen at once, and exchanged at first


@dataclass(frozen=True)
class Select:
    """Keeps `width` of all Sn features and rebuilds the others from them by least squares.

    Greedy elimination, then exchanges (see `Elimination`): keep the feature j that explains most of what is left,
    sum_k,l R_jk G_kl R_lj / R_jj with R the covariance not yet explained; column subset selection as in Farahat et
    al., "Greedy column subset selection", KAIS 2015, in a metric. G says what an error costs: in the outputs of the
    layers that read the features (see `Read`), and to the share `plain` in the features themselves, each in its
    own deviations. Selection commutes with every pointwise non-linearity, which averaging does not.
    M picks rows; U is the optimal unmerge with `ridge`, and exact on the kept features.
    Raises InputError for ridge < 0, plain outside (0, 1] or a width outside 1..Sn.
    """

    ridge: float = 1e-4
    plain: float = 0.3

    name: ClassVar[str] = "select"
    paper: ClassVar[str] = "Farahat et al., Greedy column subset selection, KAIS 2015"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments", "readers"})

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"Select: ridge must be 0 or more, not {self.ridge}")
        if not 0 < self.plain <= 1:
            raise InputError(f"Select: plain must be above 0 and at most 1, not {self.plain}")

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn], U [Sn, m]; kept features by index in their model."""
        total = sum(moments.sizes)
        if not 1 <= width <= total:
            raise InputError(f"select: the width must be in 1..{total}, not {width}")
        correlation = moments.correlation().cpu().numpy()
        dead = moments.dead.cpu().numpy()
        correlation[dead, dead] = 0  # nothing to explain, nothing explained
        same = copies(moments)
        kept = keep(correlation, width, same, self._metric(moments), spent=True)
        del correlation
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
        alike = similarity(moments)  # as large as the moments, so not before it is wanted
        quality = _quality(alike, kept, model_of(moments.sizes))
        return Matching(merge, unmerge, moments.sizes, quality, mean_correlation(local, moments.sizes, alike))

    def _metric(self, moments: SpaceMoments) -> list[np.ndarray]:
        """G for features in units of their deviations; both shares cost 1 in all before anything is kept. [Sn, Sn], or
        one block per model where nothing reads features of two"""
        covariance = moments.covariance()
        variance = covariance.diagonal().clamp_min(0)
        alive = max(float((variance > 0).sum()), 1.0)
        cost = float(moments.metric.flatten() @ covariance.flatten()) if isinstance(moments, Read) else 0.0
        if not isinstance(moments, Read) or cost <= 0:
            return [np.eye(n) / alive for n in moments.sizes]
        scale = variance.sqrt()
        del covariance
        metric = moments.metric * (scale * ((1 - self.plain) / cost))
        metric *= scale[:, None]
        metric.diagonal().add_(self.plain / alive)
        bounds = list(pairwise(accumulate(moments.sizes, initial=0)))
        if any(bool(metric[i:j, j:].any()) for i, j in bounds):
            return [metric.cpu().numpy()]
        return [metric[i:j, i:j].cpu().contiguous().numpy() for i, j in bounds]


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


def keep(
    correlation: np.ndarray,
    width: int,
    same: np.ndarray | None = None,
    metric: np.ndarray | Sequence[np.ndarray] | None = None,
    spent: bool = False,
) -> np.ndarray:
    """The features kept, in order of choice; once all is explained, the first ones left that are no copy of one
    kept (same: bool [n, n]; another function of the data may show beyond it), then any.

    correlation: float [n, n], symmetric; metric: likewise, and positive, or its blocks; the identity if None. spent:
    the correlation may be overwritten. int64 [width]

    >>> keep(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]), 2)
    array([0, 2])
    """
    n = len(correlation)
    search = Elimination(correlation, np.eye(n) if metric is None else metric, spent)
    search.fill(width, max(1, width // FILL))
    search.exchange(width // EXCHANGE)
    chosen = search.kept
    if same is not None:
        covered = np.asarray(same[:, chosen].any(axis=1))
        for j in np.setdiff1d(np.arange(n), chosen).tolist():
            if len(chosen) < width and not covered[j]:
                chosen.append(j)
                covered = covered | same[:, j]
    rest = np.setdiff1d(np.arange(n), chosen)[: width - len(chosen)]
    return np.concatenate([np.array(chosen, np.int64), rest])
