"""Measure: joint moments of every space over all models, in one streaming pass."""

from .collect import collect_moments
from .example import form_of, invent
from .loader import other_forms, read_batches
from .moments import Accumulator, Moments, SpaceMoments, balanced
from .needs import Needs, SpaceNeed, needs, peak, size_of
from .programs import Programs
from .resume import Checkpoint, fingerprint

__all__ = [
    "Accumulator",
    "Checkpoint",
    "Moments",
    "Needs",
    "Programs",
    "SpaceMoments",
    "SpaceNeed",
    "balanced",
    "collect_moments",
    "fingerprint",
    "form_of",
    "invent",
    "needs",
    "other_forms",
    "peak",
    "read_batches",
    "size_of",
]
