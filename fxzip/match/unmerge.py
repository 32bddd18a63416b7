"""Any matcher's merge with the best unmerge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from ..errors import InputError
from ..infer.spaces import FeatureSpace
from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matcher, Matching, needs, optimal_unmerge, widens
from .select import SAME
from .zip import Zip


@dataclass(frozen=True)
class Unmerge:
    """The features another matcher merges, read back by least squares rather than copied.

    M is `matcher`'s. U = S M^T (M S M^T + lam I)^-1 with the measured covariance S: the linear map that rebuilds all
    models' features from the merged ones with the least squared error (the map behind "select"; ZipIt! and the
    permutations copy a merged feature to each of its members). Features that their copies rebuild exactly keep them.
    No further pass over the data. Raises InputError for ridge < 0.
    """

    matcher: Matcher = field(default_factory=lambda: Zip(beta=1.0))
    ridge: float = 1e-4

    name: ClassVar[str] = "unmerge"
    paper: ClassVar[str] = "fxzip; U of Stoica et al., ZipIt!, ICLR 2024, by least squares"
    correspondence: ClassVar[Correspondence] = "free"

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"Unmerge: ridge must be 0 or more, not {self.ridge}")

    @property
    def widens(self) -> bool:
        return widens(self.matcher)

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.matcher) - {"similarity"} | {"moments"}

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn] of the matcher, U [Sn, m] by least squares."""
        return self._read(self.matcher(moments, width), moments)

    def inside(self, space: FeatureSpace, matching: Matching, moments: SpaceMoments) -> Matching:
        """A copying matching with U by least squares, within the blocks of a space."""
        if not space.parents:
            return self._read(matching, moments)
        unmerge = matching.unmerge.clone()
        linked = matching.merge != 0
        for block in range(int(space.blocks.max()) + 1):
            rows = linked[:, torch.from_numpy(np.flatnonzero(space.blocks == block))].any(1)  # of model 0's block
            columns = linked[rows].any(0)
            parts = [c.nonzero()[:, 0] for c in columns.split(matching.sizes)]
            some = Matching(
                matching.merge[rows][:, columns], unmerge[columns][:, rows], tuple(len(p) for p in parts)
            )  # fmt: skip
            found = self._read(some, moments.restrict([p.numpy() for p in parts]))
            unmerge[columns.nonzero(), rows.nonzero()[:, 0]] = found.unmerge
        return replace(matching, unmerge=unmerge)

    def _read(self, plain: Matching, moments: SpaceMoments) -> Matching:
        unmerge = optimal_unmerge(plain.merge, moments, self.ridge).cpu()
        copied = _exact(plain, moments)
        unmerge[copied] = plain.unmerge[copied]
        return replace(plain, unmerge=unmerge)


def _exact(matching: Matching, moments: SpaceMoments):
    """Which features U M f already rebuilds, on the measured data. bool [Sn]"""
    second = moments.second.cpu().double()
    back = matching.unmerge @ matching.merge  # [Sn, Sn]
    size = second.diagonal()
    gap = size - 2 * (back @ second).diagonal() + ((back @ second) * back).sum(1)
    return gap <= SAME**2 * size.clamp(min=1e-30)
