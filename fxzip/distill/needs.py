"""What distilling takes, in bytes, from shapes."""

from __future__ import annotations

from ..solve import SolveNeeds

_VALUES = 3  # copies of what a network makes of one batch: values, derivatives, what they are to be; by measurement
_WEIGHTS = 6  # float32 copies of a matrix: it, its speed, what an epoch began with, its gradient, their sum, a step
_INVERSE = 3  # float64 copies of a factor while it is inverted


def distill_needs(solving: SolveNeeds, copies: int = 0) -> int:
    """Two factors of curvature of every layer, some copies of its matrix, and the values and derivatives of a batch.
    copies: bytes of the networks in another precision, and of what outputs are to be over views."""
    factors = [8 * f.groups * (f.columns**2 + f.outputs**2) for f in solving.fits]
    every = sum(size * f.copies for size, f in zip(factors, solving.fits, strict=True))
    weights = sum(4 * f.groups * f.columns * f.outputs * f.copies for f in solving.fits)
    return every + _INVERSE * max(factors, default=0) + _WEIGHTS * weights + _VALUES * solving.values + copies
