"""Small pictures of large similarity matrices: what a report keeps of them."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .match import Matching
from .measure.moments import DEAD, SpaceMoments

SIDE = 48  # features shown along each axis, at most
_UNKNOWN = 255


@dataclass(frozen=True)
class HeatMap:
    """Correlations between evenly spaced features of two models: the first's along the rows.

    side: rows and columns; total: features they were taken from; values: base64 of a byte per entry, row by row:
    100 (1 + correlation), rounded, or 255 where a feature is constant or has no counterpart.
    """

    side: int
    total: int
    values: str

    @classmethod
    def of(cls, correlation: np.ndarray, total: int) -> HeatMap:
        """Of a square matrix in [-1, 1] (NaN: unknown).

        >>> HeatMap.of(np.array([[1.0, float("nan")], [0.25, -1.0]]), 2).array().tolist()
        [[1.0, nan], [0.25, -1.0]]
        """
        known = np.isfinite(correlation)
        codes = np.where(known, np.rint(100 * (1 + np.clip(np.where(known, correlation, 0), -1, 1))), _UNKNOWN)
        return cls(len(codes), total, base64.b64encode(codes.astype(np.uint8).tobytes()).decode())

    def array(self) -> np.ndarray:
        """float64 [side, side], NaN where unknown."""
        codes = np.frombuffer(base64.b64decode(self.values), np.uint8).reshape(self.side, self.side)
        return np.where(codes == _UNKNOWN, np.nan, codes / 100.0 - 1)


def heat_maps(matching: Matching, moments: SpaceMoments) -> tuple[HeatMap, HeatMap]:
    """(feature k of the first model against feature l of the second, in the models' own order; what the first puts
    into merged feature k against what the second puts into l). The second map has merged features that both feed (all
    if there is none), best first: its diagonal is what merging brought together.

    >>> from .match import from_slots
    >>> m = SpaceMoments((2, 2), 9.0, torch.zeros(4), torch.eye(4) + torch.eye(4).flip(0))  # in opposite order
    >>> [h.array().diagonal().tolist() for h in heat_maps(from_slots(np.array([0, 1, 1, 0]), 2, (2, 2)), m)]
    [[0.0, 0.0], [1.0, 1.0]]
    """
    first, second = (matching.blocks_merge(i).cpu() for i in (0, 1))
    both = ((first != 0).any(1) & (second != 0).any(1)).nonzero().flatten()
    fed = both if len(both) else torch.arange(matching.width)
    chosen = fed[_spread(len(fed))]
    matched = _correlation(moments, first[chosen], second[chosen])
    best = np.argsort(-np.nan_to_num(matched.diagonal(), nan=-2.0), kind="stable")
    few = min(moments.sizes[:2])
    own = [torch.eye(n, dtype=torch.float64)[_spread(few)] for n in moments.sizes[:2]]
    return HeatMap.of(_correlation(moments, *own), few), HeatMap.of(matched[np.ix_(best, best)], len(fed))


def _correlation(moments: SpaceMoments, *rows: Tensor) -> np.ndarray:
    """Of combinations rows[0] [k, n_0] of the first model's features with rows[1] [k, n_1] of the second's; NaN where
    one of them is constant. [k, k]"""
    mean, second, starts = moments.mean.cpu(), moments.second.cpu(), moments.offsets
    parts = [slice(starts[i], starts[i + 1]) for i in (0, 1)]
    means = [r @ mean[p] for r, p in zip(rows, parts, strict=True)]
    power = [((r @ second[p, p]) * r).sum(1) for r, p in zip(rows, parts, strict=True)]  # [k]
    spread = [(e - m * m).where(e - m * m > DEAD * e, torch.nan) for e, m in zip(power, means, strict=True)]
    covariance = rows[0] @ second[parts[0], parts[1]] @ rows[1].T - torch.outer(*means)
    return (covariance / torch.outer(*spread).sqrt()).numpy()


def _spread(total: int) -> Tensor:
    """At most SIDE indices below `total`, evenly spaced. int64"""
    return torch.arange(min(SIDE, total)) * total // max(min(SIDE, total), 1)
