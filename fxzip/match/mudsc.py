"""MuDSC: correspondences that hold for activations and weights at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import InputError
from ..measure.moments import SpaceMoments
from .matching import Affinity, Correspondence, Evidence, Matcher, Matching, needs, similarity
from .permute import Permute
from .zip import Zip


@dataclass(frozen=True)
class MuDSC:
    """Matches by balance * correlation of activations + (1 - balance) * correlation of weights.

    Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024 (merging under dual-space constraints): starts
    from the activations, whose moments stay fixed, then sweeps over the spaces; what a feature's weights are is
    read in the merged coordinates of the neighbouring spaces as they stand. matcher: Zip (default) or Permute.
    Stops when nothing changes, or after `sweeps`: with Zip it may circle.
    Raises InputError for a balance outside [0, 1], sweeps < 1, or a matcher that needs more than similarities.

    >>> MuDSC(balance=0.7, matcher=Permute())
    MuDSC(balance=0.7, matcher=Permute(), sweeps=10)
    """

    balance: float = 0.5
    matcher: Matcher = field(default_factory=lambda: Zip(beta=1.0))
    sweeps: int = 10

    name: ClassVar[str] = "mudsc"
    paper: ClassVar[str] = "Xu et al., Training-Free Pretrained Model Merging, CVPR 2024"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"moments", "weights"})
    monotone: ClassVar[bool] = False
    start: ClassVar[str] = "activations"

    def __post_init__(self) -> None:
        if not 0 <= self.balance <= 1:
            raise InputError(f"MuDSC: balance must be in [0, 1], not {self.balance}")
        if self.sweeps < 1:
            raise InputError(f"MuDSC: sweeps must be 1 or more, not {self.sweeps}")
        if not isinstance(self.matcher, Matcher) or needs(self.matcher) != {"similarity"}:
            raise InputError(f"MuDSC: the matcher must work on similarities, as {Permute()} does, not {self.matcher!r}")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """One space, given its mixed affinity (or moments of one kind) -> M [m, Sn], U [Sn, m]."""
        return self.matcher(moments, width)

    def affinity(self, weights: SpaceMoments | None, moments: SpaceMoments | None) -> Affinity | None:
        """The mixture; of one kind alone where a space has no other (blocks, say) or at the start."""
        known = [(m, share) for m, share in ((moments, self.balance), (weights, 1 - self.balance)) if m is not None]
        if not known:
            return None
        if len(known) == 1:
            return Affinity(known[0][0].sizes, similarity(known[0][0]))
        return Affinity(known[0][0].sizes, sum(similarity(m) * share for m, share in known))  # type: ignore[arg-type]
