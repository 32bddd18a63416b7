"""Soft matching by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..errors import InputError, SpaceError
from .matching import Correspondence, Evidence, Matching, mean_correlation, similarity

ERROR, STEPS = 1e-7, 300  # of the marginals; Sinkhorn iterations at most


@dataclass(frozen=True)
class Transport:
    """Every feature of model 0 meets a weighted mean of the features of each other model.

    Singh and Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, section 4; soft, as in Imfeld et al.,
    "Transformer Fusion with Optimal Transport", ICLR 2024: T minimises <T, 1 - correlation> - regularise *
    entropy(T) over couplings with uniform marginals (Cuturi 2013, Sinkhorn), M = [I, n T_1, ...] / N and
    U = stacked n T_i^T. With regularise -> 0 this is "permute".
    Raises InputError for regularise <= 0 or any width but the models', SpaceError when the models' widths differ.
    """

    regularise: float = 0.02

    name: ClassVar[str] = "transport"
    paper: ClassVar[str] = "Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if not self.regularise > 0:
            raise InputError(f"Transport: regularise must be above 0, not {self.regularise}; use 'permute'")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of N n features, width n -> M [n, N n], U [N n, n]."""
        sizes, n = moments.sizes, moments.sizes[0]
        if len(set(sizes)) > 1:
            raise SpaceError(f"transport: the models have {sizes} features; use 'permute', 'zip' or 'select'")
        if width != n:
            raise InputError(f"transport: the width must be {n}, the models' own, not {width}; use 'zip' or 'select'")
        alike = similarity(moments)
        soft = [np.eye(n)] + [sinkhorn(alike[:n, k * n : (k + 1) * n], self.regularise) for k in range(1, len(sizes))]
        maps = torch.from_numpy(np.concatenate(soft, 1))  # [n, N n]
        met = [float((t * alike[:n, k * n : (k + 1) * n]).sum(1).mean()) for k, t in enumerate(soft)][1:]
        local = np.tile(np.arange(n), len(sizes))
        quality = float(np.mean(met)) if met else float("nan")
        return Matching(maps / len(sizes), maps.T.contiguous(), sizes, quality, mean_correlation(local, sizes, alike))


def sinkhorn(score: np.ndarray, regularise: float) -> np.ndarray:
    """The doubly stochastic matrix proportional to exp(score / regularise) up to row and column scales. [n, n]

    In logarithms; after STEPS iterations it is taken as it is, rows exact.

    >>> sinkhorn(np.array([[0.9, 0.1], [0.2, 0.8]]), 0.01).round(6)
    array([[1., 0.],
           [0., 1.]])
    """
    from scipy.special import logsumexp

    log = score / regularise
    for _ in range(STEPS):
        log = log - logsumexp(log, 0, keepdims=True)
        rows = logsumexp(log, 1, keepdims=True)
        log = log - rows
        if np.abs(np.expm1(rows)).max() < ERROR:
            break
    return np.exp(log)
