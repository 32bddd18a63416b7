"""Git Re-Basin: permutations from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .matching import Affinity, Correspondence, Evidence, Matching
from .permute import Permute

STARTS = ("sorted", "order")


@dataclass(frozen=True)
class Rebasin:
    """Permutes features so that the models' weights are as close as possible; needs no data.

    Ainsworth et al., "Git Re-Basin", ICLR 2023, section 3.2, algorithm 1 (weight matching): spaces in random
    order, each by the assignment that maximises sum <W_a, P W_b> over all shared parameters on it, the other
    spaces held, until nothing improves. Here for any number of models (every pair counts), for any inferred
    space, heads and groups as blocks; parameters that stay per model (heads) do not count, running statistics
    neither. start: "order" as published, or "sorted" (ours, see `match`), which finds exact copies.
    Raises InputError for sweeps < 1, an unknown start, or any width but the models'.

    >>> from torch import nn, randn
    >>> from fxzip import merge, report
    >>> a, b = (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(2))
    >>> report(merge([a, b], method=Rebasin(), example_inputs=randn(2, 3), progress=False)).notices[0][:22]
    'rebasin: weights agree'
    """

    sweeps: int = 100
    start: str = "sorted"

    name: ClassVar[str] = "rebasin"
    paper: ClassVar[str] = "Ainsworth et al., Git Re-Basin, ICLR 2023 (weight matching, algorithm 1)"
    correspondence: ClassVar[Correspondence] = "permutation"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    monotone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise InputError(f"Rebasin: sweeps must be 1 or more, not {self.sweeps}")
        if self.start not in STARTS:
            raise InputError(f"Rebasin: start must be one of {STARTS}, not {self.start!r}")

    @property
    def matcher(self) -> Permute:
        return Permute()

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """One step in one space: moments whose rows are weights, or an Affinity -> M [m, Sn], U [Sn, m]."""
        if width != max(moments.sizes):
            raise InputError(f"rebasin: the width must be {max(moments.sizes)}, the models' own, not {width}")
        alike = moments if isinstance(moments, Affinity) else self.affinity(moments, None)
        assert alike is not None
        return Permute()(alike, width)

    def affinity(self, weights: SpaceMoments | None, moments: SpaceMoments | None) -> Affinity | None:
        """Inner products of the features' weights, in units of the mean feature's squared norm."""
        if weights is None:
            return None
        products = weights.second.cpu().numpy()
        return Affinity(weights.sizes, products / max(float(np.mean(products.diagonal())), 1e-300))
