"""Distill: natural-gradient steps on what solve has fitted, towards the parents' outputs and features.

    for each batch:   v <- MOMENTUM v - G^-1 (dL/dW) S^-1,   W <- W + rate v
        L  the relative squared errors of all outputs, and `features` times those of what solve aims at

Solve fits every layer for itself; what a layer can make up for that was lost before or is lost behind it takes
derivatives through the whole network. No labels; but gradients, and some passes over the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..errors import InputError
from ..match import Matcher
from ..solve import Settings, Solve
from ..solve.sequence import Pass
from .descent import Descent, Distilled
from .needs import distill_needs
from .network import Unmerge
from .views import View, check_views

_NO_STEMS = "Distill(views=) does not go by since=: what is shared reads stems' features, not the inputs"

__all__ = ["Distill", "Distilled", "distill", "distill_needs"]


@dataclass(frozen=True)
class Distill:
    """method="solve+distill": solve, then natural-gradient steps towards the parents' outputs and features (fxzip;
    Martens and Grosse, ICML 2015, for the steps). Label-free, but neither gradient-free nor closed form.

    solve: what is fitted first. epochs: over the calibration samples, but for an eighth of them, on which each is
        judged (from 8 chunks on). batch: samples of one step, about. features: what all fits' own aims count together,
        beside the outputs, which count 1. views: functions of the inputs that leave the right outputs as they are, such
        as `lambda x: x.flip(-1)` for photographs of animals; outputs then aim at the mean of what the models give for
        an input and its views, and every step sees one of these. precision: torch.bfloat16 takes steps, not weights, in
        that, which is several times as fast where there are instructions for it (AMX, GPUs); a network that cannot is
        taken further in its own precision, and a notice says why. solve_samples: how many of the samples the fits see,
        about, where there are more; None: all. What steps take further need not have been fitted on as many. rate: how
        long the first steps are, relative to the one that would be best for the first samples, were it the only one.
        damping: what is added to the curvature on the outputs' side of each layer, relative to its mean diagonal; with
        many samples less comes nearer, if the rate is lower as well. Takes several times solve's time, and memory for
        derivatives of a batch.
    Raises InputError for epochs, batch or solve_samples below 1, features or rate below 0, damping of 0 or less, or
        another precision; `merge` for views that change shapes, write to their inputs, draw at random or mix samples.

    >>> Distill(epochs=2).name
    'solve+distill'
    """

    solve: Solve = field(default_factory=Solve)
    epochs: int = 6
    batch: int = 128
    features: float = 10.0
    views: Sequence[View] = ()
    seed: int = 0
    precision: torch.dtype | str | None = None  # bfloat16, or the models' own
    solve_samples: int | None = None
    rate: float = 0.2
    damping: float = 0.1
    name: ClassVar[str] = "solve+distill"

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch": 1, "features": 0, "rate": 0, "solve_samples": 1}
        given = {n: getattr(self, n) for n in least if n != "solve_samples" or self.solve_samples is not None}
        wrong = [n for n, value in given.items() if not value >= least[n]]
        said = [f"{n} must be at least {least[n]}, got {getattr(self, n)!r}" for n in wrong]
        said += [] if self.damping > 0 else [f"damping must be above 0, got {self.damping!r}"]
        views = self.views if isinstance(self.views, Sequence) else (None,)
        said += [] if all(map(callable, views)) else [f"views must be a list of functions, got {self.views!r}"]
        if self.precision not in (None, torch.bfloat16, "bfloat16"):
            said.append(f"precision must be torch.bfloat16, or None for the models' own, got {self.precision!r}")
        if said:
            raise InputError.listing("Distill", said)
        object.__setattr__(self, "precision", self.precision and torch.bfloat16)
        object.__setattr__(self, "views", tuple(self.views))

    def refused(self, memory: Any, distributed: Any, since: str | None) -> list[str]:
        """What options of `merge` it does not go with."""
        given = {"memory": memory is not None, "distributed": distributed not in (None, False)}
        wrong = [f"method 'solve+distill' does not go by {k}=: leave it out, or use method='solve'"
                 for k, there in given.items() if there]  # fmt: skip
        if self.views and since is not None:
            wrong.append(_NO_STEMS)
        return wrong

    def check(self, batches: Sequence[tuple], stems: bool) -> None:
        """Raises InputError where views cannot be taken of these positional arguments. stems: of what `since` left."""
        if self.views and stems:
            raise InputError(_NO_STEMS)
        check_views(self.views, *batches[:1]) if batches else None

    @property
    def settings(self) -> Settings:
        """Of the fits."""
        return self.solve.settings

    def matcher_for(self, models: int) -> Matcher:
        """The matcher for this many models."""
        return self.solve.matcher_for(models)

    def __call__(self, steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, progress: bool = True) -> str:
        """What `solve_parameters` calls after its fits."""
        return str(distill(steps, chunks, unmerged, self, progress))


def distill(
    steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, settings: Distill, progress: bool = True
) -> Distilled:
    """Take the layers that `steps` fitted further. chunks: positional-argument tuples of one batch size."""
    return Descent(steps, chunks, unmerged, settings).run(progress)
