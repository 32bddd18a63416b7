"""Soft matching by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from ..errors import InputError
from .matching import Correspondence, Evidence, Matching, mean_correlation, similarity

ERROR, STEPS = 1e-7, 300  # of the marginals; Sinkhorn iterations at most


@dataclass(frozen=True)
class Transport:
    """Every feature of one model (the first of the widest) meets a weighted mean of the features of each other.

    Singh and Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, section 4; soft, as in Imfeld et al.,
    "Transformer Fusion with Optimal Transport", ICLR 2024: T minimises <T, 1 - correlation> - regularise *
    entropy(T) over couplings with uniform marginals (Cuturi 2013, Sinkhorn), M = [I, n T_1, ...] / N and
    U = stacked n_i T_i^T. With regularise -> 0 and equal widths this is "permute".
    Raises InputError for regularise <= 0 or any width but the widest model's.
    """

    regularise: float = 0.02

    name: ClassVar[str] = "transport"
    paper: ClassVar[str] = "Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020"
    correspondence: ClassVar[Correspondence] = "free"
    widens: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if not self.regularise > 0:
            raise InputError(f"Transport: regularise must be above 0, not {self.regularise}; use 'permute'")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of Sn features, width n = max n_i -> M [n, Sn], U [Sn, n]."""
        sizes, n = moments.sizes, max(moments.sizes)
        if width != n:
            raise InputError(f"transport: the width must be {n}, the models' own, not {width}; use 'zip' or 'select'")
        alike, first = similarity(moments), sizes.index(n)
        starts = np.cumsum((0, *sizes))
        own = slice(starts[first], starts[first] + n)
        met = [alike[own, a:b] for a, b in pairwise(starts.tolist())]  # per model [n, n_i]
        soft = [np.eye(n) if k == first else sinkhorn(m, self.regularise) for k, m in enumerate(met)]
        maps = torch.from_numpy(np.concatenate(soft, 1))  # rows of every model add up to 1  [n, Sn]
        back = [t.T * (len(t.T) / n) for t in soft]  # and so do those of U
        others = [float((t * m).sum(1).mean()) for k, (t, m) in enumerate(zip(soft, met, strict=True)) if k != first]
        local = np.concatenate([np.arange(k) for k in sizes])
        quality = float(np.mean(others)) if others else float("nan")
        return Matching(maps / len(sizes), torch.from_numpy(np.concatenate(back)), sizes, quality,
                        mean_correlation(local, sizes, alike))  # fmt: skip


def sinkhorn(score: np.ndarray, regularise: float) -> np.ndarray:
    """The matrix proportional to exp(score / regularise) up to row and column scales, whose rows add up to 1 and whose
    columns add up to n / k. [n, k]

    In logarithms; after STEPS iterations it is taken as it is, rows exact.

    >>> sinkhorn(np.array([[0.9, 0.1], [0.2, 0.8]]), 0.01).round(6)
    array([[1., 0.],
           [0., 1.]])
    """
    from scipy.special import logsumexp

    log, share = score / regularise, np.log(score.shape[0] / max(score.shape[1], 1))
    for _ in range(STEPS):
        log = log - logsumexp(log, 0, keepdims=True) + share
        rows = logsumexp(log, 1, keepdims=True)
        log = log - rows
        if np.abs(np.expm1(rows)).max() < ERROR:
            break
    return np.exp(log)
