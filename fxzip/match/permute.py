"""Permutation matching on activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .alignment import Layer, align
from .matching import Correspondence, Evidence, Matching, from_slots, similarity


@dataclass(frozen=True)
class Permute:
    """Pairs features one to one so that the sum of their correlations over all pairs of models is largest.

    Li et al., "Convergent learning", 2015; Ainsworth et al., "Git Re-Basin", ICLR 2023, section 3.1
    (activation matching). Exact for two models (Hungarian algorithm); for more, every model is aligned to
    the sum of all others until nothing moves. Narrower models are matched into the widest.
    Raises InputError for any width but the widest model's.
    """

    name: ClassVar[str] = "permute"
    paper: ClassVar[str] = "Ainsworth et al., Git Re-Basin, ICLR 2023 (activation matching)"
    correspondence: ClassVar[Correspondence] = "permutation"
    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of Sn features, width max n_i -> M [m, Sn], U [Sn, m]; slot k is model 0's feature k."""
        widest = max(moments.sizes)
        if width != widest:
            raise InputError(
                f"permute: the width must be {widest}, the widest model's, not {width}; use 'zip' or 'select'"
            )
        correlation = similarity(moments)
        found = align([Layer("", width, moments.sizes, correlation=correlation)])
        slots = np.concatenate([s[""] for s in found])
        return from_slots(slots, width, moments.sizes, correlation)
