"""Any matcher's merge with the best unmerge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matcher, Matching, needs, optimal_unmerge
from .select import SAME
from .zip import Zip


@dataclass(frozen=True)
class Unmerge:
    """The features another matcher merges, read back by least squares rather than copied.

    M is `matcher`'s. U = S M^T (M S M^T + lam I)^-1 with the measured covariance S: the linear map that rebuilds all
    models' features from the merged ones with the least squared error (the map behind "select"; ZipIt! and the
    permutations copy a merged feature to each of its members). Features that their copies rebuild exactly keep them.
    No further pass over the data. Raises InputError for ridge < 0, or a matcher of the weights alone.
    """

    matcher: Matcher = field(default_factory=lambda: Zip(beta=1.0))
    ridge: float = 1e-4

    name: ClassVar[str] = "unmerge"
    paper: ClassVar[str] = "fxzip; U of Stoica et al., ZipIt!, ICLR 2024, by least squares"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise InputError(f"Unmerge: ridge must be 0 or more, not {self.ridge}")
        wanted = needs(self.matcher)
        if "weights" in wanted:
            raise InputError(f"Unmerge: {self.matcher.name} looks at weights; a matcher of activations is needed here")

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn] of the matcher, U [Sn, m] by least squares."""
        plain = self.matcher(moments, width)
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
