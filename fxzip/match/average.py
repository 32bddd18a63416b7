"""Plain weight averaging, as a matcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError, SpaceError
from .matching import Correspondence, Evidence, Matching, from_slots, similarity


@dataclass(frozen=True)
class Average:
    """Feature k of every model is one: M = [I/N ... I/N], U = stacked I.

    Wortsman et al., "Model soups", ICML 2022; McMahan et al., "Federated averaging", AISTATS 2017.
    Raises SpaceError when the models' widths differ (`match` pairs those by their places in the widest, instead of
    asking here), InputError for any width but theirs.
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022"
    correspondence: ClassVar[Correspondence] = "identity"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of Sn = N n features, width n -> M [n, N n], U [N n, n]."""
        sizes = moments.sizes
        if len(set(sizes)) > 1:
            raise SpaceError(f"average: the models have {sizes} features; use 'permute', 'zip' or 'select'")
        if width != sizes[0]:
            raise InputError(
                f"average: the width must be {sizes[0]}, the models' own, not {width}; use 'zip' or 'select'"
            )
        return from_slots(np.tile(np.arange(width), len(sizes)), width, sizes, similarity(moments))
