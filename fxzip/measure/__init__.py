"""Measure: joint moments of every space over all models, in one streaming pass."""

from .collect import collect_moments
from .example import form_of, invent
from .loader import read_batches
from .moments import Accumulator, Moments, SpaceMoments, balanced
from .programs import Programs

__all__ = [
    "Accumulator",
    "Moments",
    "Programs",
    "SpaceMoments",
    "balanced",
    "collect_moments",
    "form_of",
    "invent",
    "read_batches",
]
