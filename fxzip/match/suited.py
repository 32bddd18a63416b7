"""Select where it is known what an error in a feature costs, zip elsewhere: what solve starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..measure.moments import SpaceMoments
from .matching import Correspondence, Matching
from .readers import Read
from .select import Select
from .zip import Zip


@dataclass(frozen=True)
class Suited:
    """`chosen` for spaces whose features layers read as they are, up to `most` in all models; `otherwise` for the rest.

    Select weighs an error by what it does in the layers that read the feature. Where a norm acts across the features
    before that, or no layer reads them, this says little (see benchmarks/RESULTS.md), and merging like with like is
    the safer start. most: choosing grows with the third power of the features, and takes minutes beyond.

    >>> import torch
    >>> m = SpaceMoments((1, 1), 1.0, torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    >>> Suited()(m, 1).merge  # nothing is known of what reads them
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    chosen: Select = field(default_factory=lambda: Select(plain=0.1))
    otherwise: Zip = field(default_factory=lambda: Zip(beta=1.0))
    most: int = 4096

    name: ClassVar[str] = "suited"
    paper: ClassVar[str] = "fxzip; Farahat et al., KAIS 2015, and Stoica et al., ZipIt!, ICLR 2024, by space"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments", "readers"})

    def __call__(self, moments: SpaceMoments, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn], U [Sn, m]; errors as of the two."""
        told = isinstance(moments, Read) and moments.straight and sum(moments.sizes) <= self.most
        return (self.chosen if told else self.otherwise)(moments, width)
